"""DDP, FSDP2, activation checkpointing, compilation and accumulation change speed and memory, not
the numbers."""

import copy
import functools
import os

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from base import distributed
from base.errors import UserError
from runtime.optim.build import LossScaler, Optimizer, Precision, build_optimizer
from runtime.options import RunConfig
from runtime.parallel import (
    ParallelOptions,
    device_mesh,
    gradient_sync,
    knows_fsdp,
    parallelize,
    transformer_blocks,
    whole_model,
)
from tests.helpers.processes import start_processes

CPU = torch.device("cpu")
FSDP2 = knows_fsdp()
needs_fsdp2 = pytest.mark.skipif(not FSDP2, reason="FSDP2 takes whole scalars from torch 2.7 on")
STEPS = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.dense(x)) * scale


class Net(nn.Module):
    """Blocks called twice a forward, as text transformers are here; a frozen copy; a buffer; a 0-d
    parameter."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks_m = nn.ModuleList(Block() for _ in range(2)).requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.temp = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x, y):
        for block in [*self.blocks, *self.blocks]:
            x = block(x, scale=0.5)
        return {"loss_a": ((self.head(x).squeeze(1) / self.temp - y) ** 2).mean()}


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 8, 8, generator=generator), torch.randn(STEPS, 8, generator=generator)


def train(model, rank=0, size=1, micro=1, clip=0.1, scaler=None):
    """STEPS updates on this rank's share of each batch, in `micro` parts. Returns the gradient
    norms."""
    optimizer, precision = build_optimizer(model, Optimizer(lr=0.05)), Precision("fp32", CPU, clip)
    precision.scaler = scaler or precision.scaler
    norms = []
    for x, y in zip(*data(), strict=True):
        parts = list(
            zip(x.chunk(size)[rank].chunk(micro), y.chunk(size)[rank].chunk(micro), strict=True)
        )
        for i, (part_x, part_y) in enumerate(parts):
            with gradient_sync(model, last=i == micro - 1), precision.autocast():
                loss = model(x=part_x, y=part_y)["loss_a"]
            precision.backward(loss / micro)
        norms.append(precision.step(optimizer, list(model.parameters())).item())
    precision.check(0)
    return norms, optimizer


@pytest.fixture(scope="module")
def straight():
    model = network()
    norms, _ = train(model)
    return model.state_dict(), norms


def assert_same(state, norms, straight):
    assert norms == pytest.approx(straight[1], rel=1e-5)
    for name, value in straight[0].items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_blocks_are_found_once():
    assert len(transformer_blocks(network())) == 4


def test_activation_checkpointing_equals_the_plain_network(straight):
    model = parallelize(
        network(), distributed.World(0, 1, 0, CPU), ParallelOptions(activation_checkpointing=True)
    )
    norms, _ = train(model)
    assert_same(model.state_dict(), norms, straight)


def test_accumulation_equals_the_whole_batch(straight):
    model = network()
    norms, _ = train(model, micro=4)
    assert_same(model.state_dict(), norms, straight)


def test_compiled_equals_eager(eager_kernels, straight):
    """With kernels in C++ in tests/script/test_compiled.py."""
    model = parallelize(
        network(),
        distributed.World(0, 1, 0, CPU),
        ParallelOptions(compile=True, activation_checkpointing=True),
    )
    norms, _ = train(model)
    assert_same(model.state_dict(), norms, straight)


def test_blocks_share_their_graphs(monkeypatch, straight):
    """Compiled by themselves: blocks of one class have one graph for each kind of batch, of which
    there may be more than torch's limit."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    features = ParallelOptions(compile=True, compile_mode="blocks")
    model = parallelize(network(), distributed.World(0, 1, 0, CPU), features)
    norms, _ = train(model)
    assert_same(model.state_dict(), norms, straight)
    assert len(graphs) == 2  # the input of the first one needs no gradient
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for size in range(9, 14):
            model(x=torch.ones(size, 8), y=torch.ones(size))
    assert len(graphs) == 12


