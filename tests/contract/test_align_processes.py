"""ALIGN on two processes, each with every other sample, is ALIGN on one: losses, gradients,
statistics, updates."""

import torch
import torch.distributed as dist

from base.distributed import World
from models.dual_encoder.align import Align
from models.dual_encoder.base import names_by_decay
from models.dual_encoder.config import DualConfig
from models.layers.batchnorm import synchronise_batch_norm
from models.layers.efficientnet import EfficientNetShape
from models.layers.xbert import BertConfig
from runtime.optim.build import Optimizer, build_optimizer
from runtime.parallel import ParallelOptions, checkpoint_blocks, shard
from tests.contract.test_parallel import FSDP2
from tests.helpers.clip_toys import cached_losses, losses_with_total
from tests.helpers.processes import spawn

PAIRS, VIRTUAL, STEPS = 16, 4, 3
LOSS = {"label_smoothing": 0.1, "loss_avg_or_sum": "sum", "temperature": 0.3}


def tiny() -> Align:
    torch.manual_seed(3)
    text = BertConfig(
        30, 16, 2, 2, 32, 16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    image = EfficientNetShape(0.125, 0.3, divisor=4, drop_connect=0.0, virtual_batch=VIRTUAL)
    return Align(DualConfig(model="ALIGN_B0_MINI", embed_dim=12, **LOSS), image, text).double()


def batches(rank: int = 0, processes: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    result = []
    for _ in range(STEPS):
        image = torch.randn(PAIRS, 3, 36, 36, generator=generator, dtype=torch.float64)
        result.append(
            {"image": image, "text_ids": torch.randint(1, 30, (PAIRS, 7), generator=generator)}
        )
    return [{k: v[rank::processes] for k, v in batch.items()} for batch in result]


def lamb(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(
        model, Optimizer(opt="lamb", lr=1e-2, weight_decay=1e-5, eps=1e-6), names_by_decay(model)[0]
    )


def train(rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Losses and the first gradients, then the whole state after a few updates by LAMB."""
    model = synchronise_batch_norm(tiny())
    optimizer = lamb(model)
    seen = {}
    for step, batch in enumerate(batches(rank, processes)):
        losses = losses_with_total(model, batch)
        losses["loss"].backward()
        for value in [
            losses["loss"].detach(),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]:
            if processes > 1:
                dist.all_reduce(value)
                value /= processes
        seen[f"loss {step}"] = losses["loss"].detach()
        if step == 0:
            seen |= {f"gradient {name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        model.after_update()
    return seen | {f"state {name}": value for name, value in model.state_dict().items()}


def compare(own: dict, expected: dict, atol: float = 1e-8) -> None:
    """In float64, where LAMB does not make full steps of the rounding noise of gradients that are
    zero."""
    for name, value in expected.items():
        torch.testing.assert_close(
            own[name], value, rtol=1e-6, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def sharded_losses(rank: int) -> list[torch.Tensor]:
    """Losses under FSDP2: LAMB's norms are those of whole tensors."""
    model = shard(tiny(), World(rank, 2, rank, torch.device("cpu")), ParallelOptions("fsdp"))
    optimizer = lamb(model)
    losses = []
    for batch in batches(rank, 2):
        loss = losses_with_total(model, batch)["loss"]
        loss.backward()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
        model.after_update()
        dist.all_reduce(loss.detach())
        losses.append(loss.detach() / 2)
    return losses


def on_two(rank: int, expected: dict) -> None:
    compare(train(rank, 2), expected)
    if FSDP2:
        compare(
            {f"loss {step}": loss for step, loss in enumerate(sharded_losses(rank))},
            losses_of(expected),
        )


def losses_of(expected: dict) -> dict:
    return {name: value for name, value in expected.items() if name.startswith("loss")}


def test_two_processes_equal_one():
    expected = train()
    assert not torch.equal(expected["loss 0"], expected["loss 2"])
    moved = expected["state vision_model.embeddings.batchnorm.running_mean"]
    assert moved.abs().min() > 0
    spawn(on_two, 2, expected)


def test_other_groups_are_other_numbers():
    """The comparison above sees the groups: with half of the batch dealt otherwise the loss is
    another."""
    model, batch = tiny(), batches()[0]
    order = torch.arange(PAIRS).unflatten(0, (2, -1)).T.flatten()
    with torch.no_grad():
        dealt, shuffled = (
            losses_with_total(model, batch)["loss"],
            losses_with_total(model, {k: v[order] for k, v in batch.items()})["loss"],
        )
    assert (dealt - shuffled).abs() > 1e-4


def test_cached_accumulation():
    """Micro-batches that are whole virtual batches: one contrastive batch, the statistics follow
    once each."""
    model, batch = tiny(), batches()[0]
    parts = [{k: v[i::4] for k, v in batch.items()} for i in range(4)]  # virtual batch i of four
    losses = cached_losses(model, parts)
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = tiny()
    expected = losses_with_total(whole, batch)
    expected["loss"].backward()
    torch.testing.assert_close(losses["loss"], expected["loss"].detach())
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    compare(grads, wanted, 1e-6)  # gradients of features travel in float32
    assert model.vision_model.embeddings["batchnorm"].num_batches_tracked == 4


def test_activation_checkpointing_changes_nothing():
    plain, saving = tiny(), tiny()
    checkpoint_blocks(saving)
    for model in (plain, saving):
        losses_with_total(model, batches()[0])["loss"].backward()
    compare(
        {name: p.grad for name, p in saving.named_parameters()},
        {name: p.grad for name, p in plain.named_parameters()},
    )
    compare(saving.state_dict(), plain.state_dict())
