"""Sources for the tests of the data stream; in a module of its own so that worker processes can
import them."""

import io
import json
import tarfile

import torch

from base.distributed import World
from base.errors import BadSample
from dataset.loading.stream import RecordSource, Stream
from dataset.sources.shard_list import find_shards
from dataset.sources.shards import ShardSource


class Build:
    """Turns a record into its number and one random draw of each generator; numbers in `bad` are
    BadSamples."""

    def __init__(self, bad=()):
        self.bad = frozenset(bad)

    def __call__(self, record):
        number = record["number"] if "number" in record else int(record["caption"])
        if number in self.bad:
            raise BadSample(f"sample {number} is bad")
        import random

        import numpy as np

        return {
            "number": number,
            "noise": (float(torch.rand(())), random.random(), float(np.random.rand())),
        }


def collate(samples):
    return {
        "number": torch.tensor([sample["number"] for sample in samples]),
        "noise": torch.tensor([sample["noise"] for sample in samples], dtype=torch.float64),
        "batch_noise": torch.rand(()),
    }


def records(count, bad=(), first=0, name="records"):
    return RecordSource([{"number": first + number} for number in range(count)], Build(bad), name)


def write_shard(path, numbers, stats=True, members=("jpg", "txt", "json")):
    """A tar shard with one sample per number: the bytes of the image are not real ones."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            contents = {
                "jpg": b"image" * 100,
                "txt": str(number).encode(),
                "json": json.dumps({"n": number}).encode(),
            }
            for kind in members:
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(contents[kind])
                tar.addfile(member, io.BytesIO(contents[kind]))
    if stats:
        path.with_name(path.stem + "_stats.json").write_text(
            json.dumps({"successes": len(numbers)})
        )


def write_shards(folder, sizes, first=0):
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        write_shard(folder / f"{number:05d}.tar", range(first, first + size))
        first += size
    return str(folder / f"{{00000..{len(sizes) - 1:05d}}}.tar")


def shards(folder, sizes, bad=(), first=0, **options):
    options = {"group": 2, "shuffle_buffer": 7} | options
    return ShardSource(find_shards(write_shards(folder, sizes, first)), Build(bad), **options)


def stream(*sources, weights=None):
    return Stream(sources, collate, weights)


def world(rank: int, size: int) -> World:
    """A rank of so many on the CPU."""
    return World(rank, size, rank, torch.device("cpu"))
