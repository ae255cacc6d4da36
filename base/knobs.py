"""Options of a dataclass: default, help and limits stand together, in every folder alike.

@dataclass
class Config(RunConfig):
    alpha: float = knob(0.4, "weight of the momentum teacher's soft targets", low=0, high=1)
    scheduler: Schedule = section(Schedule, aliases=("schedular",))
"""

import copy
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from base.errors import unknown


@dataclass(frozen=True)
class Knob:
    """What an option, or a section of options, says of itself."""

    help: str = ""  # its meaning and unit
    choices: Sequence = ()  # the values allowed, of a list each element
    low: float | None = None  # inclusive range, of a list each element
    high: float | None = None
    aliases: Sequence[str] = ()  # other names; `j` makes `-j`
    bare: str | None = None  # the value of a flag that stands alone
    methods: str = ""  # the methods that use it, as in "simla albef"; none = all
    only_with: tuple[str, Any] | None = None  # (option, value) without which it has no effect
    rare: bool = False  # left to `--help all`
    required: bool = False  # a script cannot do without
    flat: bool = False  # of a section: `--lr` is accepted for `--optimizer.lr`


def knob(default: Any, help: str, **described: Any) -> Any:
    """An option; `described` are further fields of Knob. Mutable defaults are copied."""
    metadata = {"knob": Knob(help=help, **described)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def restated(kind: type, name: str, default: Any = None, **changes: Any) -> Any:
    """The option `name` of the class `kind` once more, with another default (None: another place
    fills it) and other `changes`, fields of Knob; its meaning and its limits stay."""
    stated = next(f for f in fields(kind) if f.name == name)
    return knob(default, **(vars(about(stated)) | changes))


def section(kind: type, *, aliases: Sequence[str] = (), flat: bool = False, **defaults: Any) -> Any:
    """A nested dataclass of knobs, some with other `defaults`."""
    metadata = {"knob": Knob(aliases=aliases, flat=flat)}
    return field(default_factory=lambda: kind(**defaults), metadata=metadata)


def about(f: Field) -> Knob:
    """What a field of a configuration says of itself."""
    return f.metadata.get("knob", Knob())


def check_choices(config: Any) -> None:
    """UserError where an option of the dataclass `config`, which code may have built, is none of
    its choices."""
    for f in fields(config):
        value, choices = getattr(config, f.name), about(f).choices
        if choices and value is not None and value not in choices:
            raise unknown(f.name, value, choices)
