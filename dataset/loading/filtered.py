"""A source of the training stream without some of its records."""

from collections.abc import Callable, Iterator, Sequence

from base.errors import BadSample, UserError
from dataset.loading.stream import ENOUGH


class Filtered:
    """The records of a source for which `keep` is true; the others are no bad samples.

    complaint: the error where `keep` refuses a whole epoch. kept: fraction of the records that
    `keep` takes, where it is known; an epoch counts these alone.
    """

    def __init__(self, source, keep: Callable[[dict], bool], complaint: str, kept: float = 1.0):
        self.source = source
        self.keep = keep
        self.complaint = complaint
        self.kept = kept
        self.name = source.name
        self.build = source.build

    def __len__(self) -> int:
        return max(1, round(self.kept * len(self.source)))

    def start(self, taken: int, slot: int, slots: int):
        """Position of worker `slot` of `slots` once all have taken about `taken` kept records."""
        return self.source.start(round(taken / self.kept), slot, slots)

    def deal(self, before: Sequence, slots: int) -> list:
        """As the source's."""
        return self.source.deal(before, slots)

    def read(self, seed: int, slot: int, slots: int, position) -> Iterator[tuple]:
        """As the source's, with fewer records."""
        dropped = 0
        for sample_seed, record, after in self.source.read(seed, slot, slots, position):
            if isinstance(record, BadSample) or self.keep(record):
                dropped = 0
                yield sample_seed, record, after
                continue
            dropped += 1
            if dropped > max(ENOUGH, len(self.source)):
                raise UserError(f"{self.name}: {self.complaint}")
