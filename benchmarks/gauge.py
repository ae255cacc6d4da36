"""Clock and memory gauge of one measurement.

Imports torch only where it is used: the module also runs in an interpreter that has TensorFlow
alone.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace


def measure(step: Callable[[], object], options: SimpleNamespace) -> dict[str, float]:
    """Run `step` `options.warmup` times, then `options.steps` times under the clock.

    Returns medians of the timed steps, `seconds` by the clock and `cpu_seconds` of all threads
    (which other work on a shared machine disturbs less), and `peak_bytes` of memory.
    """
    runs = []
    for _ in range(options.warmup + options.steps):
        runs.append(measure_once(step, options.device)[1])
    timed = runs[options.warmup :]
    return {
        "seconds": statistics.median(run["seconds"] for run in timed),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in timed),
        "peak_bytes": peak_bytes(options.device),
    }


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
    """Highest memory so far: of the GPU's allocator, or resident memory of this process on the
    CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # unlike getrusage's, never the launching process's peak
    return linux_bytes("/proc/self/status", "VmHWM")


def linux_bytes(file: str, field: str) -> int:
    """A field of a file of /proc, there in kB: VmHWM of status, Rss or Private_Dirty of
    smaps_rollup."""
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
