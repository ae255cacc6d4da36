"""One measurement in a process of its own, and its clock and memory gauge.

    python -m benchmarks.child MODULE:FUNCTION '{"batch": 4, ...}'

Prints what the function returns as a line of JSON; nothing for None, as of processes beside the
first. It also runs without torch, beside TensorFlow alone.
"""

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

from base.processes import peak_resident_bytes


def call(function: str, options: dict) -> dict | None:
    """Result of `MODULE:FUNCTION`."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(SimpleNamespace(**options))


def measure(step: Callable[[], object], options: SimpleNamespace) -> dict[str, float]:
    """Medians of `options.steps` calls after `options.warmup` others: `seconds` by the clock and
    `cpu_seconds` of all threads, which other work disturbs less; and `peak_bytes` of memory."""
    for _ in range(options.warmup):
        step()
    runs = [measure_once(step, options.device)[1] for _ in range(options.steps)]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "peak_bytes": peak_bytes(options.device)}


def measure_once(function: Callable, device: str = "cpu") -> tuple[object, dict[str, float]]:
    """Result of the function, and its `seconds` and `cpu_seconds` until the device has finished."""
    begin, cpu_begin = now(device)
    result = function()
    end, cpu_end = now(device)
    return result, {"seconds": end - begin, "cpu_seconds": cpu_end - cpu_begin}


def now(device: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor, once the device has finished."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def marking(function: Callable, marks: list, device: str) -> Callable:
    """`function`, whose first call adds the time to the one that `marks` has."""

    def marked(*args, **given):
        if len(marks) == 1:
            marks.append(now(device))
        return function(*args, **given)

    return marked


def peak_bytes(device: str) -> int:
    """Highest memory so far, of the GPU's allocator or resident memory of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = call(sys.argv[1], json.loads(sys.argv[2]))
    if result is not None:
        print(json.dumps(result))
