"""Predictions for every sample of a split, each made once, whatever the number of processes; and
their results."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from base.bars import progress_bar
from base.distributed import World, gather_objects, gather_parts
from base.errors import UserError
from base.heartbeat import beat


class Guesses(NamedTuple):
    """What a model said of every image of a split, likeliest class first.

    classes int64 [N,K]; scores float32 [N,K], probabilities, or None; truth: the classes of
    every image.
    """

    classes: Tensor
    scores: Tensor | None
    truth: list[list[int]]

    def rows(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """(number, classes said, true classes) of every image."""
        for number, (said, truth) in enumerate(zip(self.classes.tolist(), self.truth, strict=True)):
            yield number, said, truth


def over_split(
    predict: Callable[..., tuple[Tensor, ...]],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
    name: str = "evaluating",
    steps: int | None = None,
) -> list[Tensor]:
    """Tables [total, ...] on the CPU of every process; this one predicts the rows `own`, in the
    order of `batches`.

    predict: called with a batch's tensors, except `label`, on `world.device`; returns tensors
    [B,...]. steps: how many batches there are, where they do not tell. UserError where a prediction
    is not finite.
    """
    found = []
    for batch in progress(batches, name, world, steps):
        inputs = {
            k: v.to(world.device, non_blocking=True) for k, v in batch.items() if k != "label"
        }
        found.append(predict(**inputs))
    names = max(gather_objects(len(found[0]) if found else 0))  # a process may have no samples
    columns = [[row[i] for row in found] for i in range(names)]
    tables = [gather_parts(parts, own, total, world.device).cpu() for parts in columns]
    for table in tables:
        check_finite(table, f"the network's outputs ({name})")
    return tables


def check_finite(values: Tensor, what: str) -> None:
    """UserError where one of them is NaN or infinite: the best of such scores is some class or other,
    and its accuracy looks like a real one."""
    if not values.isfinite().all():
        raise UserError(
            f"{what} are not finite: the checkpoint holds NaN, or fp16 overflows (try --precision "
            "bf16 or fp32)"
        )


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products float32 [Q,N] of unit rows float32 [Q,E], [N,E]; not rounded under autocast,
    where many keys of a query would tie."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T


def progress(items: Iterable, name: str, world: World, total: int | None = None) -> Iterator:
    """The items, each a sign of life, with a bar on the first process; total: how many, where they
    do not tell."""
    if world.is_main:
        items = progress_bar(items, desc=name, total=total, leave=False, unit="batch")
    for item in items:
        beat(f"in validation ({name})")
        yield item


def percent(values: Tensor) -> float:
    """Mean of fractions, or the fraction of True in a bool tensor, in percent."""
    return 100 * values.double().mean().item()
