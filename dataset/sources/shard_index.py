"""Samples of tar and TFRecord shards by number, for evaluation: where every member lies.

The samples are those that training reads (`dataset.sources.tar`). Shards that are remote or
compressed are copied, decompressed, into the cache.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from base.caches import cache_folder, digest, file_state
from base.distributed import rank
from base.errors import BadSample, UserError
from base.writing import atomic_write
from dataset.sources.remote import plain_copy
from dataset.sources.shard_columns import (
    columns_of,
    image_kinds,
    plain_name,
)
from dataset.sources.shard_list import check_one_split
from dataset.sources.shards import example_record, member_record
from dataset.sources.tables import Columns
from dataset.sources.tar import Sample, TarWalk, no_image, read_samples
from dataset.sources.tfrecord import is_tfrecord, read_frames

LISTED = 5  # bad samples named
THREADS = 8
ERROR_BUDGET = 0.01  # fraction of samples without an image above which shards are refused
INDEX_VERSION = 6  # part of the key of cached indices: raise it when the rules of reading change
ARRAYS = ("shard", "first", "kind", "start", "size", "key_end", "keys", "kinds", "bad", "lost")


class ShardIndex(Sequence):
    """The samples of shards in order: `index[i]` is the record that training gets of sample i.

    Members are read where they lie; nothing is kept open, so that workers may share the index. It
    takes about 60 bytes a sample and is cached by path, size and time of change of the shards.
    Damaged samples and those without an image are left out, named and counted: `bad`, messages;
    `lost`, their number. Raises UserError where they are more than `error_budget` of all, and where
    `title` is a folder with shards of several splits.
    """

    def __init__(
        self, shards: Sequence[str | Path], title: str = "", error_budget: float = ERROR_BUDGET
    ):
        self.names = [str(shard) for shard in shards]
        self.title = title or self.names[0]
        check_one_split(self.title, self.names)
        with ThreadPoolExecutor(THREADS) as pool:
            copied = pool.map(
                partial(plain_copy, cache=cache_folder()), map(plain_name, self.names)
            )
            self.files = list(copied)
        table = _cached_table(self.names, self.files)
        self.shard = table["shard"]
        self.first = table["first"]
        self.kind = table["kind"]
        self.start = table["start"]
        self.size = table["size"]
        self.keys = table["keys"]
        self.key_end = table["key_end"]
        self.kinds = table["kinds"].tolist()
        self.bad = [str(message) for message in table["bad"]]
        self.lost = int(table["lost"])
        self._check(error_budget)

    def _check(self, error_budget: float) -> None:
        listed = "\n  ".join(self.bad[:LISTED])
        total = len(self) + self.lost
        if self.lost > error_budget * total:
            raise UserError(
                f"{self.title}: {self.lost} of {total} samples are unusable, more than the error "
                f"budget allows; fetch or pack the shards again. The first:\n  {listed}"
            )
        if self.lost and rank() == 0:
            print(
                f"{self.title}: {self.lost} of {total} samples are unusable and left out:\n  "
                f"{listed}",
                file=sys.stderr,
            )

    def nonempty(self) -> "ShardIndex":
        """Itself, for an evaluation. UserError where, within the budget, no sample is usable."""
        if not len(self):
            raise UserError(
                f"{self.title}: no sample is usable, such as {self.bad[0]}; fetch or pack the shards "
                "again, or leave them out"
            )
        return self

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> dict:
        """The record of a sample. Raises BadSample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._record(index, columns_of(self.names[self.shard[index]]))

    def _record(self, index: int, columns: Mapping[str, Columns]) -> dict:
        number = self.shard[index]
        name = plain_name(self.names[number])
        if self._is_example(index):
            first = self.first[index]
            with open(self.files[number], "rb") as file:
                file.seek(self.start[first])
                payload = next(read_frames(file, name))
            record = payload
            if not isinstance(payload, BadSample):
                record = example_record(name, int(self._key(index)), payload, columns)
        else:
            members = {ending: self.read(index, ending) for ending in self.endings(index)}
            record = member_record(name, Sample(self._key(index), members), columns)
        if isinstance(record, BadSample):
            raise record
        return record

    def _key(self, index: int) -> str:
        begin = self.key_end[index - 1] if index else 0
        return self.keys[begin : self.key_end[index]].tobytes().decode("utf-8", "surrogateescape")

    def name(self, index: int) -> str:
        """`shard/key` of a sample."""
        return f"{plain_name(self.names[self.shard[index]])}/{self._key(index)}"

    def _members(self, index: int) -> range:
        end = self.first[index + 1] if index + 1 < len(self) else len(self.kind)
        return range(self.first[index], end)

    def endings(self, index: int) -> list[str]:
        """Endings of the members of a sample."""
        return [self.kinds[self.kind[place]] for place in self._members(index)]

    def read(self, index: int, ending: str) -> bytes:
        """Content of one member of a sample, of a TFRecord example its feature. KeyError where it
        has none of that ending."""
        if self._is_example(index):
            values = [value for value in self[index].get(ending, []) if isinstance(value, bytes)]
            if not values:
                raise KeyError(ending)
            return b",".join(values)
        for place in self._members(index):
            if self.kinds[self.kind[place]] == ending:
                with open(self.files[self.shard[index]], "rb") as file:
                    file.seek(self.start[place])
                    return file.read(self.size[place])
        raise KeyError(ending)

    def image(self, index: int) -> bytes:
        """The encoded image of a sample, whatever else it lacks."""
        columns = columns_of(self.names[self.shard[index]])
        if self._is_example(index):
            return self._record(index, _of_image(columns))["image"]
        endings = self.endings(index)
        kinds = image_kinds(columns)
        return self.read(index, next(kind for kind in kinds if kind in endings))

    def _is_example(self, index: int) -> bool:
        return is_tfrecord(plain_name(self.names[self.shard[index]]))


