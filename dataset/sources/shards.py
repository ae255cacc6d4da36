"""WebDataset tar and TFRecord shards, local or remote, as an endless deterministic source that
resumes exactly.

Layouts (img2dataset's): tar members KEY.jpg (or another ending of `dataset.images.formats`),
KEY.txt, KEY.json and so on, those of one key together; or TFRecord examples with the features jpg
(or jpeg, png, ..., image), txt, key and so on.
"""

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice

from base.errors import BadSample, UserError
from base.text import lenient_text
from dataset.loading.randomness import mix, permuted
from dataset.sources.remote import describe, plain_stream
from dataset.sources.shard_columns import (
    NO_COLUMNS,
    columns_of,
    image_kinds,
    plain_name,
    with_columns,
)
from dataset.sources.shard_list import Shards, shared_shards
from dataset.sources.tables import Columns
from dataset.sources.tar import LOST, Sample, TarWalk, no_image, read_samples
from dataset.sources.tfrecord import is_tfrecord, parse_example, read_frames

Piece = tuple[str, int, int]  # a shard, and which of how many strides of its samples to take


class ShardSource:
    """Samples of tar or TFRecord shards in shuffled order.

    build: makes a sample of a record, a dict with `image` (encoded bytes), `caption`, `key`
    ("shard/key") and the remaining members as bytes under their extension, or the remaining
    features as lists under their name; raises BadSample to drop it.
    group: shards a worker reads side by side. shuffle_buffer: encoded samples it permutes at a
    time.

    A data epoch is a permutation of the shards, dealt out to the workers of all ranks. With fewer
    shards than workers several workers read the same shard, each keeping its stride of the samples.
    A position is [epoch, group, records taken from the group, left]: resuming re-reads at most one
    group. left: groups of other workers, which are read first, as [epoch, worker, workers, group, end
    of the groups, records taken from the first].
    Samples that a damage took come as BadSamples, and reading continues behind it. What cannot be read
    on, because the shard is cut off or its store has failed, is one BadSample that counts for all
    that are missing.
    """

    def __init__(
        self,
        shards: Shards,
        build,
        group: int = 4,
        shuffle_buffer: int = 1000,
    ):
        self.found = shards
        self.shards = shards.names
        self.name = shards.name
        self.samples = shards.samples
        self.build = build
        self.group = group
        self.shuffle_buffer = shuffle_buffer

    def __len__(self) -> int:
        return self.samples

    def start(self, taken: int, slot: int, slots: int) -> list:
        """Position of worker `slot` of `slots` once all have taken about `taken` records
        together."""
        epoch, rest = divmod(taken, self.samples)
        return [epoch, rest * self._group_count(epoch, slot, slots) // self.samples, 0, []]

    def deal(self, before: Sequence[list], slots: int) -> list[list]:
        """Positions of `slots` workers that continue together where others were, all at `before`: they
        share out the groups that are left of the epochs begun, then begin the next one."""
        workers = len(before)
        # earlier versions had three entries
        positions = [[*position, []][:4] for position in before]
        begun = max(epoch if group or taken else epoch - 1 for epoch, group, taken, _ in positions)
        left = [groups for *_, others in positions for groups in others]
        for worker, (epoch, group, taken, _) in enumerate(positions):
            for later in range(epoch, begun + 1):
                count = self._group_count(later, worker, workers)
                left += _split([later, worker, workers, group, count, taken], -(-slots // workers))
                group = taken = 0
        return [[begun + 1, 0, 0, left[slot::slots]] for slot in range(slots)]

    def read(
        self, seed: int, slot: int, slots: int, position: list
    ) -> Iterator[tuple[int, object, list]]:
        """Endless `(sample seed, record or BadSample, position after it)` for worker `slot` of
        `slots`."""
        epoch, first, taken, left = [*position, []][:4]
        for number, (then, worker, workers, group, end, before) in enumerate(left, start=1):
            groups = self._groups(seed, then, worker, workers)
            for own_seed, record, at, count in self._records(
                seed, (then, worker, workers), groups[:end], group, before
            ):
                rest = [[then, worker, workers, at, end, count], *left[number:]]
                yield own_seed, record, [epoch, first, taken, rest]
        while True:
            groups = self._groups(seed, epoch, slot, slots)
            for own_seed, record, at, count in self._records(
                seed, (epoch, slot, slots), groups, first, taken
            ):
                yield own_seed, record, [epoch, at, count, []]
            epoch += 1
            first = 0
            taken = 0

    def _records(
        self, seed: int, reader: tuple[int, int, int], groups: list, first: int, taken: int
    ) -> Iterator[tuple[int, object, int, int]]:
        """`(sample seed, record or BadSample, group, records taken from it)` of the groups from
        number `first` on, in which `taken` records are behind. reader: (epoch, slot, slots)."""
        for number in range(first, len(groups)):
            records = self._shuffled(groups[number], mix(seed, *reader, number))
            for count, record in enumerate(islice(records, taken, None), taken + 1):
                key = "" if isinstance(record, BadSample) else record["key"]
                number_of_key = zlib.crc32(key.encode("utf-8", "surrogateescape"))
                yield mix(seed, reader[0], number_of_key), record, number, count
            taken = 0

    def _group_count(self, epoch: int, slot: int, slots: int) -> int:
        """How many groups `slot` reads in an epoch."""
        return -(-len(self._places(epoch, slot, slots)) // self.group)

    def _groups(self, seed: int, epoch: int, slot: int, slots: int) -> list[list[Piece]]:
        """What `slot` reads in one epoch, in groups read side by side.

        Pieces are dealt along the endless sequence of epochs: what a division leaves over goes
        around all slots.
        """
        strides = self._strides(slots)
        pieces = strides * len(self.shards)
        places = self._places(epoch, slot, slots)
        drawn = [permuted(place, pieces, mix(seed, epoch)) for place in places]
        mine = [(self.shards[piece // strides], piece % strides, strides) for piece in drawn]
        return [mine[start : start + self.group] for start in range(0, len(mine), self.group)]

    def _strides(self, slots: int) -> int:
        """Workers that share a shard: 1 unless there are fewer shards than workers."""
        return -(-slots // len(self.shards))

    def _places(self, epoch: int, slot: int, slots: int) -> range:
        """Places of `slot` in the permutation of an epoch's pieces."""
        pieces = self._strides(slots) * len(self.shards)
        return range((slot - epoch * pieces) % slots, pieces, slots)

    def _shuffled(self, group: list[Piece], seed: int) -> Iterator[object]:
        records = self._interleaved(group)
        shuffler = random.Random(seed)
        while block := list(islice(records, self.shuffle_buffer)):
            shuffler.shuffle(block)
            yield from block

    def _interleaved(self, group: list[Piece]) -> Iterator[object]:
        """One record of each shard in turn, until all are exhausted."""
        readers = [
            islice(read_shard(shard, self.found.expected(shard)), part, None, of)
            for shard, part, of in group
        ]
        while readers:
            for reader in list(readers):
                record = next(reader, None)
                if record is None:
                    readers.remove(reader)
                else:
                    yield record


def _split(groups: list[int], parts: int) -> list[list[int]]:
    """Groups of one worker ([epoch, worker, workers, group, end, taken]) for up to `parts` workers."""
    epoch, worker, workers, group, end, taken = groups
    if group >= end:
        return []
    step = -(-(end - group) // parts)
    split = [[epoch, worker, workers, g, min(g + step, end), 0] for g in range(group, end, step)]
    split[0][-1] = taken
    return split


def shard_sources(
    entries: Sequence[str], build, shuffle_buffer: int, samples: Sequence[int] = ()
) -> list[ShardSource]:
    """A source for every entry of a list of shards, for all processes: a collective, in which the
    first process looks the shards up.

    samples: how many each entry holds, where they shall not be counted.
    """
    if samples and len(samples) != len(entries):
        raise UserError(
            f"samples: {len(samples)} numbers for {len(entries)} entries of shards; give one each"
        )
    sources = []
    for number, url in enumerate(entries):
        found = shared_shards(url, samples[number] if samples else None)
        sources.append(ShardSource(found, build, shuffle_buffer=shuffle_buffer))
    return sources


def read_shard(shard: str, expected: int | None = None) -> Iterator[dict | BadSample]:
    """The records of one shard in order; what is wrong with the shard or a record comes as a
    BadSample in its place.

    expected: samples of the shard, by which a BadSample for the rest of it
    counts; where fewer have come than these, another one at the end counts the missing.
    """
    shard, columns = plain_name(shard), columns_of(shard)
    counted = 0  # samples that were given or reported lost
    with ExitStack() as stack:
        try:
            file, size = stack.enter_context(plain_stream(shard))
        except UserError:
            raise
        except Exception as error:  # every storage service raises its own
            yield BadSample(f"{shard}: {describe(error)}; {LOST}", expected or 1)
            return
        if is_tfrecord(shard):
            records = _read_examples(file, shard, columns)
        else:
            samples = read_samples(TarWalk(file, size))
            records = (member_record(shard, sample, columns) for sample in samples)
        for record in records:
            if isinstance(record, BadSample):
                if expected and counted >= expected:
                    continue  # damage behind the last sample has taken none
                if record.lost is None:
                    record.lost = max(1, (expected or 0) - counted)
                counted += record.lost
            else:
                counted += 1
            yield record
        if expected and counted < expected:
            missing = expected - counted
            yield BadSample(f"{shard}: {missing} of {expected} samples are missing", missing)


def member_record(
    shard: str, sample: Sample, columns: Mapping[str, Columns] = NO_COLUMNS
) -> dict | BadSample:
    """What `build` gets of a sample of a tar. columns: the members that its address names."""
    key = f"{shard}/{sample.key}" if sample.key else shard
    if sample.fault:
        return BadSample(f"{key}: {sample.fault}", None if sample.rest else 1)
    members = sample.members
    kinds = image_kinds(columns)
    image = next((members.pop(kind) for kind in kinds if kind in members), None)
    if image is None:
        return BadSample(f"{key}: {no_image(members, kinds)}")
    record = members | {"key": key, "image": image}
    if "txt" in members:
        record["caption"] = lenient_text(members["txt"])
    return with_columns(record, columns)


def _read_examples(file, shard: str, columns: Mapping[str, Columns]) -> Iterator[dict | BadSample]:
    """The records of an open TFRecord file."""
    number = -1
    for number, payload in enumerate(read_frames(file, shard)):
        if isinstance(payload, BadSample):
            yield payload
        else:
            yield example_record(shard, number, payload, columns)
    if number < 0:
        yield BadSample(f"{shard}: holds no samples", None)


def example_record(
    shard: str, number: int, payload: bytes, columns: Mapping[str, Columns] = NO_COLUMNS
) -> dict | BadSample:
    """What `build` gets of an example of a TFRecord file. columns: the features that its address
    names."""
    place = f"{shard}/{number}"
    try:
        features = parse_example(payload)
    except BadSample as error:
        return BadSample(f"{place}: {error}")
    kinds = image_kinds(columns)
    kinds = kinds if "image" in columns else ("image", *kinds)
    image = next((features.pop(kind) for kind in kinds if features.get(kind)), None)
    if image is None or not isinstance(image[0], bytes):
        return BadSample(f"{place}: no image ({', '.join(kinds)}), only {', '.join(features)}")
    record = features | {"key": place, "image": image[0]}
    if texts := [text for text in features.get("txt", []) if isinstance(text, bytes)]:
        record["caption"] = lenient_text(texts[0])
    return with_columns(record, columns)
