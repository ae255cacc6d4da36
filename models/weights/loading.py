"""Load a state dict and report, or refuse, what is missing, unexpected or of another shape."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from base.errors import UnfitWeights, UserError, brief
from base.names import some

State = Mapping[str, Tensor]
C = TypeVar("C")
NUMBER = re.compile(r"(?<=[./])\d+(?=[./])")  # of a block
POSITION_IDS = "*embeddings.position_ids"  # a constant, 0..511; libraries disagree on storing it


class Differences(NamedTuple):
    """How a state dict differs from what a model expects: keys, for shapes (key, got, expected).

    integers: keys of whole numbers where the model has fractions."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple, tuple]]
    integers: list[str]

    def __bool__(self) -> bool:
        return any(self[:])

    @property
    def shapes(self) -> list[str]:
        """The keys of other shapes, each with both."""
        return [
            f"{key} {list(got)} instead of {list(expected)}"
            for key, got, expected in self.mismatched
        ]

    def note(self) -> str:
        """What a start that is as it should be leaves out, in a line, at most three keys each."""
        parts = {
            "only in the file, not used here": self.unexpected,
            "only in the network, new": self.missing,
            "of another shape, new": self.shapes,
        }
        named = [f"{len(keys)} {what}: {some(keys, 3)}" for what, keys in parts.items() if keys]
        return "; ".join(named) or "fits as it is"

    def text(self) -> str:
        """One paragraph per kind of difference, at most ten keys each."""
        parts = {"missing": self.missing, "unexpected": self.unexpected}
        parts["of another shape"] = self.shapes
        parts["of whole numbers, which are no weights"] = self.integers
        return "\n".join(
            f"  {len(keys)} {what}: {some(keys)}" for what, keys in parts.items() if keys
        )


def check_temperature(name: str, value: Tensor) -> None:
    """UnfitWeights for a temperature that nothing can be divided by, as in a file of zeros."""
    if not (value > 0).all():
        raise UnfitWeights(f"{name}, the temperature, is {brief(value.tolist())}; fetch it again")


def compare_state(expected: State, given: State) -> Differences:
    """Differences of `given` from `expected`, in the order of the keys."""
    mismatched = [
        (key, tuple(given[key].shape), tuple(value.shape))
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    integers = [
        key
        for key, value in expected.items()
        if key in given and value.is_floating_point() and not given[key].is_floating_point()
    ]
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    return Differences(missing, unexpected, mismatched, integers)


def load_checkpoint(
    model: nn.Module,
    state: State,
    allowed_missing: Iterable[str] = (),
    allowed_unexpected: Iterable[str] = (),
    assign: bool = False,
) -> Differences:
    """Copies `state` into `model`, in place, and returns what was left out, all of it named as
    expected by the caller.

    allowed_missing: glob patterns of keys that may keep their initial values, absent or of another
    shape in `state`. allowed_unexpected: patterns of keys of `state` that the model does not have.
    Position ids may always differ. assign: the tensors themselves become the parameters, as a model
    on the meta device needs it. Raises `UserError` that lists every other difference; the model
    is then unchanged.
    """
    found = compare_state(model.state_dict(), state)
    may_miss = (*allowed_missing, POSITION_IDS)
    may_exceed = (*allowed_unexpected, POSITION_IDS)
    faults = Differences(
        missing=[key for key in found.missing if not matches(key, may_miss)],
        unexpected=[key for key in found.unexpected if not matches(key, may_exceed)],
        mismatched=[entry for entry in found.mismatched if not matches(entry[0], may_miss)],
        integers=found.integers,
    )
    if faults:
        raise UnfitWeights(
            f"the checkpoint does not fit the {type(model).__name__}:\n{faults.text()}\n"
            "use a checkpoint of this kind of model, and the sizes (width, layers, vocabulary, queue) "
            "it was made with"
        )
    left_out = {*found.unexpected, *(key for key, *_ in found.mismatched)}
    fitting = {key: value for key, value in state.items() if key not in left_out}
    model.load_state_dict(fitting, strict=False, assign=assign)
    return found


def count(names: Iterable[str], pattern: str) -> int:
    """How many layers there are: one more than the largest number that `pattern` finds at the start
    of the names of weights, 0 where it finds none."""
    numbers = [int(found[1]) for name in names if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The other name of a weight; None where the table lacks it.

    table: one name -> the other; {} stands for the number of a block, and a name for itself and for
    .weight and .bias below it.
    """
    number = NUMBER.search(name)
    form = NUMBER.sub("{}", name, count=1)
    stem, _, leaf = form.rpartition(".")
    other = table.get(form)
    if other is None and stem in table:
        other = f"{table[stem]}.{leaf}"
    return other.format(number[0]) if other and number else other


def split_qkv(state: State) -> dict[str, Tensor]:
    """`attn.qkv.weight` or `attn.in_proj_weight` -> `attn.q.weight`, k and v; biases alike."""
    result = {}
    for name, value in state.items():
        packed = re.fullmatch(r"(.*\battn\.)(?:qkv\.|in_proj_)(weight|bias)", name)
        if packed is None:
            result[name] = value
            continue
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            result[f"{packed[1]}{part}.{packed[2]}"] = rows.clone()
    return result


def join_qkv(state: State, packed: str = "qkv.") -> dict[str, Tensor]:
    """The opposite of `split_qkv`. Raises UserError where one of the three is missing."""
    result = {}
    for name, value in state.items():
        part = re.fullmatch(r"(.*\battn\.)([qkv])\.(weight|bias)", name)
        if part is None:
            result[name] = value
            continue
        parts = [state.get(f"{part[1]}{letter}.{part[3]}") for letter in "qkv"]
        if any(each is None for each in parts):
            raise UserError(f"{name}: the query, key or value projection beside it is missing")
        if part[2] == "q":
            result[f"{part[1]}{packed}{part[3]}"] = torch.cat(parts)
    return result


def part_of(state: State, prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def from_saved(kind: type[C], values: Mapping[str, Any]) -> C:
    """The dataclass `kind` of those entries of a saved configuration that are fields of it."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
