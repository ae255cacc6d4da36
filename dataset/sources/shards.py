"""WebDataset tar and TFRecord shards, local or remote, as an endless deterministic source that
resumes exactly.

Layouts (img2dataset's): tar members KEY.jpg (or .jpeg .png .webp), KEY.txt, KEY.json and so on,
those of one key together; or TFRecord examples with the features jpg (or jpeg, png, webp, image),
txt, key and so on.
"""

import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from base.errors import BadSample, UserError
from base.files import parse_json
from dataset.loading.randomness import mix, permuted
from dataset.sources.tfrecord import count_frames, is_tfrecord, parse_example, read_frames

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
Piece = tuple[str, int, int]  # a shard, and which of how many strides of its samples to take


class ShardSource:
    """Samples of tar or TFRecord shards in shuffled order.

    urls: paths, folders or URLs (s3://, gs://, http:// through fsspec), with braces {00000..00099},
    {a,b} and globs.
    build: makes a sample of a record, a dict with `image` (encoded bytes), `caption`, `key`
    ("shard/key") and the remaining members as bytes under their extension, or the remaining
    features as lists under their name; raises BadSample to drop it.
    samples: how many there are; by default summed from the `*_stats.json` that img2dataset writes
    beside the shards, without which local TFRecord files are counted.
    group: shards a worker reads side by side. shuffle_buffer: encoded samples it permutes at a
    time.

    A data epoch is a permutation of the shards, dealt out to the workers of all ranks. With fewer
    shards than workers several workers read the same shard, each keeping its stride of the samples.
    A position is [epoch, group, records taken from the group]: resuming re-reads at most one group.
    A damaged shard counts as one bad sample, and what lies behind the damage is left out; so does a
    TFRecord example of a wrong checksum, behind which reading goes on.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        build,
        samples: int | None = None,
        name: str | None = None,
        group: int = 4,
        shuffle_buffer: int = 1000,
        storage_options: dict | None = None,
    ):
        patterns = [urls] if isinstance(urls, str) else list(urls)
        self.storage_options = storage_options or {}
        self.shards = [
            shard for pattern in patterns for shard in list_shards(pattern, self.storage_options)
        ]
        self.name = name or patterns[0]
        self.samples = samples or count_samples(self.shards, self.storage_options)
        self.build, self.group, self.shuffle_buffer = build, group, shuffle_buffer

    def __len__(self) -> int:
        return self.samples

    def start(self, taken: int, slot: int, slots: int) -> list[int]:
        """Position of worker `slot` of `slots` once all have taken about `taken` records
        together."""
        epoch, rest = divmod(taken, self.samples)
        groups = len(self._groups(0, epoch, slot, slots))
        return [epoch, rest * groups // self.samples, 0]

    def read(
        self, seed: int, slot: int, slots: int, position: list[int]
    ) -> Iterator[tuple[int, object, list[int]]]:
        """Endless `(sample seed, record or BadSample, position after it)` for worker `slot` of
        `slots`."""
        epoch, first, taken = position
        while True:
            groups = self._groups(seed, epoch, slot, slots)
            for number in range(first, len(groups)):
                records = self._shuffled(groups[number], mix(seed, epoch, slot, slots, number))
                for count, record in enumerate(islice(records, taken, None), taken + 1):
                    key = b"" if isinstance(record, BadSample) else record["key"].encode()
                    yield mix(seed, epoch, zlib.crc32(key)), record, [epoch, number, count]
                taken = 0
            epoch, first = epoch + 1, 0

    def _groups(self, seed: int, epoch: int, slot: int, slots: int) -> list[list[Piece]]:
        """What `slot` reads in one epoch, in groups read side by side.

        Pieces are dealt along the endless sequence of epochs: what a division leaves over goes
        around all slots.
        """
        strides = -(-slots // len(self.shards))  # 1 unless there are fewer shards than workers
        pieces = strides * len(self.shards)
        first = (slot - epoch * pieces) % slots
        drawn = [permuted(place, pieces, mix(seed, epoch)) for place in range(first, pieces, slots)]
        mine = [(self.shards[piece // strides], piece % strides, strides) for piece in drawn]
        return [mine[start : start + self.group] for start in range(0, len(mine), self.group)]

    def _shuffled(self, group: list[Piece], seed: int) -> Iterator[object]:
        records = self._interleaved(group)
        shuffler = random.Random(seed)
        while block := list(islice(records, self.shuffle_buffer)):
            shuffler.shuffle(block)
            yield from block

    def _interleaved(self, group: list[Piece]) -> Iterator[object]:
        """One record of each shard in turn, until all are exhausted."""
        readers = [
            islice(read_shard(shard, self.storage_options), part, None, of)
            for shard, part, of in group
        ]
        while readers:
            for reader in list(readers):
                record = next(reader, None)
                if record is None:
                    readers.remove(reader)
                else:
                    yield record


def read_shard(shard: str, storage_options: dict) -> Iterator[dict | BadSample]:
    """The records of one shard in order; what is wrong with the shard or a record comes as a
    BadSample in its place."""
    return (read_examples if is_tfrecord(shard) else read_members)(shard, storage_options)


def read_examples(shard: str, storage_options: dict) -> Iterator[dict | BadSample]:
    """`read_shard` of a TFRecord file."""
    number = -1
    try:
        with open_file(shard, storage_options) as file:
            for number, payload in enumerate(read_frames(file, shard)):
                yield (
                    payload
                    if isinstance(payload, BadSample)
                    else _example_record(shard, number, payload)
                )
    except Exception as error:  # every storage service raises its own
        yield BadSample(
            f"{shard}: {type(error).__name__}: {error}; what follows in this shard is lost"
        )
        return
    if number < 0:
        yield BadSample(f"{shard}: holds no samples")


def _example_record(shard: str, number: int, payload: bytes) -> dict | BadSample:
    place = f"{shard}/{number}"
    try:
        features = parse_example(payload)
    except BadSample as error:
        return BadSample(f"{place}: {error}")
    image = next(
        (features.pop(kind) for kind in ("image", *IMAGE_TYPES) if features.get(kind)), None
    )
    if image is None or not isinstance(image[0], bytes):
        return BadSample(
            f"{place}: no image ({', '.join(IMAGE_TYPES)} or image), only {', '.join(features)}"
        )
    record = features | {"key": place, "image": image[0]}
    if texts := [text for text in features.get("txt", []) if isinstance(text, bytes)]:
        record["caption"] = texts[0].decode("utf-8", "replace")
    return record


def read_members(shard: str, storage_options: dict) -> Iterator[dict | BadSample]:
    """`read_shard` of a tar file."""
    key, members, found = None, {}, False
    try:
        for name, data in read_tar(shard, storage_options):
            folder, _, file = name.rpartition("/")
            stem, _, extension = file.partition(".")
            if not stem or not extension:
                continue
            if key not in (None, f"{folder}/{stem}"):
                yield _record(shard, key, members)
                members = {}
            key, found = f"{folder}/{stem}", True
            members[extension.lower()] = data
    except (
        Exception
    ) as error:  # tarfile, the decompressors and every storage service raise their own
        yield BadSample(
            f"{shard}: {type(error).__name__}: {error}; what follows in this shard is lost"
        )
        return
    if found:
        yield _record(shard, key, members)
    else:
        yield BadSample(f"{shard}: holds no samples")


def _record(shard: str, key: str, members: dict[str, bytes]) -> dict | BadSample:
    key = f"{shard}/{key.lstrip('/')}"
    image = next((members.pop(kind) for kind in IMAGE_TYPES if kind in members), None)
    if image is None:
        return BadSample(f"{key}: no image (.{', .'.join(IMAGE_TYPES)}), only {', '.join(members)}")
    record = {"key": key, "image": image, **members}
    if "txt" in members:
        record["caption"] = members["txt"].decode("utf-8", "replace")
    return record


def read_tar(shard: str, storage_options: dict) -> Iterator[tuple[str, bytes]]:
    """`(member name, content)` of a tar file as a forward-only stream; raises when it is damaged or
    cut off.

    TarFile's own iteration takes any damaged header for the end of the archive, hence the walk by
    hand.
    """
    with (
        open_file(shard, storage_options) as file,
        tarfile.open(fileobj=file, mode="r|*") as archive,
    ):
        member = archive.next()
        while member is not None:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()
            archive.members.clear()  # it would keep all headers otherwise
            archive.fileobj.seek(archive.offset)
            try:
                member = tarfile.TarInfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:
                return


def open_file(url: str, storage_options: dict):
    """A local or remote file opened for reading bytes."""
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    return fsspec.open(url, "rb", **storage_options)


def list_shards(pattern: str, storage_options: dict) -> list[str]:
    """Shards named by a path, folder (all its .tar files, recursively; without any, its TFRecord
    files) or URL with braces and globs, sorted per glob.

    Raises UserError when a local shard is missing or a pattern matches nothing.
    """
    shards = []
    for url in expand_braces(pattern):
        if "://" in url and not re.search(r"[*?\[]", url):
            matches = [url]
        elif "://" in url:
            import fsspec

            files, _, paths = fsspec.get_fs_token_paths(url, storage_options=storage_options)
            matches = sorted(files.unstrip_protocol(path) for path in paths)
        elif Path(url).is_dir():
            folder = Path(url)
            matches = sorted(map(str, folder.rglob("*.tar"))) or sorted(
                map(str, folder.rglob("*.tfrecord*"))
            )
        else:
            import glob

            matches = sorted(glob.glob(url, recursive=True))
        if not matches:
            raise UserError(f"{url}: no such shard; check the path and its braces and wildcards")
        shards += matches
    return shards


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with {a,b} and {000..012} (not nested), in order, as a shell expands
    it."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in expand_braces(before + option + after)]


def count_samples(shards: Sequence[str], storage_options: dict) -> int:
    """Sum of the successes in img2dataset's `*_stats.json` beside every shard; UserError when one
    is missing.

    A local TFRecord file without one is counted.
    """
    total = 0
    for shard in shards:
        stats = re.sub(r"\.(tar|tfrecord)(\.\w+)?$", "", shard) + "_stats.json"
        if is_tfrecord(shard) and "://" not in shard and not Path(stats).exists():
            total += _count_examples(shard)
            continue
        try:
            with open_file(stats, storage_options) as file:
                total += int(parse_json(file.read(), stats, dict)["successes"])
        except Exception as error:  # a missing file, or whatever a storage service makes of it
            raise UserError(
                f"{shard}: how many samples? {stats} is not readable ({error or type(error).__name__}); "
                "give the number of samples in all shards in the configuration, or keep img2dataset's *_stats.json"
            ) from None
    if not total:
        raise UserError(
            f"{shards[0]} and the other shards hold no samples according to their *_stats.json"
        )
    return total


def _count_examples(shard: str) -> int:
    try:
        return count_frames(shard)
    except OSError as error:
        raise UserError(
            f"{shard}: {error.strerror or error}; check the path of the shard"
        ) from None
