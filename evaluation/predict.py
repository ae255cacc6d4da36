"""Predictions for every sample of a split, each made once, whatever the number of processes; and
their results."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from base.distributed import World, gather_objects, gather_rows


def over_split(
    predict: Callable[..., tuple[Tensor, ...]],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
    name: str = "evaluating",
) -> list[Tensor]:
    """Tables [total, ...] on the CPU of every process; this one predicts the rows `own`, in the
    order of `batches`.

    predict: called with a batch's tensors, except `label`, on `world.device`; gives tensors [B,
    ...].
    """
    found = []
    for batch in progress(batches, name, world):
        inputs = {
            k: v.to(world.device, non_blocking=True) for k, v in batch.items() if k != "label"
        }
        found.append(predict(**inputs))
    columns = [torch.cat(parts) for parts in zip(*found, strict=True)]
    known = gather_objects([(part.shape[1:], part.dtype) for part in columns])
    kinds = next((kind for kind in known if kind), [])
    if not columns:  # a process without samples takes part all the same
        columns = [
            torch.zeros(0, *shape, dtype=dtype, device=world.device) for shape, dtype in kinds
        ]
    rows = torch.as_tensor(list(own), dtype=torch.int64)
    return [gather_rows(column, rows, total).cpu() for column in columns]


def progress(items: Iterable, name: str, world: World) -> Iterable:
    """A progress bar on the first process."""
    if not world.is_main:
        return items
    from tqdm import tqdm

    return tqdm(items, name, leave=False, dynamic_ncols=True, unit="batch")