@pytest.mark.slow
def test_kernels_in_cuda_graphs_where_there_is_a_gpu(straight):
    features = ParallelOptions(compile=True, compile_mode="reduce-overhead")
    model = parallelize(network(), distributed.World(0, 1, 0, CPU), features)
    norms, _ = train(model)
    assert_same(model.state_dict(), norms, straight)


def test_cuda_graphs_are_refused_where_they_would_overwrite_gradients():
    config = RunConfig(compile=True, compile_mode="reduce-overhead", accumulate=2)
    with pytest.raises(UserError, match="accumulate: 1"):
        parallelize(network(), distributed.World(0, 1, 0, CPU), config)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="ddp or fsdp"):
        parallelize(network(), distributed.World(0, 1, 0, CPU), ParallelOptions("zero"))


@torch.no_grad()
def first_loss(model: nn.Module) -> float:
    """On the first batch, in eval mode, as a validation would."""
    x, y = (part[0] for part in data())
    return model.eval()(x=x, y=y)["loss_a"].item()


def _two_processes(rank: int, folder: str, strategy: str, micro: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    features = ParallelOptions(strategy, activation_checkpointing=True)
    model = parallelize(network(), distributed.World(rank, 2, rank, CPU), features)
    whole_model(model)  # a validation before the training changes nothing
    norms, optimizer = train(model, rank, 2, micro)
    loss = first_loss(whole_model(model))
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, optim_state = dcp.get_state_dict(model, optimizer, options=options)
    if rank == 0:
        torch.save(
            {"state": state, "norms": norms, "optimizer": optim_state, "loss": loss},
            f"{folder}/result.pt",
        )
    distributed.shutdown()


FSDP = [pytest.param("fsdp", micro, marks=needs_fsdp2) for micro in (1, 2)]


@pytest.mark.parametrize("strategy, micro", [("ddp", 1), ("ddp", 2), *FSDP])
def test_two_processes_equal_one(strategy, micro, straight, tmp_path):
    start_processes(_two_processes, (str(tmp_path), strategy, micro), 2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_same(result["state"], result["norms"], straight)
    trained = network()
    trained.load_state_dict(result["state"])
    assert result["loss"] == pytest.approx(first_loss(trained), rel=1e-6)


def _scaled_losses(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    world = distributed.World(rank, 2, rank, CPU)
    model = parallelize(network(), world, ParallelOptions("fsdp"))
    scaler = LossScaler("cpu", init_scale=64.0)
    norms, optimizer = train(model, rank, 2, scaler=scaler)
    options = dcp.StateDictOptions(full_state_dict=True)
    before = dcp.get_model_state_dict(model, options=options)
    model(x=data()[0][0], y=data()[1][0])["loss_a"].backward()
    if rank == 1:
        model.blocks[0].dense.weight.grad.to_local()[0, 0] = float("inf")
    precision = Precision("fp32", CPU)
    precision.scaler = scaler
    precision.step(optimizer, model.parameters())
    after = dcp.get_model_state_dict(model, options=options)
    facts = {"left": all(torch.equal(before[name], after[name]) for name in after)}
    facts["scales"] = distributed.gather_objects(scaler.get_scale())
    if rank == 0:
        torch.save({"state": before, "norms": norms, **facts}, f"{folder}/result.pt")
    distributed.shutdown()


@needs_fsdp2
def test_losses_are_scaled_beside_a_whole_temperature(straight, tmp_path):
    """--precision fp16 with fsdp ended at the first update; an overflow that one process alone sees
    leaves out the update of all."""
    start_processes(_scaled_losses, (str(tmp_path),), 2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_same(result["state"], result["norms"], straight)
    assert result["left"] and result["scales"] == [32.0, 32.0]


@needs_fsdp2
def test_checkpoints_move_between_strategies(straight, tmp_path):
    """What FSDP2 on two processes saved, one plain process loads: weights and optimizer state by
    name."""
    start_processes(_two_processes, (str(tmp_path), "fsdp", 1), 2)
    saved = torch.load(tmp_path / "result.pt", weights_only=True)
    model = network()
    optimizer = build_optimizer(model, Optimizer(lr=0.05))
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(model, copy.deepcopy(saved["state"]), options=options)
    dcp.set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    moments = optimizer.state[model.head.weight]["exp_avg"]
    torch.testing.assert_close(moments, saved["optimizer"]["state"]["head.weight"]["exp_avg"])
    assert optimizer.state[model.head.weight]["step"].item() == STEPS


def _four_processes(rank: int, folder: str, changes: dict) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4
    )
    world = distributed.World(rank, 4, rank, CPU)
    model = parallelize(network(), world, ParallelOptions("fsdp", **changes))
    weight = model.blocks[0].dense.weight
    held = weight.to_local()
    norms, optimizer = train(model, rank, 4)
    state = dcp.get_model_state_dict(model, options=dcp.StateDictOptions(full_state_dict=True))
    moment = optimizer.state[weight]["exp_avg"].to_local()
    if rank == 0:
        facts = {"rows": len(held), "placements": str(weight.placements)}
        facts["moment_rows"] = len(moment)
        torch.save({"state": state, "norms": norms, **facts}, f"{folder}/result.pt")
    distributed.shutdown()


@needs_fsdp2
@pytest.mark.parametrize(
    "changes, rows, placements",
    [
        ({}, 2, "(Shard(dim=0),)"),
        ({"shard_group": 2}, 4, "(Replicate(), Shard(dim=0))"),
        ({"offload": True}, 2, "(Shard(dim=0),)"),
    ],
)
def test_four_processes_share_copies(changes, rows, placements, straight, tmp_path):
    """All four one copy, or two copies of two processes each (HSDP); or in host memory."""
    start_processes(_four_processes, (str(tmp_path), changes), 4)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_same(result["state"], result["norms"], straight)
    assert (result["rows"], result["moment_rows"]) == (rows, rows)  # of 8 in the whole matrix
    assert result["placements"] == placements


@pytest.mark.parametrize("group", [3, 8])
def test_groups_that_do_not_come_out_even_are_refused(group):
    with pytest.raises(UserError, match=f"4 processes are no whole number of groups of {group}"):
        device_mesh(distributed.World(0, 4, 0, CPU), group)


class Normed(Block):
    """A block with a batch norm, which takes float32 weights."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(super().forward(x))


class Spy(nn.Module):
    """Notes the type of its weight while it computes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Normed()])
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []
        for block in self.blocks:
            block.dense.register_forward_hook(self.note)

    def note(self, layer, *_):
        self.seen.append(layer.weight.dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.float().mean() * self.scale


def _types_of_bf16(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = parallelize(
        Spy(), distributed.World(rank, 2, rank, CPU), ParallelOptions("fsdp", precision="bf16")
    )
    precision = Precision("bf16", CPU)
    with precision.autocast():
        loss = model(torch.randn(4, 8))
    precision.backward(loss)
    weight = model.blocks[0].dense.weight
    facts = {
        "computing": [str(kind) for kind in model.seen],
        "kept": str(weight.to_local().dtype),
        "gradient": str(weight.grad.to_local().dtype),
        "scalar": str(model.scale.dtype),
        "loss": str(loss.dtype),
    }
    if rank == 0:
        torch.save(facts, f"{folder}/types.pt")
    distributed.shutdown()


@needs_fsdp2
def test_weights_travel_in_bf16_and_gradients_are_kept_in_float32(tmp_path):
    start_processes(_types_of_bf16, (str(tmp_path),), 2)
    facts = torch.load(tmp_path / "types.pt", weights_only=True)
    assert facts["computing"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]
    whole = {name: kind for name, kind in facts.items() if name != "computing"}
    assert set(whole.values()) == {"torch.float32"}
