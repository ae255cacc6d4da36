"""Record what a training script does, from outside: `python SCRIPT.py FLAGS` on one process or
several.

    [record] = record_run("Pretrain.py", flags)               # one process: in this one
    records = record_run("Pretrain.py", flags, processes=2)   # one record a rank, over gloo
    record.updates[3].calls[0].inputs["alpha"]                # what the network was given in the fourth update
    record.updates[3].groups[0].lr                            # the learning rate in the optimizer then

The script runs whole, as from a shell: command line, configuration, data, loop, checkpoints, log.
PyTorch alone is instrumented (calls of modules, steps of optimizers), so a record does not depend
on how the loop is written.
A reference then computes every update again:

    network = record.network                                  # a copy, as it was before the first forward pass
    load(network, call.state); replay_random(call); losses = network(**call.inputs)

In `on_processes(2, check, flags)` the function `check(*args)` runs on each rank and may call
`record_main` and, for the replay of losses that gather, `with process_group():`.
"""

import contextlib
import copy
import inspect
import json
import os
import pickle
import random
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from base import distributed
from tests.helpers.processes import as_new_process, free_port, fresh_processes

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds for a run on several processes
State = dict[str, Tensor]


@dataclass
class Call:
    """One forward pass of the network in training."""

    inputs: dict[str, Any]  # arguments of its forward by name; tensors are copies
    state: State  # parameters and buffers before the pass
    random: tuple[Tensor, Any]  # generators of torch and Python before the pass
    output: Any  # what it returned, detached


@dataclass
class Group:
    """A parameter group of the optimizer as a step uses it."""

    names: list[str]  # names in the network without wrappers
    options: dict[str, Any]  # lr, weight_decay, betas, …

    @property
    def lr(self) -> float:
        return self.options["lr"]

    @property
    def weight_decay(self) -> float:
        return self.options["weight_decay"]


@dataclass
class Update:
    """One step of the optimizer, with the forward passes before it."""

    calls: list[Call]
    optimizer: str  # name of its class
    groups: list[Group]
    gradients: dict[str, Tensor | None]  # as the step uses them: averaged, unscaled, clipped
    before: State  # parameters and buffers right before the step
    after: State  # … and right after it

    def option(self, name: str, option: str = "lr") -> Any:
        """The option of the group that the parameter `name` is in."""
        return next(group.options[option] for group in self.groups if name in group.names)


@dataclass
class Record:
    """What one rank did."""

    rank: int = 0
    network: nn.Module | None = (
        None  # a copy of the network without wrappers, before its first forward pass
    )
    updates: list[Update] = field(default_factory=list)
    final: State = field(default_factory=dict)  # parameters and buffers when the script ended
    log: list[dict] = field(default_factory=list)  # lines of log.jsonl


def record_run(script: str, flags: list, processes: int = 1) -> list[Record]:
    """Records of `python script *flags`, one a rank. `script` is a file in the repository's
    root."""
    return on_processes(processes, record_main, script, flags)


def record_main(script: str, flags: list) -> Record:
    """Run the script as `__main__` in this process; the environment says which rank it is (see
    `on_processes`)."""
    flags = [str(flag) for flag in flags]
    recorder = Recorder(Record(rank=int(os.environ.get("RANK", 0))))
    with started_as([str(ROOT / script), *flags]), recorder.watching():
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise AssertionError(
                    f"{script} ended with status {ended.code}; see its output"
                ) from None
    record = recorder.record
    assert record.updates, f"{script} made no update"
    record.final = state_of(recorder.live)
    log = ROOT / flags[flags.index("--output_dir") + 1] / "log.jsonl"
    record.log = [json.loads(line) for line in log.read_text().splitlines()]
    return record


