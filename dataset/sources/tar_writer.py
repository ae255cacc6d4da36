"""Writing WebDataset shards: a tar with the members of each sample side by side, and its statistics."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from base.files import atomic_write, write_json


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of an archive, without owner and date: equal samples make equal archives."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, {ending: content}) of every sample to a tar, atomically; returns how many."""
    count = 0
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as archive:
        for key, members in samples:
            for ending, content in members.items():
                add_member(archive, f"{key}.{ending}", content)
            count += 1
    return count


def statistics_file(shard: Path) -> Path:
    """Where the statistics of a shard lie, as img2dataset names them."""
    return shard.with_name(f"{shard.name.split('.')[0]}_stats.json")


def write_statistics(shard: Path, successes: int, **more: object) -> None:
    """What readers take the number of a shard's samples from."""
    write_json(statistics_file(shard), {"successes": successes, **more})
