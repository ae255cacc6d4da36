"""Writing WebDataset shards: a tar with the members of each sample side by side, and its statistics."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from base.errors import UserError
from base.writing import atomic_write, write_json
from dataset.sources.shard_list import shards_below


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of an archive, without owner and date: equal samples make equal archives."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, {ending: content}) of every sample to a tar, atomically; returns how many. Of an
    earlier shard of this name the statistics go first: they must not pass for those of this one."""
    count = 0
    statistics_file(path).unlink(missing_ok=True)
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as archive:
        for key, members in samples:
            for ending, content in members.items():
                add_member(archive, f"{key}.{ending}", content)
            count += 1
    return count


def shard_path(folder: Path, number: int) -> Path:
    """Where a packer writes shard `number`, the first is 0."""
    return folder / f"{number:05d}.tar"


def check_folder(folder: Path, count: int) -> None:
    """UserError where a folder holds other shards than the `count` to be written into it, such as
    those of an earlier, larger packing: training would read them along."""
    written = {str(shard_path(folder, number)) for number in range(count)}
    others = sorted(set(shards_below(folder)) - written) if folder.is_dir() else []
    if others:
        raise UserError(
            f"{others[0]}: one of {len(others)} shards that this data of {count} shards does not "
            "replace, and that training would read along; remove them, or write to another --target"
        )


def statistics_file(shard: Path) -> Path:
    """Where the statistics of a shard lie, as img2dataset names them."""
    return shard.with_name(f"{shard.name.split('.')[0]}_stats.json")


def write_statistics(shard: Path, successes: int, **more: object) -> None:
    """What readers take the number of a shard's samples from."""
    write_json(statistics_file(shard), {"successes": successes, **more})
