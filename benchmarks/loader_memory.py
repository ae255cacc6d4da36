"""Memory of loading pre-training annotations with 1 and with 4 worker processes.

    python -m benchmarks.loader_memory                   # 5 million pairs, about 2 minutes, 0.6 GB of disk
    python -m benchmarks.loader_memory --pairs 200000

For each number of workers: the proportional set size (PSS: private memory plus a fair part of what
is shared) of all processes together, what of it is private and written to (no page cache), and what
three more workers cost. Printed only, unless --report names a page.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.gauge import memory_bytes
from benchmarks.runner import Options, Side, take_turns
from benchmarks.table import Column, median, publish, table
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.records import Records
from runtime.config.cli import knob, run_script

COLUMNS = [
    Column("PSS, MB", "pss", scale=2**-20),
    Column("of it private and modified, MB", "private", scale=2**-20),
]


@dataclass
class Config(Options):
    """What to measure."""

    pairs: int = knob(5_000_000, "annotations in the generated file", low=1)
    batches: int = knob(400, "batches of 64 to load before measuring", low=1)
    repeats: int = knob(1, "measurements of each number of workers", low=1)
    report: str = knob("", "page to write the table to; empty = print only")


def write_pairs(path: Path, count: int) -> None:
    """A JSON list as ALBEF's pre-training uses it."""
    with path.open("w") as file:
        for number in range(count):
            things = f"thing {number % 977} beside thing {number % 1013}"
            caption = f"a photo of {things} in a street at noon"
            file.write(", " if number else "[")
            json.dump({"image": f"cc3m/{number:09d}.jpg", "caption": caption}, file)
        file.write("]")


def annotation(record: dict) -> int:
    """A sample without its image: the annotations are what is measured."""
    return len(record["caption"])


def collate(samples: list[int]) -> dict:
    return {"length": torch.tensor(samples)}


def load(options: SimpleNamespace) -> dict:
    """Memory of this process and its `workers` after some batches."""
    folder = Path(options.exchange)
    records = Records(folder / "pairs.json", cache_dir=folder)
    stream = Stream([RecordSource(records, annotation)], collate)
    loader = StreamLoader(stream, batch_size=64, workers=options.workers)
    for _ in range(options.batches):
        next(loader)
    pids = [os.getpid()] + [worker.pid for worker in loader._batches._workers]
    result = {"pss": memory_bytes("Pss", pids), "private": memory_bytes("Private_Dirty", pids)}
    loader.close()
    return result


def main(config: Config) -> None:
    function = "benchmarks.loader_memory:load"
    sides = [Side("1 worker", function, settings={"workers": 1})]
    sides.append(Side("4 workers", function, settings={"workers": 4}))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pairs.json"
        write_pairs(path, config.pairs)
        count = len(Records(path, cache_dir=name))  # leaves the index for both
        print(f"{count:,} pairs, {path.stat().st_size / 2**20:.0f} MB of JSON")
        results = take_turns(config, sides, timed=False, exchange=name)
    one, four = results["1 worker"], results["4 workers"]
    pss = median(four, "pss") - median(one, "pss")
    private = median(four, "private") - median(one, "private")
    body = table(results, COLUMNS)
    body += f"\n\n3 more workers: PSS {pss / 2**20:+.1f} MB, "
    body += f"private and modified {private / 2**20:+.1f} MB."
    publish(config, "loader_memory", [f"Loading {count:,} annotations"], body, results)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
