"""How long training waits for a checkpoint.

    python -m benchmarks.checkpoint                       # 1 GiB of weights and optimizer state
    python -m benchmarks.checkpoint --gigabytes 8 --folder /scratch

Four ways to save one process's state: sharded or as one file, beside the training or while it waits.
The stall is the time until `save` returns, of every save but the first, which also makes the buffers
(and has a column of its own); written is the time until the checkpoint is verified, synced and in
its place. Printed only, unless --report names a page.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from base.distributed import alone
from benchmarks.child import now, peak_bytes
from benchmarks.runner import OURS, Options, take_turns
from benchmarks.table import MEMORY, Column, publish
from runtime.checkpoint import CheckpointFolder
from runtime.config.cli import knob, restated, run_script
from runtime.saving import Saver

MATRICES = 32  # that the parameters are spread over
WAYS = {  # of saving: sharded, beside the training
    OURS: (True, True),
    "one file, beside": (False, True),
    "sharded, waiting": (True, False),
    "one file, waiting": (False, False),
}
COLUMNS = [
    Column("stall, s", "seconds", "{:.3f}"),
    Column("of it processor, s", "cpu_seconds", "{:.3f}"),
    Column("first stall, s", "first", "{:.3f}"),
    Column("written after, s", "written"),
    MEMORY,
    Column("ours stalls less by", "seconds", "{:.1f} x", ratio="lower"),
]


@dataclass
class Config(Options):
    gigabytes: float = knob(1.0, "GiB of weights and two moments of Adam", low=0.01)
    saves: int = knob(3, "checkpoints of a measurement; the first makes the buffers", low=2)
    folder: Path = knob(Path(tempfile.gettempdir()), "where the checkpoints are written")
    report: str = restated(Options, "report", "")


def save(options: SimpleNamespace) -> dict:
    """Medians of the seconds that saving parameters and their moments takes, by the clock and of
    the processor, and until all is written."""
    side = int((options.gigabytes * 2**30 / (3 * 4 * MATRICES)) ** 0.5)
    model = nn.ParameterList(torch.rand(side, side) for _ in range(MATRICES)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    sharded, beside = WAYS[options.side]
    how = {"sharded": sharded, "in_background": beside, "fresh": True}
    saves = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = Saver(CheckpointFolder(folder), alone(options.device), **how)
        for step in range(options.saves):
            begin, _ = now(options.device)
            cpu_begin = time.thread_time()
            saver.save(model, optimizer, {"step": step, "config": {}}, {}, step)
            save = {"seconds": time.perf_counter() - begin}
            save["cpu_seconds"] = time.thread_time() - cpu_begin
            saver.wait()
            save["written"] = time.perf_counter() - begin
            saves.append(save)
    first, *later = saves
    medians = {key: statistics.median(save[key] for save in later) for key in first}
    return {**medians, "first": first["seconds"], "peak_bytes": peak_bytes(options.device)}


def main(config: Config) -> None:
    results = take_turns(config, dict.fromkeys(WAYS, "benchmarks.checkpoint:save"))
    title = ["How long training waits for a checkpoint"]
    publish(config, "checkpoint", title, results, COLUMNS, f"State: {config.gigabytes:g} GiB.")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
