"""Which shards there are and how many samples each holds: found once a run, by threads."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from base import distributed
from base.caches import cache_folder, digest
from base.errors import UserError
from base.limits import SHARDS
from base.names import SHARD_ENDING, is_hidden, is_hidden_folder
from base.reading import parse_json, read_json
from base.remote import is_forbidden
from base.text import as_list
from base.writing import write_json
from dataset.images.formats import files_below
from dataset.sources.remote import (
    DAMAGED,
    describe,
    file_system,
    is_missing,
    is_remote,
    plain_stream,
    read_file,
    state_of,
    with_retries,
)
from dataset.sources.shard_columns import parse_columns, plain_name, split_columns
from dataset.sources.shard_states import state_of_shards
from dataset.sources.tar import TarWalk, read_samples
from dataset.sources.tfrecord import count_frames, is_tfrecord, read_frames

TAR_ENDINGS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst", ".tar.lz4"),  # refused by name where they are read
)
SHARD_OR_GLOB = re.compile(rf"[*?{{\[]|{SHARD_ENDING}", re.IGNORECASE)
THREADS = 64  # requests to a store at a time
INDEXED = 500  # shards from which on their counts are kept in one file
# what tells in a name of which split a shard is: imagenet2012-train.tfrecord-00000-of-01024
SPLIT = re.compile(
    r"(?<![a-z])(train|training|val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE
)
COUNT_VERSION = 6  # part of the key of cached counts: raise it when the rules of reading change


@dataclass(frozen=True)
class Shards:
    """Shards in order. counts: samples of each, none where only the sum `samples` was given."""

    name: str
    names: tuple[str, ...]
    samples: int
    counts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def expected(self, shard: str) -> int | None:
        """Samples of a shard, where they are known."""
        if not self.counts:
            return None
        if not hasattr(self, "_by_name"):
            object.__setattr__(self, "_by_name", dict(zip(self.names, self.counts, strict=True)))
        return self._by_name[shard]


def find_shards(urls: str | Sequence[str], samples: int | None = None) -> Shards:
    """The shards that paths, folders or URLs (s3://, gs://, http:// through fsspec) with braces
    {00000..00099}, {a,b} and globs name, and their samples.

    samples: how many there are in all; by default the sum of img2dataset's `*_stats.json` beside
    the shards, without which the samples of a shard are counted once: in local files by their
    headers alone, in others by reading through them. Counts are cached by path or URL, size and
    time of change or ETag. Raises UserError.
    """
    patterns = as_list(urls)
    listed = {pattern: list_shards(pattern) for pattern in patterns}
    for pattern, found in listed.items():
        check_one_split(pattern, found)
    names = tuple(shard for pattern in patterns for shard in listed[pattern])
    name = patterns[0]
    if samples:
        return Shards(name, names, samples)
    counts = tuple(cached_counts([plain_name(name) for name in names]))
    if not sum(counts):
        raise UserError(f"{names[0]} and the other shards hold no samples")
    return Shards(name, names, sum(counts), counts)


def shared_shards(urls: str | Sequence[str], samples: int | None = None) -> Shards:
    """`find_shards` by the first process, for all: a collective."""
    return distributed.on_main(partial(find_shards, urls, samples), patient=True)


def list_shards(pattern: str) -> list[str]:
    """Shards named by a path, folder (all its tar files, compressed or not, recursively; without
    any, its TFRecord files) or URL with braces and globs, sorted per glob.

    Columns behind a question mark stay at every name (see `dataset.sources.shard_columns`). Raises
    UserError when a local shard is missing or a pattern matches nothing.
    """
    pattern, query = split_columns(pattern)
    if query:
        parse_columns(query)  # says what is wrong with it
        return [f"{shard}?{query}" for shard in list_shards(pattern)]
    shards = []
    if not is_remote(pattern) and Path(pattern).is_file():
        return [pattern]  # whatever braces and wildcards are in its name
    is_folder = not is_remote(pattern) and Path(pattern).is_dir()  # which may have them, too
    for url in [pattern] if is_folder else expand_braces(pattern):
        matches = _remote_matches(url) if is_remote(url) else _local_matches(url)
        if not matches and is_folder:
            raise UserError(
                f"{url}: no shards (.tar, .tfrecord) in it; a table, or a folder of tables or images, is "
                "given as metadata or train_file"
            )
        if not matches:
            raise UserError(f"{url}: no such shard; check the path and its braces and wildcards")
        shards += matches
    return shards


def check_one_split(pattern: str, shards: Iterable[str]) -> None:
    """UserError where `pattern` is a folder and the names of its shards say that they are of several
    splits, which would be read as one."""
    folder = plain_name(pattern)
    if not (Path(folder).is_dir() or (is_remote(folder) and not SHARD_OR_GLOB.search(folder))):
        return  # whoever names shards or a pattern has chosen
    splits: dict[str, str] = {}  # -> how to name it
    for shard in map(plain_name, shards):
        if found := SPLIT.search(shard, min(len(folder), len(shard))):
            end = shard.find("/", found.end())
            named = shard[:end] if end >= 0 else f"'{shard[: found.end()]}*'"
            splits.setdefault(found[1].lower(), named)
    if len(splits) > 1:
        raise UserError(
            f"{folder}: shards of several splits, {', '.join(splits)}; name one: "
            f"{next(iter(splits.values()))}"
        )


def names_shards(pattern: str) -> bool:
    """Whether a local pattern with braces or wildcards matches a shard, or a path's ending says so."""
    if re.search(SHARD_ENDING, pattern, re.IGNORECASE):
        return True
    wild = re.search(r"[*?\[{]", pattern) is not None
    return wild and any(is_shard(f) for name in expand_braces(pattern) for f in glob.iglob(name))


def _local_matches(url: str) -> list[str]:
    if Path(url).is_dir():
        return shards_below(url)
    matches = sorted(_visible(glob.glob(url, recursive=True), url))
    if "**" in url:  # follows a link to a folder above as often as the system allows
        by_length = sorted(matches, key=len, reverse=True)
        matches = sorted({os.path.realpath(name): name for name in by_length}.values())
    return matches if url in matches else _shards_among(matches) or matches


def shards_below(folder: str | Path) -> list[str]:
    """The shards that training reads of a local folder, sorted."""
    return _shards_among(str(path) for path in files_below(folder))


def _remote_matches(url: str) -> list[str]:
    is_glob = re.search(r"[*?\[]", url.partition("?")[0] if "://" in url[:8] else url)
    if not is_glob and is_shard(url.partition("?")[0]):
        return [url]
    files, path = file_system(url)
    try:
        if re.search(r"[*?\[]", path):
            found = with_retries(lambda: files.glob(path))
            return sorted(files.unstrip_protocol(each) for each in _visible(found, path))
        found = _visible(with_retries(lambda: files.find(path)), f"{path}/")
    except Exception as error:  # every storage service raises its own
        if is_missing(error):
            return []
        raise UserError(f"{url}: cannot be listed ({describe(error)})") from None
    return _shards_among(files.unstrip_protocol(each) for each in found)


def _visible(names: Iterable[str], pattern: str) -> list[str]:
    """The names without those that are hidden, or lie in a hidden folder behind the first wildcard
    of the pattern that they match."""
    start = len(re.split(r"[*?\[]", pattern)[0].rpartition("/")[0])
    return [
        name
        for name in names
        if name == pattern
        or not (is_hidden(name) or is_hidden_folder(name[start:].rpartition("/")[0]))
    ]


def is_tar(name: str) -> bool:
    """Whether a path or URL names a tar shard, by its ending; hidden files are none."""
    return name.lower().endswith(TAR_ENDINGS) and not is_hidden(name)


def is_shard(name: str) -> bool:
    """Whether a path or URL names a tar or TFRecord shard."""
    return is_tar(name) or is_tfrecord(name)


def _shards_among(names) -> list[str]:
    names = sorted(names)
    return [name for name in names if is_tar(name)] or [name for name in names if is_tfrecord(name)]


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with {a,b}, {000..012}, {9..0} and {0..8..2} (not nested), in order, as
    a shell expands it. UserError for more than SHARDS."""
    names = [""]
    place = 0
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        options = _options(match[1], pattern)
        if len(names) * len(options) > SHARDS:
            raise UserError(f"{pattern}: names more than {SHARDS:,} shards")
        before = pattern[place : match.start()]
        names = [name + before + option for name in names for option in options]
        place = match.end()
    return [name + pattern[place:] for name in names]


def _options(braced: str, pattern: str) -> list[str]:
    """What stands between braces, one after the other."""
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?", braced)
    if not numbers:
        return braced.split(",")
    first = int(numbers[1])
    last = int(numbers[2])
    step = int(numbers[3] or 1) or 1
    if abs(last - first) // step >= SHARDS:
        raise UserError(f"{pattern}: names more than {SHARDS:,} shards")
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups()[:2])
    width = max(len(numbers[1]), len(numbers[2])) if padded else 0
    upwards = first <= last
    counted = range(first, last + 1, step) if upwards else range(first, last - 1, -step)
    return [str(number).zfill(width) for number in counted]


# ---- samples of each shard
def cached_counts(shards: Sequence[str]) -> list[int]:
    """`samples_of`; of very many shards from one file in the cache, which holds what the shards and
    their statistics were when it was written."""
    if len(shards) < INDEXED:
        return samples_of(shards)
    statistics = [name for shard in shards for name in statistics_names(shard)]
    state = state_of_shards([*shards, *statistics])
    if state is None:
        return samples_of(shards)
    cached = cache_folder() / "counts" / f"all-{digest(COUNT_VERSION, list(shards))}.json"
    counts = _all_from_cache(cached, state, len(shards))
    if counts is None:
        counts = samples_of(shards)
        try:
            write_json(cached, {"state": state, "counts": counts})
        except UserError as error:
            print(f"{error}; the next start asks for every shard again", file=sys.stderr)
    return counts


def _all_from_cache(path: Path, state: str, shards: int) -> list[int] | None:
    """The counts that a cached file holds; None where it is missing, damaged, or of other files."""
    try:
        content = read_json(path, dict)
    except UserError:
        return None
    counts = content.get("counts")
    if content.get("state") != state or not isinstance(counts, list) or len(counts) != shards:
        return None
    return counts if all(type(count) is int and count >= 0 for count in counts) else None


def samples_of(shards: Sequence[str]) -> list[int]:
    """Samples of every shard, asked for by threads, with a progress bar where it takes long."""
    from tqdm import tqdm

    # a thread takes a few at a time: handing them over costs more than a small file's statistics
    size = max(1, len(shards) // (16 * THREADS))
    blocks = [shards[start : start + size] for start in range(0, len(shards), size)]
    with ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        found = pool.map(lambda block: [count_of(shard) for shard in block], blocks)
        counts = chain.from_iterable(found)
        bar = tqdm(counts, "counting samples", len(shards), unit=" shards", delay=2, disable=None)
        try:
            return list(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def count_of(shard: str) -> int:
    """Samples of one shard: as its statistics say, else as the cache says, else counted."""
    try:
        counted = stated_samples(shard)
        if counted is not None:
            return counted
        key = digest(COUNT_VERSION, state_of(shard))
        cached = cache_folder() / "counts" / f"{key}.json"
        count = _from_cache(cached)
        if count is None:
            count = _counted(shard)
            write_json(cached, {"shard": shard, "samples": count})
        return count
    except UserError:
        raise
    except Exception as error:  # every storage service raises its own
        raise UserError(
            f"{shard}: its samples cannot be counted ({describe(error)}); check the "
            "path or address, or give the number of samples of all shards as samples"
        ) from None


def statistics_names(shard: str) -> list[str]:
    """Where the statistics of a shard may lie: 00000_stats.json of 00000.tar and 00000.tar.gz;
    earlier versions of extract_nouns.py wrote 00000.tar_stats.json of the latter."""
    base = re.sub(rf"{SHARD_ENDING}(\.\w+)?$", "", shard, flags=re.IGNORECASE)
    return list(
        dict.fromkeys([f"{base}_stats.json", f"{re.sub(r'[.][^./]*$', '', shard)}_stats.json"])
    )


def stated_samples(shard: str) -> int | None:
    """Samples of a shard as its statistics say; None where there are none."""
    for name in statistics_names(shard):
        try:
            successes = parse_json(read_file(name), name, dict)["successes"]
        except (ValueError, KeyError):
            continue  # another program's, or damaged: the samples are counted
        except Exception as error:
            if is_missing(error) or is_forbidden(error):
                continue  # whether the shard itself may be read shows when it is counted
            raise
        if type(successes) is int and successes >= 0:
            return successes
    return None


def _from_cache(path: Path) -> int | None:
    try:
        count = read_json(path, dict)["samples"]
    except (UserError, KeyError):
        return None
    return count if type(count) is int else None


def _counted(shard: str) -> int:
    """Samples of a shard; what was lost at a damage counts as one, which its reader reports. Raises
    what its store raises: another time it may have more."""
    with plain_stream(shard) as (file, size):
        if is_tfrecord(shard) and size is not None and not is_remote(shard):
            return count_frames(shard)
        watched = _Watched(file)
        if is_tfrecord(shard):
            found = read_frames(watched, shard)
        else:
            found = read_samples(TarWalk(watched, size), load=False)
        count = sum(1 for _ in found)
        if watched.failure:
            raise watched.failure
        return count


class _Watched:
    """An open file that keeps what its storage, not its decompressor, has raised."""

    def __init__(self, file):
        self.file, self.seek = file, file.seek
        self.failure: Exception | None = None

    def read(self, count: int) -> bytes:
        try:
            return self.file.read(count)
        except DAMAGED:
            raise
        except Exception as error:  # every storage service raises its own
            self.failure = error
            raise
