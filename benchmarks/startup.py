"""Start-up, shuffling, resume and memory of training on 700 million samples in 70,000 shards.

    python -m benchmarks.startup                          # 4 ranks; 30 MB of disk, 140,000 files
    python -m benchmarks.startup --shards 1000 --ranks 2

The data side of main.py, joined over gloo, on a folder of shards with img2dataset's statistics: hard
links to one shard of 10,000 samples. `found`: until all ranks know the shards and their samples;
`first batch`: from there, worker processes included; `shuffled`: the order of an epoch of all loader
workers of a rank; `half-way`: until the first batch of a run that resumes in the middle of an epoch,
and whether it is that of the run which was not interrupted. Memory is the peak of the process, and
the private memory of one of its workers. Printed only, unless --report names a page.
"""

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

import main as training
from base import distributed
from base.errors import UserError
from base.processes import linux_bytes
from benchmarks.child import measure_once, peak_bytes
from benchmarks.runner import OURS, Options, take_turns
from benchmarks.table import Column, publish
from dataset.sources.tar_writer import statistics_file, write_shard, write_statistics
from dataset.text.bpe import ClipTokenizer
from runtime.config.cli import knob, parse, restated, run_script

LINKS = 60_000  # names that a file gets; file systems allow 65,000 or so
SEED = 1
COLUMNS = [
    Column("found, s", "found"),
    Column("CPU s", "found_cpu"),
    Column("first batch, s", "first"),
    Column("CPU s", "first_cpu"),
    Column("shuffled, s", "shuffled"),
    Column("CPU s", "shuffled_cpu"),
    Column("half-way, s", "half"),
    Column("CPU s", "half_cpu"),
    Column("MB to find", "memory_found", "{:.0f}", 1e-6),
    Column("MB at most", "peak_bytes", "{:.0f}", 1e-6),
    Column("MB of a worker", "memory_worker", "{:.0f}", 1e-6),
]


@dataclass
class Config(Options):
    shards: int = knob(70_000, "shards", low=8)
    samples: int = knob(10_000, "samples of a shard", low=64)
    ranks: int = knob(4, "processes of the training", low=1)
    workers: int = knob(2, "loader workers of each", low=1)
    batch: int = knob(32, "samples of a batch on each rank", low=1)
    folder: Path | None = knob(None, "folder of shards of an earlier run, or to make them in")
    device: str = knob("cpu", "only the CPU is measured", choices=("cpu",))
    threads: int = restated(Options, "threads", 1, help="CPU threads of each rank")
    repeats: int = restated(Options, "repeats", 1)
    report: str = restated(Options, "report", "")


def make_shards(folder: Path, config: Config) -> None:
    """Shards of one content under many names, which share it."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 0)).save(file, "JPEG")
    sample = {"jpg": file.getvalue(), "txt": b"a photo of a digit"}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(config.shards):
        shard = folder / f"{number:05d}.tar"
        if number % LINKS == 0:
            first = shard
            write_shard(first, ((f"{n:09d}", sample) for n in range(config.samples)))
            write_statistics(first, config.samples)
        else:
            os.link(first, shard)
            os.link(statistics_file(first), statistics_file(shard))


def start(options: SimpleNamespace) -> dict | None:
    """What each rank of a training measures from its start: `ranks`, on the first rank."""
    world = distributed.init("cpu")
    flags = ["--shards", str(options.folder), "--dataset", "wds", "--model", "CLIP_R50_CLIP"]
    flags += ["--batch_size", str(options.batch), "--workers", str(options.workers)]
    config = parse(training.Config, [*flags, "--seed", str(SEED), "--device", "cpu"])
    tokenizer = ClipTokenizer()
    before = peak_bytes("cpu")
    figures = {}

    def timed(name: str, function: Callable) -> object:
        result, seconds = measure_once(function)
        figures.update({name: seconds["seconds"], f"{name}_cpu": seconds["cpu_seconds"]})
        return result

    def load(state: dict | None = None):
        return training.training_data(config, tokenizer, world, state)

    loader = timed("found", load)
    figures["memory_found"] = peak_bytes("cpu") - before
    timed("first", loader.__next__)
    files = [f"/proc/{worker.pid}/smaps_rollup" for worker in loader._batches._workers]
    figures["memory_worker"] = max(linux_bytes(file, "Private_Dirty") for file in files)
    source = loader.stream.sources[0]
    slots = world.size * options.workers
    own = range(world.rank * options.workers, (world.rank + 1) * options.workers)
    timed("shuffled", lambda: [source._groups(SEED, 1, slot, slots) for slot in own])
    straight = load(loader._start(len(loader.stream) // 2))
    loader.close()
    next(straight)
    state = straight.state_dict()
    expected = next(straight)
    straight.close()
    resumed = load(state)
    found = timed("half", resumed.__next__)
    resumed.close()
    if not all(torch.equal(value, found[name]) for name, value in expected.items()):
        raise UserError("a resumed run reads other samples than the one that went on")
    figures["peak_bytes"] = peak_bytes("cpu")
    ranks = distributed.gather_objects(figures)
    return {"ranks": ranks} if world.is_main else None


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary) / "shards"
        if not list(folder.glob("*.tar")):
            make_shards(folder, config)
        sides = {OURS: "benchmarks.startup:start"}
        runs = take_turns(config, sides, processes=config.ranks, folder=folder.resolve())[OURS]
    results = {}
    for number in range(config.ranks):
        results[f"rank {number}"] = [{**run, **run["ranks"][number]} for run in runs]
    title = [f"Start-up on {config.shards * config.samples:,} samples in {config.shards:,} shards"]
    publish(config, "startup", [*title, f"{config.ranks} ranks"], results, COLUMNS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
