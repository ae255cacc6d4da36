"""Start-up, shuffling, resume and memory of training on 700 million samples in 70,000 shards.

    python -m benchmarks.startup                          # 4 ranks; 30 MB of disk, 140,000 files
    python -m benchmarks.startup --shards 1000 --ranks 2

The data side of main.py, joined over gloo, on a folder of shards with img2dataset's statistics: hard
links to one shard of 10,000 samples. `found`: until all ranks know the shards and their samples;
`first batch`: from there, worker processes included; `shuffled`: the order of an epoch of all loader
workers of a rank; `half-way`: until the first batch of a run that resumes in the middle of an epoch,
and whether it is that of the run which was not interrupted. Memory is the peak of the process, and
the private memory of one of its workers. Printed only.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import main as training
from base import distributed
from base.errors import UserError
from benchmarks.gauge import measure_once, peak_bytes
from dataset.sources.tar_writer import statistics_file, write_shard, write_statistics
from dataset.text.bpe import ClipTokenizer
from runtime.config.cli import knob, parse, run_script

LINKS = 60_000  # names that a file gets; file systems allow 65,000 or so
SEED = 1


@dataclass
class Config:
    """What to measure."""

    shards: int = knob(70_000, "shards", low=8)
    samples: int = knob(10_000, "samples of a shard", low=64)
    ranks: int = knob(4, "processes of the training", low=1)
    workers: int = knob(2, "loader workers of each", low=1)
    batch: int = knob(32, "samples of a batch on each rank", low=1)
    folder: Path | None = knob(None, "folder of shards of an earlier run, or to make them in")


def make_shards(folder: Path, config: Config) -> None:
    """Shards of one content under many names, which share it."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 0)).save(file, "JPEG")
    sample = {"jpg": file.getvalue(), "txt": b"a photo of a digit"}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(config.shards):
        shard = folder / f"{number:05d}.tar"
        if number % LINKS == 0:
            write_shard(shard, ((f"{n:09d}", sample) for n in range(config.samples)))
            write_statistics(shard, config.samples)
            first = shard
        else:
            os.link(first, shard)
            os.link(statistics_file(first), statistics_file(shard))


def rank_of_training(config: Config) -> None:
    """What one rank measures; rank 0 prints the table of all."""
    world = distributed.init("cpu")
    flags = ["--shards", str(config.folder), "--dataset", "wds", "--model", "CLIP_R50_CLIP"]
    flags += ["--batch_size", str(config.batch), "--workers", str(config.workers)]
    options = parse(training.Config, [*flags, "--seed", str(SEED), "--device", "cpu"])
    tokenizer = ClipTokenizer()
    before = peak_bytes("cpu")

    def load(state: dict | None = None):
        return training.training_data(options, tokenizer, world, state)

    loader, found = measure_once(load)
    after_finding = peak_bytes("cpu") - before
    _, first = measure_once(lambda: next(loader))
    workers = [private_bytes(worker.pid) for worker in loader._batches._workers]
    source = loader.stream.sources[0]
    slots = world.size * config.workers
    own = range(world.rank * config.workers, (world.rank + 1) * config.workers)
    _, shuffled = measure_once(lambda: [source._groups(SEED, 1, slot, slots) for slot in own])
    half = middle_of_epoch(loader, load)
    loader.close()
    figures = {
        "rank": world.rank,
        "found": found,
        "first batch": first,
        "shuffled": shuffled,
        "half-way": half,
        "MB to find": after_finding / 1e6,
        "MB at most": peak_bytes("cpu") / 1e6,
        "MB of a worker": max(workers) / 1e6,
    }
    rows = distributed.gather_objects(figures)
    if world.is_main:
        print(json.dumps(rows))


def middle_of_epoch(loader, load: Callable) -> dict[str, float]:
    """Seconds to the first batch of a loader that resumes half-way through an epoch. UserError
    where it is another than that of the loader which went on."""
    state = loader._start(len(loader.stream) // 2)
    straight = load(state)
    next(straight)
    state = straight.state_dict()
    expected = next(straight)
    straight.close()
    resumed = load(state)
    found, seconds = measure_once(lambda: next(resumed))
    resumed.close()
    if not all(torch.equal(value, found[name]) for name, value in expected.items()):
        raise UserError("a resumed run reads other samples than the one that went on")
    return seconds


def private_bytes(pid: int) -> int:
    """Memory that a process has written to and shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def show(rows: list[dict], config: Config) -> None:
    """The figures as a table, a line a rank."""
    samples = config.shards * config.samples
    print(f"\n{config.shards:,} shards, {samples:,} samples; {config.ranks} ranks")
    stages = ("found", "first batch", "shuffled", "half-way")
    memory = ("MB to find", "MB at most", "MB of a worker")
    print("| rank |", " | ".join([f"{stage}, s (CPU s)" for stage in stages] + [*memory]), "|")
    print("|---" * (1 + len(stages) + len(memory)) + "|")
    for row in rows:
        cells = [f"{row[each]['seconds']:.2f} ({row[each]['cpu_seconds']:.2f})" for each in stages]
        cells += [f"{row[each]:.0f}" for each in memory]
        print("|", " | ".join([str(row["rank"]), *cells]), "|")


def main(config: Config) -> None:
    if "RANK" in os.environ:
        rank_of_training(config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary) / "shards"
        if not list(folder.glob("*.tar")):
            begin = time.perf_counter()
            make_shards(folder, config)
            print(f"{folder}: made in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc_per_node={config.ranks}", "-m", "benchmarks.startup"]
        for name in ("shards", "samples", "ranks", "workers", "batch"):
            command += [f"--{name}", str(getattr(config, name))]
        command += ["--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError("a rank failed; its message is above")
    show(json.loads(done.stdout.strip().splitlines()[-1]), config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
