"""Values of a configuration: from YAML or the words of a flag to the declared type, and as text."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from base.errors import UserError, brief
from base.knobs import Knob
from base.names import nearest

LARGEST_INT = 2**63 - 1  # what torch and NumPy hold
YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")
KINDS = {  # what an option holds -> its name in an error, in --help, an example
    bool: ("true or false", "[true|false]", "true"),
    int: ("a whole number", "INT", "1"),
    float: ("a finite number", "FLOAT", "1e-4"),
    str: ("text", "TEXT", "text"),
    Path: ("a path", "PATH", "folder/file"),
}


def convert(value: Any, kind: type) -> Any:
    """`value`, from YAML or as a word, as one of KINDS; ValueError where it is nothing of the kind."""
    text = str(value)
    if kind is bool:
        if text.lower() not in YES + NO:
            raise ValueError(value)
        return text.lower() in YES
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(value)
    if kind in (str, Path):  # a number is welcome: `epochs: 30` is as good as '30 epochs'
        # a shell leaves the ~ of --output-dir=~/run, and files have none
        return kind(os.path.expanduser(text))
    number = float(text)
    if not math.isfinite(number):  # 1e400 is not, either
        raise ValueError(value)
    if kind is float:
        return number
    with suppress(ValueError):
        number = int(text)  # to the last digit; 1e3 is a whole number, too
    if number != int(number) or abs(number) > LARGEST_INT:
        raise ValueError(value)
    return int(number)


@dataclass(frozen=True, kw_only=True)
class Option(Knob):
    """One option of a script: what its class says about it, and the values that it takes."""

    kind: type  # of each of its values, one of KINDS
    many: type | None  # list or tuple, where it has several
    length: int | None  # of a tuple
    optional: bool  # it may be None
    default: Any
    group: str  # its heading in --help

    def read(self, value: Any) -> Any:
        """`value`, from YAML or as the text of a flag, in the declared type. UserError where type,
        range or choice is wrong: what was expected instead.

        The word none is None, in files as after flags, and the empty list of a list; a single value
        counts as a list of one.
        """
        of_any_length = self.many is not None and self.length is None
        items = value if self.many else [value]
        if str(value).lower() in ("none", "null"):
            if self.optional:
                return None
            items = [] if of_any_length else items
        elif of_any_length and isinstance(value, str | int | float | Path):
            items = [value]
        try:
            if not isinstance(items, list | tuple) or self.length not in (None, len(items)):
                raise ValueError(value)
            found = [self._read_one(item) for item in items]
        except ValueError:
            raise UserError(self.complaint(value)) from None
        return self.many(found) if self.many else found[0]

    def _read_one(self, value: Any) -> Any:
        # as an unset variable leaves it: `--output_dir $OUT`; image_root may be no folder at all
        if self.kind is Path and not str(value).strip() and self.default != Path():
            raise ValueError(value)
        value = convert(value, self.kind)
        too_low = self.low is not None and value < self.low
        too_high = self.high is not None and value > self.high
        if too_low or too_high or (self.choices and value not in self.choices):
            raise ValueError(value)
        return value

    def complaint(self, value: Any) -> str:
        """What was expected instead of `value`, with an example: the default if it says something."""
        wanted, _, example = KINDS[self.kind]
        if self.length is not None:
            wanted = f"{self.length} values ({', '.join([wanted] * self.length)})"
        elif self.many:
            wanted = f"a list ({wanted}, ...)"
        if self.optional:
            wanted += " or none"
        if self.choices:
            wanted = "one of " + ", ".join(map(show, self.choices))
            example = show(self.choices[0])
        limits = {">=": self.low, "<=": self.high}
        limits = [f"{sign} {limit}" for sign, limit in limits.items() if limit is not None]
        wanted = " ".join([wanted, " and ".join(limits)]).rstrip()
        if self.default not in (None, "", [], ()):
            example = show(self.default)
        near = nearest(value, self.choices) if isinstance(value, str) else None
        return f"expected {wanted}, got {brief(value)}; for example {near or example}"

    @property
    def is_switch(self) -> bool:
        """Whether `--NAME` turns it on and `--no-NAME` off."""
        return self.kind is bool and self.many is None

    @property
    def placeholder(self) -> str:
        """The type as --help marks it: `INT`, `{a,b}`, `TEXT ...`."""
        _, mark, _ = KINDS[self.kind]
        if self.choices:
            mark = "{" + ",".join(map(show, self.choices)) + "}"
        return f"{mark} ..." if self.many else mark


def of_type(declared: Any) -> dict[str, Any]:
    """The fields of an Option that its type determines: one of KINDS, a list or tuple of one, or one
    of these or None. TypeError for any other."""
    alternatives = {declared}
    if get_origin(declared) in (Union, UnionType):
        alternatives = set(get_args(declared))
    inner, *others = alternatives - {NoneType}
    many = get_origin(inner)
    elements = get_args(inner) or (inner,)
    kind, *more = {*elements} - {Ellipsis}
    if others or more or kind not in KINDS or many not in (None, list, tuple):
        raise TypeError(f"an option cannot hold {declared}")
    length = len(elements) if many is tuple and Ellipsis not in elements else None
    optional = NoneType in alternatives
    return {"kind": kind, "many": many, "length": length, "optional": optional}


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