class Recorder:
    """Fills a record while the script runs."""

    def __init__(self, record: Record):
        self.record = record
        self.live: nn.Module | None = None  # the network that is trained, without wrappers
        self.calls: list[Call] = []
        self.inside = False
        self.steps = 0  # calls of `step` under way: one inside another where it calls super().step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = nn.Module.__call__

        def call(module: nn.Module, *args, **kwargs):
            if self.inside or not is_training(module, [*args, *kwargs.values()]):
                return original(module, *args, **kwargs)
            return self.record_call(original, module, args, kwargs)

        handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self.before_step(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self.after_step(optimizer)),
        ]
        try:
            with mock.patch.object(nn.Module, "__call__", call):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def record_call(self, original: Callable, module: nn.Module, args, kwargs):
        network = unwrapped(module)
        if self.live is None:
            self.live, self.record.network = network, copy.deepcopy(network)
        if network is not self.live:
            return original(module, *args, **kwargs)
        inputs = inspect.signature(network.forward).bind(*args, **kwargs).arguments
        made = Call(
            frozen(inputs), state_of(network), (torch.get_rng_state(), random.getstate()), None
        )
        self.inside = True
        try:
            output = original(module, *args, **kwargs)
        finally:
            self.inside = False
        made.output = frozen(output)
        self.calls.append(made)
        return output

    def before_step(self, optimizer: Optimizer) -> None:
        self.steps += 1
        if self.steps > 1:
            return
        if self.live is None:  # on resuming, PyTorch makes room for moments by a step at rate 0
            idle = all(float(group["lr"]) == 0 for group in optimizer.param_groups)
            assert idle, "an optimizer steps, but no network was called in training mode"
            return
        names = {id(p): name for name, p in self.live.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            options = {key: copy.copy(value) for key, value in group.items() if key != "params"}
            groups.append(Group([names[id(p)] for p in group["params"]], options))
        gradients = {
            names[id(p)]: None if p.grad is None else p.grad.detach().clone()
            for group in optimizer.param_groups
            for p in group["params"]
        }
        before = state_of(self.live)
        self.record.updates.append(
            Update(self.calls, type(optimizer).__name__, groups, gradients, before, {})
        )
        self.calls = []

    def after_step(self, optimizer: Optimizer) -> None:
        self.steps -= 1
        if self.steps == 0 and self.live is not None:
            self.record.updates[-1].after = state_of(self.live)


def is_training(module: nn.Module, values: list) -> bool:
    """Whether this call trains: not an evaluation, not a teacher, not a count of FLOPs on fake
    tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not (module.training and torch.is_grad_enabled()) or any(
        isinstance(value, FakeTensor) for value in values
    ):
        return False
    return any(parameter.requires_grad for parameter in module.parameters())


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DDP and torch.compile."""
    while isinstance(module, nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = getattr(module, "_orig_mod", None) or module.module
    return module


def state_of(network: nn.Module) -> State:
    """Copies of all parameters and buffers, those included that checkpoints leave out."""
    return {name: value.detach().clone() for name, value in live_state(network)}


def live_state(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


@torch.no_grad()
def load(network: nn.Module, state: State) -> None:
    """Bring a copy of the network to a recorded state, in place."""
    for name, value in live_state(network):
        value.copy_(state[name])


def replay_random(call: Call) -> None:
    """Set the generators to where they were before the call: the same dropout, the same
    negatives."""
    torch.set_rng_state(call.random[0])
    random.setstate(call.random[1])


def frozen(value: Any) -> Any:
    """A copy that later work does not change; tensors are detached."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [frozen(item) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


@contextlib.contextmanager
def started_as(argv: list[str]) -> Iterator[None]:
    """As from a shell in the repository's root; afterwards directory, command line and signals are
    as before."""
    here, words = os.getcwd(), sys.argv
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        os.chdir(ROOT)
        sys.argv = argv
        yield
    finally:
        os.chdir(here)
        sys.argv = words
        for number, handler in handlers.items():
            signal.signal(number, handler)


_pools: dict[int, ProcessPoolExecutor] = {}


def on_processes(processes: int, function: Callable, *args) -> list:
    """Results of `function(*args)` on every rank of a world of so many processes; raises where a
    rank raises.

    One process is this one. More are kept for the next call. Scripts find
    the variables that torchrun sets. Function, arguments and results must be picklable.
    """
    if processes == 1:
        return [function(*args)]
    pool = _pools.setdefault(
        processes, ProcessPoolExecutor(processes, fresh_processes(), _ready, (dict(os.environ),))
    )
    with tempfile.TemporaryDirectory() as folder:
        world = {
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": free_port(),
            "STORE": folder,
        }
        jobs = []
        for rank in range(processes):
            variables = {
                name: str(value)
                for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()
            }
            jobs.append(pool.submit(_on_rank, variables, function, args))
        done, waiting = wait(jobs, timeout=TIMEOUT, return_when=FIRST_EXCEPTION)
        failed = [job for job in done if job.exception()]
        if waiting or failed:
            stop_processes()
        if failed:
            raise failed[0].exception()
        assert not waiting, (
            f"{function.__name__} did not end on {processes} processes within {TIMEOUT} s"
        )
        return [pickle.loads(job.result()) for job in jobs]


def _ready(environment: dict[str, str]) -> None:
    """A process must not outlive tests that were killed."""
    as_new_process(environment)

    def wait_for_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _on_rank(variables: dict[str, str], function: Callable, args: tuple) -> bytes:
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, variables):
        try:
            return pickle.dumps(function(*args))  # bytes: torch would send open files for tensors
        finally:
            distributed.shutdown()


def stop_processes() -> None:
    """End the processes that `on_processes` keeps."""
    while _pools:
        _, pool = _pools.popitem()
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The ranks of `on_processes` joined over gloo, for a reference; nothing where there is one
    process."""
    if "STORE" not in os.environ:
        yield
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = Path(os.environ["STORE"], "reference")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        yield
        dist.barrier()  # nobody hangs up while another still talks
    finally:
        distributed.shutdown()
