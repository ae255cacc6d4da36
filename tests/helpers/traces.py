"""Traces of training steps on fake tensors, made in another process: fakes may crash one at its end."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor

from runtime.simulate.recorder import Trace
from tests.helpers.processes import as_new_process, fresh_processes


@functools.cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, fresh_processes(), as_new_process, (dict(os.environ),))


@functools.cache
def trace_of(command: str, world_size: int = 1, mode: str = "gpu") -> Trace:
    """The trace of `SCRIPT --flag value …`, the second step of a recipe."""
    return _worker().submit(_trace, command, world_size, mode).result()


def call_in_worker(function):
    """`function()` in the process where fakes live."""
    return _worker().submit(function).result()


def _trace(command: str, world_size: int, mode: str) -> Trace:
    from scripts.planning.simulate import load_script, read_config, simulate

    name, *argv = command.split()
    script = load_script(name)
    return simulate(script, read_config(script, argv), world_size, mode).trace
