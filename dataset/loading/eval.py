"""In-order loading for evaluation: every sample once, on any number of processes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import DataLoader, Dataset

from base.distributed import gather_objects
from base.errors import BadSample, UserError
from base.heartbeat import beat
from base.processes import usable_cores
from dataset.images.decode import load_decoder, reading
from dataset.loading.workers import signals_held, worker_init

LISTED = 20  # images named


def shard_indices(n: int, rank: int, world_size: int) -> range:
    """The part of range(n) that `rank` evaluates: contiguous, sizes differ by at most one, nothing
    twice."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


class EvalLoader:
    """Batches of `load(i)` for every i of `indices`, in order, the last one possibly smaller.

    Nothing is left out. A truncated image is scored with its missing rows grey, and an unreadable
    image as a grey one, which the model gets wrong but for luck: so a score is over all samples
    on any machine. Both are named on stderr and counted, in `truncated` and `unreadable` of the
    last pass, and by `damages` for the metrics.
    load: makes a sample; it must pickle, for workers that are not forked. A BadSample of another
    kind than an unreadable image ends the evaluation with a UserError on every process; so do more
    unreadable images than `error_budget`, a fraction of the samples of all processes together.
    Every process must iterate to the end: a collective comes before the first batch and after the
    last.
    exif: turn images by their EXIF orientation.
    """

    def __init__(
        self,
        load: Callable[[int], dict],
        indices: Sequence[int],
        batch_size: int,
        collate: Callable[[list[dict]], dict],
        workers: int = 4,
        pin_memory: bool = False,
        error_budget: float = 0.01,
        exif: bool = False,
    ):
        self.samples = len(indices)
        self.error_budget = error_budget
        self.unreadable: list[str] = []
        self.truncated: list[str] = []
        self.loader = DataLoader(
            _Loaded(load, indices, exif),
            batch_size=batch_size,
            # more processes than cores only wait
            num_workers=min(workers, len(indices), usable_cores()),
            collate_fn=_CollateOrBad(collate),
            pin_memory=pin_memory and torch.cuda.is_available(),
            worker_init_fn=worker_init,
            generator=torch.Generator(),
        )
        if self.loader.num_workers:
            load_decoder()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        self.unreadable = []
        self.truncated = []
        # parts may differ: a process may have a few, or none
        everyone = sum(gather_objects(self.samples))
        with signals_held():
            batches = iter(self.loader)
        bad = None
        for batch in batches:
            beat("in validation")
            if isinstance(batch, BadSample):
                bad = str(batch)
                break
            batch, unreadable, truncated = batch
            self.unreadable += unreadable
            self.truncated += truncated
            if len(self.unreadable) > self.error_budget * everyone:
                break  # more than all processes may have together: no need to read on
            yield batch
        self._report()
        own = bad, len(self.unreadable), self.unreadable[:LISTED]
        found, unreadable, named = zip(*gather_objects(own), strict=True)
        for fault in filter(None, found):
            raise UserError(
                f"{fault}; evaluation needs every sample: fix the file or remove its annotation"
            )
        self._check_budget(sum(unreadable), everyone, list(chain(*named)))

    def damages(self, same: bool = False) -> dict[str, int]:
        """Unreadable and truncated images of the last pass on all processes, where there are any,
        as `unreadable_images` and `truncated_images` for the metrics: a collective. same: every
        process had the same samples, which count once."""
        found = gather_objects((len(self.unreadable), len(self.truncated)))[: 1 if same else None]
        unreadable, truncated = (sum(counts) for counts in zip(*found, strict=True))
        kinds = {"unreadable_images": unreadable, "truncated_images": truncated}
        return {name: count for name, count in kinds.items() if count}

    def _check_budget(self, unreadable: int, samples: int, named: Sequence[str]) -> None:
        """Raise UserError for more unreadable images than the budget allows of `samples`, with some
        of the names."""
        if unreadable <= self.error_budget * samples:
            return
        listed = "\n  ".join(named[:LISTED])
        raise UserError(
            f"{unreadable} images of {samples} samples are unreadable, more than the error budget "
            f"of {self.error_budget:.3g} allows; evaluation needs every sample: fix the files, "
            f"remove their annotations or raise --error-budget. The first:\n  {listed}"
        )

    def _report(self) -> None:
        kinds = (
            (self.unreadable, "unreadable, scored as grey images"),
            (self.truncated, "ending early, scored with their missing rows grey"),
        )
        for found, what in kinds:
            if found:
                listed = "\n  ".join(found[:LISTED])
                print(f"{len(found)} images {what}:\n  {listed}", file=sys.stderr, flush=True)


class _Loaded(Dataset):
    """(sample, unreadable images, truncated images), or a BadSample."""

    def __init__(self, load: Callable[[int], dict], indices: Sequence[int], exif: bool):
        self.load = load
        self.indices = indices
        self.exif = exif

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple | BadSample:
        try:
            with reading(self.exif, grey=True) as noticed:
                sample = self.load(self.indices[place])
        except BadSample as error:
            return error
        return sample, noticed.unreadable, noticed.truncated


class _CollateOrBad:
    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, found: list) -> tuple | BadSample:
        for each in found:
            if isinstance(each, BadSample):
                return each
        samples, unreadable, truncated = zip(*found, strict=True)
        check = getattr(self.collate, "check_sample", lambda sample: None)
        try:
            for sample in samples:
                check(sample)
        except BadSample as error:
            return error
        return self.collate(list(samples)), [*chain(*unreadable)], [*chain(*truncated)]
