"""What may be set: `knob` and `section` declare it in a dataclass, `Schema` knows every dotted path
and spelling."""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from base.errors import brief
from base.files import nearest
from runtime.config.values import convert, describe, example, show


def knob(
    default: Any,
    help: str,
    *,
    choices=(),
    low=None,
    high=None,
    aliases=(),
    bare: str | None = None,
    unused: bool = False,
    moved_to: str | None = None,
) -> Any:
    """A field of a configuration. `help` tells its meaning and unit.

    choices: the values allowed; low, high: inclusive range; both hold for each element of a list.
    aliases: other names of the field, `j` makes `-j`. bare: the value of a flag that stands alone.
    unused: accepted from old configurations without effect, which is reported. moved_to: path of the
    knob that is set instead. Mutable defaults are copied.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "low": low,
        "high": high,
        "aliases": aliases,
        "bare": bare,
        "unused": unused,
        "moved_to": moved_to,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, *, aliases: Sequence[str] = (), flat: bool = False, **defaults: Any) -> Any:
    """A nested dataclass of knobs, some with other `defaults`. flat: `--lr` is accepted for
    `--optimizer.lr`."""
    return field(
        default_factory=lambda: kind(**defaults), metadata={"aliases": aliases, "flat": flat}
    )


@dataclass(frozen=True)
class Knob:
    """What the schema knows of one field."""

    kind: Any
    default: Any
    group: str
    help: str = ""
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    aliases: tuple[str, ...] = ()
    bare: str | None = None
    unused: bool = False
    moved_to: str | None = None

    def read(self, value: Any) -> Any:
        """`value` in the knob's type; ValueError where type, range or choice is wrong."""
        value = convert(value, self.kind)
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is None:
                continue
            below, above = (
                self.low is not None and item < self.low,
                self.high is not None and item > self.high,
            )
            if below or above or (self.choices and item not in self.choices):
                raise ValueError(value)
        return value

    def complaint(self, value: Any) -> str:
        bounds = [
            f"{sign} {bound}"
            for sign, bound in ((">=", self.low), ("<=", self.high))
            if bound is not None
        ]
        expected = (
            "one of " + ", ".join(map(show, self.choices)) if self.choices else describe(self.kind)
        )
        wanted = " ".join([expected, " and ".join(bounds)]).strip()
        return f"expected {wanted}, got {brief(value)}; for example {example(self.kind, self.default, self.choices)}"


class Schema:
    """Every knob of a configuration class by its dotted path, and every spelling of a path."""

    def __init__(self, cls: type):
        self.knobs: dict[str, Knob] = {}
        self.sections: dict[str, type] = {"": cls}
        self.spellings: dict[str, str] = {}
        self._add(cls, cls, "")

    def _add(self, cls: type, node: Any, prefix: str) -> None:
        """`node`: the class itself, or for a section an instance, whose values are the defaults."""
        hints = get_type_hints(cls)
        owners = {f.name: _owner(cls, f.name) for f in fields(cls) if f.init}
        for f in sorted(
            (f for f in fields(cls) if f.init), key=lambda f: owners[f.name] is not cls
        ):  # own ones first
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            default = default if node is cls else getattr(node, f.name)
            path = prefix + f.name
            for name in (f.name, *f.metadata.get("aliases", ())):
                self.spellings[prefix + name] = path
            if is_dataclass(default):
                self.sections[path] = type(default)
                self._add(type(default), default, path + ".")
                if f.metadata.get("flat"):
                    inner = [(k, v) for k, v in self.spellings.items() if k.startswith(path + ".")]
                    for name, target in inner:
                        self.spellings.setdefault(prefix + name[len(path) + 1 :], target)
                continue
            about = {k: v for k, v in f.metadata.items() if k in Knob.__dataclass_fields__}
            about.setdefault("help", _comment(owners[f.name], f.name))
            try:
                default = convert(default, hints[f.name])
            except ValueError:
                raise TypeError(
                    f"{cls.__name__}.{f.name}: default {default!r} is not {hints[f.name]}"
                ) from None
            self.knobs[path] = Knob(hints[f.name], default, _title(owners[f.name], prefix), **about)

    def find(self, key: str) -> tuple[str, list[str]] | None:
        """Path of the knob or section that `key` names, and what follows the name of a knob (keys
        of a mapping)."""
        path, names = "", key.split(".")
        for i, name in enumerate(names):
            path = self.spellings.get((path and path + ".") + name.replace("-", "_"), "")
            if not path:
                return None
            if path in self.knobs:
                return path, names[i + 1 :]
        return path, []

    def nearest(self, key: str) -> str | None:
        """The valid key that was probably meant."""
        key = key.replace("-", "_")
        same_leaf = [
            path for path in self.knobs if path.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        return nearest(key, same_leaf, cutoff=0) or nearest(key, self.spellings, cutoff=0.6)

    def build(self, values: Mapping[str, Any], prefix: str = "") -> Any:
        """The configuration object with one value per knob."""
        cls = self.sections[prefix.rstrip(".")]
        inner = {f.name: prefix + f.name for f in fields(cls) if f.init}
        return cls(
            **{
                n: self.build(values, p + ".") if p in self.sections else values[p]
                for n, p in inner.items()
            }
        )


def _owner(cls: type, name: str) -> type:
    """The class of the hierarchy that declared the field first."""
    return next(c for c in reversed(cls.__mro__) if name in getattr(c, "__dataclass_fields__", ()))


@cache
def _comment(owner: type, name: str) -> str:
    """The comment behind a field: how classes of models/ and dataset/, which know no knobs,
    document theirs."""
    source = _lines(owner)
    return next(
        (m[1] for line in source if (m := re.match(rf"    {name}: .*?  # (.*)$", line))), ""
    )


@cache
def _lines(cls: type) -> list[str]:
    return inspect.getsource(cls).splitlines()


def _title(owner: type, prefix: str) -> str:
    doc = (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
    doc = (
        "" if doc.startswith(f"{owner.__name__}(") else doc
    )  # the signature that dataclass() writes
    return ": ".join(filter(None, [prefix.rstrip("."), doc])) or "Options"
