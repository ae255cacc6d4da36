"""Samples of WebDataset tar shards by number: where every member lies, found by reading the headers
alone."""

import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.errors import BadSample, MissingData, UserError
from base.files import atomic_write, digest
from dataset.sources.shards import IMAGE_TYPES, open_file

BLOCK = 1 << 22  # bytes copied at a time


class ShardIndex:
    """The samples of tar shards on this machine, in order.

    Members are read from the files where they lie; nothing is kept open, so that workers may share
    the index.
    """

    def __init__(self, shards: Sequence[Path], title: str = ""):
        self.shards, self.samples = list(shards), []
        for number, shard in enumerate(self.shards):
            key = None
            for name, place, size in tar_members(shard):
                folder, _, file = name.rpartition("/")
                stem, _, ending = file.partition(".")
                if not stem or not ending:
                    continue
                if key != (folder, stem):
                    key = (folder, stem)
                    self.samples.append((number, f"{folder}/{stem}".lstrip("/"), {}))
                self.samples[-1][2][ending.lower()] = (place, size)
        if not self.samples:
            raise UserError(f"{title or self.shards}: the shards hold no samples; fetch them anew")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        shard, key, _ = self.samples[index]
        return f"{self.shards[shard]}/{key}"

    def read(self, index: int, ending: str) -> bytes:
        """Content of one member of a sample. KeyError where it has none of that ending."""
        shard, _, members = self.samples[index]
        place, size = members[ending]
        with self.shards[shard].open("rb") as file:
            file.seek(place)
            return file.read(size)

    def image(self, index: int) -> bytes:
        """The encoded image of a sample. Raises BadSample where it has none."""
        members = self.samples[index][2]
        found = next((kind for kind in IMAGE_TYPES if kind in members), None)
        if found is None:
            raise BadSample(
                f"{self.name(index)}: no image (.{', .'.join(IMAGE_TYPES)}), only {', '.join(members)}"
            )
        return self.read(index, found)


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """`(name, where its content begins, its bytes)` of every file in a tar. UserError where it is
    damaged or cut off.

    Headers are read one by one, as TarFile's own iteration takes a damaged one for the end of the
    archive.
    """
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            member = archive.next()
            while member is not None:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"cut off in {member.name}")
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                archive.members.clear()
                archive.fileobj.seek(archive.offset)
                try:
                    member = tarfile.TarInfo.fromtarfile(archive)
                except tarfile.EOFHeaderError:
                    return
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a whole tar file ({error}); fetch it anew") from None


def address(place: str, name: str) -> str:
    """Where a file of a folder or URL is read; of a data set's page at Hugging Face, its files."""
    place = place.rstrip("/")
    if place.startswith("https://huggingface.co/datasets/"):
        head, tree, branch = place.partition("/tree/")
        place = (
            f"{head}/resolve/{branch}"
            if tree
            else place
            if "/resolve/" in place
            else f"{place}/resolve/main"
        )
    return f"{place}/{name}"


def read_text(place: str, name: str) -> str | None:
    """A small text file of a folder or URL; None where there is none.

    MissingData where a URL cannot be asked, so that no answer is not taken for a missing file.
    """
    try:
        with open_file(address(place, name), {}) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{address(place, name)}: not UTF-8 text ({error})") from None
    except Exception as error:  # every storage service raises its own
        while error.__cause__:  # fsspec calls a host that does not answer a missing file
            error = error.__cause__
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return None
        raise MissingData(
            f"{address(place, name)}: cannot be read ({type(error).__name__}: {error}); check the address and the "
            "network, or fetch the data set and name its folder"
        ) from None


def local_copy(place: str, name: str, cache: Path) -> Path:
    """The file itself where it is local, else its copy in `cache`, fetched at the first use."""
    url = address(place, name)
    if "://" not in url:
        if not Path(url).is_file():
            raise UserError(
                f"{url}: no such file, though nshards.txt counts it; fetch the data set anew"
            )
        return Path(url)
    target = cache / digest(place) / name
    if target.is_file():
        return target
    try:
        with atomic_write(target) as temporary, open_file(url, {}) as source:
            with temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, BLOCK)
    except Exception as error:
        raise MissingData(
            f"{url}: cannot be fetched into {cache} ({type(error).__name__}: {error}); check the network and the disk"
        ) from None
    return target
