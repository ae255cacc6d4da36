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

from benchmarks.runner import Options, Side, take_turns
from benchmarks.table import Column, median, publish, table
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.records import Records
from runtime.config.cli import knob, run_script


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
        file.write("[")
        for number in range(count):
            things = f"thing {number % 977} beside thing {number % 1013}"
            pair = {
                "image": f"cc3m/{number:09d}.jpg",
                "caption": f"a photo of {things} in a street at noon",
            }
            file.write((", " if number else "") + json.dumps(pair))
        file.write("]")


def annotation(record: dict) -> dict:
    """A sample without its image: the annotations are what is measured."""
    return {"length": len(record["caption"])}


def collate(samples: list[dict]) -> dict:
    return {"length": torch.tensor([sample["length"] for sample in samples])}


def memory(pids: list[int]) -> dict[str, float]:
    """PSS and private modified memory of processes together, in MB."""
    found = {"Pss": 0, "Private_Dirty": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] += int(value.split()[0])
    return {"pss": found["Pss"] / 1024, "private": found["Private_Dirty"] / 1024}


def load(options: SimpleNamespace) -> dict:
    """Memory of this process and its `workers` after some batches."""
    folder = Path(options.exchange)
    records = Records(folder / "pairs.json", cache_dir=folder)
    stream = Stream([RecordSource(records, annotation)], collate)
    loader = StreamLoader(stream, batch_size=64, workers=options.workers)
    for _ in range(options.batches):
        next(loader)
    pids = [os.getpid()] + [worker.pid for worker in loader._batches._workers]
    result = memory(pids)
    loader.close()
    return result


def main(config: Config) -> None:
    sides = [
        Side("1 worker", "benchmarks.loader_memory:load", settings={"workers": 1}),
        Side("4 workers", "benchmarks.loader_memory:load", settings={"workers": 4}),
    ]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pairs.json"
        write_pairs(path, config.pairs)
        count = len(Records(path, cache_dir=name))  # leaves the index for both
        print(f"{count:,} pairs, {path.stat().st_size / 2**20:.0f} MB of JSON")
        results = take_turns(config, sides, exchange=name)
    one, four = results["1 worker"], results["4 workers"]
    pss = median(four, "pss") - median(one, "pss")
    private = median(four, "private") - median(one, "private")
    columns = [Column("PSS, MB", "pss"), Column("of it private and modified, MB", "private")]
    body = table(results, columns)
    body += f"\n\n3 more workers: PSS {pss:+.1f} MB, private and modified {private:+.1f} MB."
    publish(config, "loader_memory", [f"Loading {count:,} annotations"], body, load=None)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
