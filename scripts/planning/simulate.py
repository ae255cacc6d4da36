"""A recipe's step on fake tensors: its own model, wrappers, optimizer and loop, recorded."""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from base.distributed import World, unwrap
from base.errors import UserError
from models.layers import float32_gradient
from runtime.simulate.ddp import SimulatedDDP
from runtime.simulate.recorder import Recorder, Trace
from runtime.simulate.stand_ins import simulated_cpu, simulated_gpu
from scripts.planning.steps import ROOT, Setup, check_trains, setup_of

CPU = torch.device("cpu")


@dataclass
class Simulation:
    """What was simulated, and its trace."""

    script: str
    config: object
    setup: Setup
    trace: Trace
    world_size: int
    trained: int  # parameters
    checkpoint_bytes: int
    seconds: float


def load_script(name: str) -> ModuleType:
    """A training script of this repository as a module; `name` is Pretrain.py or Pretrain."""
    stem = name.removesuffix(".py")
    if not (ROOT / f"{stem}.py").is_file():
        known = ", ".join(sorted(p.name for p in ROOT.glob("*.py")))
        raise UserError(f"{name}: no script of that name; there are {known}")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(stem)


def read_config(script: ModuleType, argv: list[str]):
    """The recipe as on a GPU that has bfloat16; compiled code is not traced but estimated."""
    from runtime.config.cli import parse

    config = parse(script.Config, argv)
    if config.precision in ("auto", "fp16"):
        config.precision = "bf16"
    config.compile = False
    return config


MODES = {
    "gpu": simulated_gpu,  # fake tensors, CUDA's kernels
    "cpu": simulated_cpu,  # fake tensors, the CPU's kernels
    "real": contextlib.nullcontext,  # the CPU computes
}


def simulate(script: ModuleType, config, world_size: int = 1, mode: str = "gpu") -> Simulation:
    """Two steps, of which the second is recorded, in a fake group of `world_size` processes."""
    check_trains(script)
    started = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if world_size > 1:
        _join_fake_group(world_size)
    try:
        with _simulated_wrappers(world_size, config.shard_group), _products(mode), MODES[mode]():
            setup, model, recorder, moments = _record(script, config, world_size, mode)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
    network = unwrap(model)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if config.parallel == "fsdp":
        moments *= world_size
    seconds = time.monotonic() - started
    return Simulation(
        script.__name__,
        config,
        setup,
        recorder.trace,
        world_size,
        trained,
        weights + moments,
        seconds,
    )


@contextlib.contextmanager
def _products(mode: str):
    """Matrix products of a card, which write float32 where the model asks for it and torch knows them."""
    if mode != "gpu":
        yield
        return
    with mock.patch.object(
        float32_gradient, "has_float32_products", lambda x: float32_gradient.KNOWN
    ):
        yield


def _join_fake_group(size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)


@contextlib.contextmanager
def _simulated_wrappers(size: int, shard_group: int):
    """DDP that reads no data, and a mesh for fully_shard, whose own making looks at a tensor."""
    if size == 1:
        yield
        return
    import runtime.parallel

    world = World(0, size, 0, CPU)
    mesh = runtime.parallel.device_mesh(world, shard_group)
    with (
        mock.patch.object(runtime.parallel, "device_mesh", lambda *args: mesh),
        mock.patch.object(runtime.parallel, "DistributedDataParallel", SimulatedDDP),
        mock.patch.object(torch.nn.parallel, "DistributedDataParallel", SimulatedDDP),
    ):
        yield


def _record(script: ModuleType, config, world_size: int, mode: str):
    from models.layers.batchnorm import synchronise_batch_norm
    from runtime.optim.build import Precision, build_optimizer
    from runtime.parallel import parallelize

    setup = setup_of(script, config)
    world = World(0, world_size, 0, CPU)
    network = synchronise_batch_norm(setup.model) if script.__name__ in BATCH_NORMS else setup.model
    model = parallelize(network, world, config).train()
    precision = Precision(config.precision, CPU, config.optimizer.clip_grad_norm)
    recorder = Recorder(fakes=mode != "real")
    _adopt_weights(recorder, network, setup.frozen)
    _name_phases(recorder, precision, network, getattr(model, "finish", None))
    if isinstance(model, SimulatedDDP):
        model.attach(recorder)
    with recorder, torch.compiler.set_stance("force_eager"):
        recorder.phase = "optimizer"
        optimizer = build_optimizer(network, config.optimizer, setup.decayed)
        for last in (False, True):
            recorder.memory_only = not last
            recorder.restart()
            recorder.phase = "forward"
            setup.step(model, optimizer, precision)
        recorder.finish()
    return setup, model, recorder, recorder.parts["optimizer"]


BATCH_NORMS = ("main", "Classification", "Recognition")  # scripts that synchronise them


def _adopt_weights(recorder: Recorder, network: nn.Module, frozen: list[nn.Module]) -> None:
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        average = any(
            part.endswith("_m") or part in ("ema", "momentum_model") for part in name.split(".")
        )
        recorder.adopt([tensor], "averages" if average else "weights")
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_adopt_gradient(recorder))
    for module in frozen:
        recorder.adopt([*module.parameters(), *module.buffers()], "frozen networks")


def _adopt_gradient(recorder: Recorder) -> Callable:
    def hook(parameter) -> None:
        if parameter.grad is not None:
            recorder.adopt([parameter.grad], "gradients")

    return hook


def _name_phases(recorder: Recorder, precision, network: nn.Module, finish) -> None:
    """Let the recorder know when the backward pass and the optimizer run."""
    backward, update = precision.backward, precision.step

    def named_backward(*args, **kwargs):
        recorder.phase = "backward"
        backward(*args, **kwargs)
        if finish is not None:
            finish()
        recorder.phase = "forward"

    def named_update(*args, **kwargs):
        recorder.phase = "optimizer"
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        recorder.adopt(gradients, "gradients")
        norm = update(*args, **kwargs)
        recorder.phase = "after"
        return norm

    precision.backward = named_backward
    precision.step = named_update
