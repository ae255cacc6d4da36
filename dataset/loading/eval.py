"""In-order loading for evaluation: every sample once, on any number of processes."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from base.errors import BadSample, UserError
from dataset.loading.workers import signals_held, worker_init


def shard_indices(n: int, rank: int, world_size: int) -> range:
    """The part of range(n) that `rank` evaluates: contiguous, sizes differ by at most one, nothing
    twice."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


class EvalLoader:
    """Batches of `load(i)` for every i of `indices`, in order, the last one possibly smaller.

    load: makes a sample, or raises BadSample, which ends the evaluation with a UserError: nothing
    is left out silently.
    """

    def __init__(
        self,
        load: Callable[[int], dict],
        indices: Sequence[int],
        batch_size: int,
        collate: Callable[[list[dict]], dict],
        workers: int = 4,
        pin_memory: bool = False,
    ):
        self.loader = DataLoader(
            _Loaded(load, indices),
            batch_size=batch_size,
            num_workers=min(workers, len(indices)),
            collate_fn=_CollateOrBad(collate),
            pin_memory=pin_memory and torch.cuda.is_available(),
            worker_init_fn=worker_init,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        with signals_held():
            batches = iter(self.loader)
        for batch in batches:
            if isinstance(batch, BadSample):
                raise UserError(
                    f"{batch}; evaluation needs every sample: mend the file or remove its annotation"
                )
            yield batch


class _Loaded(Dataset):
    def __init__(self, load: Callable[[int], dict], indices: Sequence[int]):
        self.load, self.indices = load, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict | BadSample:
        try:
            return self.load(self.indices[place])
        except BadSample as error:
            return error


class _CollateOrBad:
    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, samples: list) -> dict | BadSample:
        return next(
            (sample for sample in samples if isinstance(sample, BadSample)), None
        ) or self.collate(samples)
