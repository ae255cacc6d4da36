"""Values of a configuration: from YAML or the words of a flag to the declared type.

Options are a bool, int, float, str or Path, or a list or tuple of one of them, or one of these or
None.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

LARGEST_INT = 2**63 - 1  # what torch and NumPy hold
YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in YES + NO:
        raise ValueError(value)
    return word in YES


def _int(value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = _float(value)  # 1e3 is a whole number
    if number != int(number) or abs(number) > LARGEST_INT:
        raise ValueError(value)
    return int(number)


def _float(value: Any) -> float:
    number = float(str(value))  # ValueError for True, None and lists
    if not math.isfinite(number):  # 1e400 is not, either
        raise ValueError(value)
    return number


def _str(value: Any) -> str:  # a number is welcome: `epochs: 30` is as good as '30 epochs'
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(value)
    text = str(value)  # a shell leaves the ~ of --output-dir=~/run, and files have none
    return os.path.expanduser(text) if text.startswith("~/") else text


def _path(value: Any) -> Path:
    return Path(_str(value))


SCALARS = {  # type -> its reader (ValueError), its name in an error, in --help, an example
    bool: (_bool, "true or false", "[true|false]", "true"),
    int: (_int, "a whole number", "INT", "1"),
    float: (_float, "a finite number", "FLOAT", "1e-4"),
    str: (_str, "text", "TEXT", "text"),
    Path: (_path, "a path", "PATH", "folder/file"),
}


class Kind:
    """A declared type, taken apart; TypeError where an option cannot have it."""

    def __init__(self, declared: Any):
        members = {declared}
        if get_origin(declared) in (Union, UnionType):
            members = set(get_args(declared))
        self.optional = NoneType in members
        members.discard(NoneType)
        inner = members.pop()
        self.many = get_origin(inner)  # list, tuple or None
        elements = get_args(inner) or (inner,)
        fixed = self.many is tuple and Ellipsis not in elements
        self.length = len(elements) if fixed else None  # of a tuple
        known = elements[0] in SCALARS and self.many in (None, list, tuple)
        if not known or members or len({*elements} - {Ellipsis}) > 1:
            raise TypeError(f"an option cannot hold {declared}")
        self.read, self.name, self.mark, self.example = SCALARS[elements[0]]
        self.is_bool = elements[0] is bool and self.many is None

    def convert(self, value: Any) -> Any:
        """`value`, from YAML or as the text of a flag, in this type; ValueError where it is none.

        The word none is None, in files as after flags, and the empty list of a list; a single
        value counts as a list of one.
        """
        if str(value).lower() in ("none", "null"):
            if self.optional:
                return None
            value = [] if self.many is list else value
        if self.many is None:
            return self.read(value)
        if self.many is list and isinstance(value, str | int | float | Path):
            value = [value]
        if not isinstance(value, list | tuple) or self.length not in (None, len(value)):
            raise ValueError(value)
        return self.many(self.read(item) for item in value)

    def describe(self) -> str:
        """The type in the words of an error message."""
        text = self.name
        if self.length is not None:
            text = f"{self.length} values ({', '.join([text] * self.length)})"
        elif self.many:
            text = f"a list ({text}, ...)"
        return f"{text} or none" if self.optional else text


def show(value: Any) -> str:
    """A value as one would type it after a flag."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(show, value)) or "[]"
    return str(value) or "''"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two configurations as plain values: lines such as `lr: 0.1 -> 0.2`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {show(before)} -> {show(after)}")
    return lines
