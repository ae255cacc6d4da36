"""Values of a configuration: from YAML or the words of a flag to the declared type.

Options are a bool, int, float, str or Path, or a list or tuple of one of them, or one of these or
None.
"""

import math
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")


def _bool(value: Any) -> bool:
    if str(value).lower() not in YES + NO:
        raise ValueError(value)
    return str(value).lower() in YES


def _int(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not _float(value).is_integer():
        raise ValueError(value)
    return int(_float(value))


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    if math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def _str(value: Any) -> str:  # a number is welcome: `epochs: 30` is as good as '30 epochs'
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(value)
    return str(value)


def _path(value: Any) -> Path:
    return Path(_str(value))


class Scalar(NamedTuple):
    """A type without elements."""

    read: Callable[[Any], Any]  # ValueError where a value is none of this type
    name: str  # in an error
    mark: str  # in --help
    example: str


SCALARS = {
    bool: Scalar(_bool, "true or false", "[true|false]", "true"),
    int: Scalar(_int, "a whole number", "INT", "1"),
    float: Scalar(_float, "a number", "FLOAT", "1e-4"),
    str: Scalar(_str, "text", "TEXT", "text"),
    Path: Scalar(_path, "a path", "PATH", "folder/file"),
}


class Kind:
    """A declared type, taken apart; TypeError where an option cannot have it."""

    def __init__(self, declared: Any):
        members = [declared]
        if get_origin(declared) in (Union, types.UnionType):
            members = [member for member in get_args(declared) if member is not type(None)]
        self.optional = type(None) in get_args(declared)
        self.many = get_origin(members[0])  # list, tuple or None
        elements = get_args(members[0]) if self.many else members
        fixed = self.many is tuple and elements[-1] is not Ellipsis
        self.length = len(elements) if fixed else None  # of a tuple
        known = elements[0] in SCALARS and self.many in (None, list, tuple)
        if not known or len(members) > 1 or len({*elements} - {Ellipsis}) > 1:
            raise TypeError(f"an option cannot hold {declared}")
        self.scalar = SCALARS[elements[0]]
        self.is_bool = declared is bool or declared == bool | None

    def convert(self, value: Any) -> Any:
        """`value`, from YAML or as the text of a flag, in this type; ValueError where it is none.

        The word none is None, in files as after flags; a single value counts as a list of one.
        """
        if self.optional and str(value).lower() in ("none", "null"):
            return None
        if self.many is None:
            return self.scalar.read(value)
        if self.many is list and isinstance(value, str | int | float | Path):
            value = [value]
        if not isinstance(value, list | tuple) or self.length not in (None, len(value)):
            raise ValueError(value)
        return self.many(self.scalar.read(item) for item in value)

    def describe(self) -> str:
        """The type in the words of an error message."""
        text = self.scalar.name
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
