"""Clock and memory gauge of one measurement.

Imports torch only where it is used: it also runs beside TensorFlow alone.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace


def measure(step: Callable[[], object], options: SimpleNamespace) -> dict[str, float]:
    """Medians of `options.steps` calls after `options.warmup` others: `seconds` by the clock and
    `cpu_seconds` of all threads, which other work disturbs less; and `peak_bytes` of memory."""
    for _ in range(options.warmup):
        measure_once(step, options.device)
    runs = [measure_once(step, options.device)[1] for _ in range(options.steps)]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "peak_bytes": peak_bytes(options.device)}


def measure_once(
    function: Callable[[], object], device: str = "cpu"
) -> tuple[object, dict[str, float]]:
    """Result of the function, and its `seconds` and `cpu_seconds` until the device has finished."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    result = function()
    wait_for(device)
    seconds = time.perf_counter() - begin
    return result, {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_begin}


def wait_for(device: str) -> None:
    """Wait until the GPU has finished."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Highest memory so far, of the GPU's allocator or resident memory of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # unlike getrusage's, never the launching process's peak
    return linux_bytes("/proc/self/status", "VmHWM")


def linux_bytes(file: str, field: str) -> int:
    """A field of a file of /proc that has kB, such as VmHWM of status."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in {file}")


class Stages:
    """Times of the stages of a procedure, which come one after another."""

    def __init__(self, device: str):
        self.device = device
        self.begun: dict[str, tuple[float, float]] = {}  # clock and processor

    def enter(self, name: str) -> None:
        """Begin a stage; nothing changes if it has begun before."""
        if name not in self.begun:
            wait_for(self.device)
            self.begun[name] = (time.perf_counter(), time.process_time())

    def times(self) -> dict[str, list[float]]:
        """{stage: [seconds by the clock, CPU seconds]} of all stages but the last."""
        found = {}
        for (name, begin), (_, end) in pairwise(self.begun.items()):
            found[name] = [end[0] - begin[0], end[1] - begin[1]]
        return found
