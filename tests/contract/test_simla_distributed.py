"""Two processes are one process with the joined batch: losses, gradients, queue and momentum of
SIMLA and ALBEF."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from base import distributed
from base.distributed import gather_with_gradient
from models.fusion.momentum import MomentumPairs
from tests.helpers.processes import start_processes
from tests.helpers.tiny_simla import rows_of, tiny_batch, tiny_model

STEPS, ROWS, WORLD = 3, 4, 2


def swap_neighbours(i2t, t2i, same):
    """Samples 0 and 1 are each other's negatives, 2 and 3 too: the same choice in a half and in the
    whole batch."""
    other = torch.arange(len(same)) ^ 1
    return other, other


def train(
    model: nn.Module, wrapped: nn.Module, start: int, stop: int, albef: bool
) -> dict[str, torch.Tensor]:
    """A few steps on samples start..stop-1 of each batch; everything that must agree, by name."""
    model.sample_negatives = swap_neighbours
    pairs = MomentumPairs(wrapped, momentum=0.9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    seen = {}
    for step in range(STEPS):
        pairs.update()
        losses = wrapped(**rows_of(tiny_batch(ROWS, albef=albef, seed=step), start, stop))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        seen |= {f"step {step}: {name}": loss.detach() for name, loss in losses.items()}
        optimizer.step()
    seen |= {
        f"gradient of {name}": p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return seen | {f"state {name}": value.clone() for name, value in model.state_dict().items()}


def worker(rank: int, init_file: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD)
    seen = {"gather": gather_rows(rank), "sharded": sharded_momentum()}
    for albef in (False, True):
        model = tiny_model(albef=albef, queue_size=6)
        wrapped = DistributedDataParallel(model)
        seen["albef" if albef else "simla"] = train(
            model, wrapped, rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD, albef
        )
    torch.save(seen, f"{results}.{rank}")
    distributed.shutdown()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(worker, (str(folder / "init"), str(folder / "seen")), WORLD)
    return [torch.load(folder / f"seen.{rank}", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("albef", [False, True], ids=["simla", "albef"])
def test_two_processes_are_one(ranks, albef):
    first, second = (seen["albef" if albef else "simla"] for seen in ranks)
    model = tiny_model(albef=albef, queue_size=6)
    whole = train(model, model, 0, ROWS, albef)
    assert len(whole) > 300 and set(whole) == set(first) == set(second)
    for name, value in whole.items():
        if "loss" in name:
            torch.testing.assert_close(
                (first[name] + second[name]) / 2, value, rtol=1e-5, atol=1e-6, msg=name
            )
        else:
            error = (
                (first[name].double() - value.double()).abs().max()
                if value.numel()
                else torch.tensor(0.0)
            )
            # a softmax does not see the key's bias: its gradient is 0 but for rounding
            like = name.replace(".key.bias", ".query.bias") if "gradient" in name else name
            scale = whole[like].double().abs().max()
            # rounding of float32; in float64 they agree to 1e-13
            assert error <= 1e-4 * scale + 1e-7, f"{name}: off by {error:.1e} of {scale:.1e}"
            assert torch.equal(first[name], second[name]), name


def gather_rows(rank: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2].requires_grad_()
    everyone = gather_with_gradient(rows)
    (everyone * (rank + 1) * torch.arange(8.0).view(4, 2)).sum().backward()
    return {"everyone": everyone.detach(), "grad": rows.grad}


def test_gather_is_in_rank_order_and_sums_the_gradients(ranks):
    for rank in range(WORLD):
        seen = ranks[rank]["gather"]
        assert torch.equal(seen["everyone"], torch.arange(8.0).view(4, 2))
        assert torch.equal(seen["grad"], 3 * torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2])


def sharded_momentum() -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = pair_of_linears(), init_device_mesh("cpu", (WORLD,))
    for part in (model.encoder, model.encoder_m):
        fully_shard(part, mesh=mesh)
    MomentumPairs(model, momentum=0.9).update()
    return [p.full_tensor() for p in model.encoder_m.parameters()]


def pair_of_linears() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = nn.Linear(6, 4)
    model.encoder_m = copy.deepcopy(model.encoder).requires_grad_(False)
    nn.init.normal_(model.encoder.weight)
    return model


def test_momentum_follows_sharded_parameters(ranks):
    model = pair_of_linears()
    MomentumPairs(model, momentum=0.9).update()
    for seen in ranks:
        for ours, theirs in zip(seen["sharded"], model.encoder_m.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.data)
