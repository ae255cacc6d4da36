"""Traces of training steps on fake tensors, made in another process: fakes may crash one at its end."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

from models.dual_encoder import factory
from runtime.simulate.recorder import Trace
from scripts.planning.methods import STEPS as METHODS
from tests.helpers.processes import as_new_process, fresh_processes

# Towers of one layer: a second would do the same once more. ALBEF's text encoder has two, of which
# one sees images.
ONE_LAYER = dict.fromkeys(METHODS, "--vision_depth 1 --bert_config tests/traces/one_layer.json")
ONE_LAYER["albef"] = "--vision_depth 1"
ONE_LAYER["nxtp"] = "--vision [32,1,8] --decoder [32,1]"
STEPS = {
    name: command if command.startswith(("main", "Class")) else f"{command} {ONE_LAYER[name]}"
    for name, command in METHODS.items()
}
ONE_BLOCK = {"VITT8": (128, 1, 4, 8)}


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
    with mock.patch.dict(factory.VITS, ONE_BLOCK):
        return simulate(script, read_config(script, argv), world_size, mode).trace