def _of_image(columns: Mapping[str, Columns]) -> dict[str, Columns]:
    """Of the members that an address names that of the image."""
    return {field: given for field, given in columns.items() if field == "image"}


def _cached_table(names: Sequence[str], files: Sequence[Path]) -> dict[str, np.ndarray]:
    states = [file_state(file) for file in files]
    path = cache_folder() / "shards" / f"{digest(INDEX_VERSION, names, states)}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ARRAYS}
    except Exception:  # missing or damaged, in any way that zip and NumPy have: made again
        pass
    table = _table(names, files)
    if not len(table["shard"]) and not len(table["bad"]):
        raise UserError(f"{names[0]}: the shards hold no samples; fetch them again")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **table)
    return table


def _table(names: Sequence[str], files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Columns by sample (shard, first member, end of its key), by member (kind, start, size), the
    keys one behind the other, and what was bad."""
    from tqdm import tqdm

    kinds: dict[str, int] = {}
    columns: dict[str, list] = {name: [] for name in ("shard", "first", "kind", "start", "size")}
    keys = bytearray()
    key_end = []
    bad = []
    lost = 0
    bar = tqdm(
        list(zip(names, files, strict=True)), "indexing", unit=" shards", delay=2, disable=None
    )
    for number, (name, file) in enumerate(bar):
        for sample in _samples(name, file):
            if sample.fault:
                lost += 1
                place = f"{name}/{sample.key}" if sample.key else name
                bad.append(f"{place}: {sample.fault}")
                continue
            columns["shard"].append(number)
            columns["first"].append(len(columns["kind"]))
            for ending, (start, size) in sample.members.items():
                columns["kind"].append(kinds.setdefault(ending, len(kinds)))
                columns["start"].append(start)
                columns["size"].append(size)
            keys += sample.key.encode("utf-8", "surrogateescape")
            key_end.append(len(keys))
    types = {"shard": np.int32, "kind": np.int32}
    table = {name: np.array(each, types.get(name, np.int64)) for name, each in columns.items()}
    table["key_end"] = np.array(key_end, np.int64)
    table["keys"] = np.frombuffer(bytes(keys), np.uint8)
    table["kinds"] = np.array(list(kinds), str)
    table["bad"] = np.array([message.encode("utf-8", "replace").decode() for message in bad], str)
    table["lost"] = np.array(lost)
    return table


def _samples(name: str, file: Path) -> Iterator[Sample]:
    """The samples of one shard without their content; those without an image have a fault."""
    if is_tfrecord(plain_name(name)):
        yield from _frames(name, file)
        return
    with open(file, "rb") as opened:
        size = file.stat().st_size
        kinds = image_kinds(columns_of(name))
        for sample in read_samples(TarWalk(opened, size), load=False):
            if not sample.fault and not any(kind in sample.members for kind in kinds):
                sample.fault = no_image(sample.members, kinds)
            yield sample


def _frames(name: str, file: Path) -> Iterator[Sample]:
    """The examples of a TFRecord file, read through to check them."""
    image = _of_image(columns_of(name))
    name = plain_name(name)
    with open(file, "rb") as opened:
        start = 0
        for number, payload in enumerate(read_frames(opened, name)):
            record: dict | BadSample | bytes = payload
            if isinstance(payload, bytes):
                record = example_record(name, number, payload, image)
            if isinstance(record, BadSample):
                fault = str(record).removeprefix(f"{name}/{number}: ")
                yield Sample(str(number), {}, fault)
            else:
                yield Sample(str(number), {"example": (start, len(payload))})
            start = opened.tell()
