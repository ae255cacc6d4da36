"""Options of a dataclass: default, help and limits stand together, in every folder alike.

@dataclass
class Config(RunConfig):
    alpha: float = knob(0.4, "weight of the momentum teacher's soft targets", low=0, high=1)
    scheduler: Schedule = section(Schedule, aliases=("schedular",))
"""

import copy
from collections.abc import Sequence
from dataclasses import field
from typing import Any


def knob(
    default: Any,
    help: str,
    *,
    choices: Sequence = (),
    low: float | None = None,
    high: float | None = None,
    aliases: Sequence[str] = (),
    bare: str | None = None,
    methods: str = "",
    rare: bool = False,
) -> Any:
    """A field of a configuration. `help` gives its meaning and unit.

    choices: the values allowed; low, high: inclusive range; both hold for each element of a list.
    aliases: other names of the field, `j` makes `-j`. bare: the value of a flag that stands alone.
    methods: the methods that use it (`"simla albef"`), none = all; rare: `--help` leaves it to `--help all`.
    Mutable defaults are copied.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "aliases": tuple(aliases),
        "bare": bare,
        "methods": tuple(methods.split()),
        "rare": rare,
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
