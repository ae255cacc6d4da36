"""A training run written out again: schedule, alpha, teacher, micro-batches, clipping, AdamW and
the log.

Nothing here comes from the scripts or from runtime/: a record (tests/helpers/loops.py) gives the
batches, the random numbers and a copy of the network, everything else is computed from the recipe.
Each update starts from the recorded weights, so that a rounding difference does not grow, and every
quantity is compared on its way.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.loops import (
    Record,
    State,
    Update,
    load,
    on_processes,
    process_group,
    record_main,
    replay_random,
)
from tests.loops.common import gather

NOT_DECAYED = ("cls_token", "pos_embed", "mask_token", "temp", "embeddings.")


@dataclass
class Recipe:
    """What the flags of a run ask for."""

    losses: tuple[str, ...]  # their sum is minimised
    total: int  # updates
    warmup: int = 2
    warmup_lr: float = 1e-5
    peak_lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    scalar_lr_scale: float = 1.0
    alpha: float | None = 0.4  # None: the network takes none
    alpha_ramp: int = 0  # updates until alpha is reached
    momentum: float | None = 0.995  # None: no teacher
    accumulate: int = 1
    bf16: bool = False
    frozen: tuple[
        str, ...
    ] = ()  # beginnings of the names of parameters that are not trained, the teacher's apart
    start: State | None = (
        None  # weights of --checkpoint; None: random ones, the teacher's like the student's
    )

    def lr(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0: linear warm-up, then a cosine that ends
        on the last."""
        if step < self.warmup:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup
        progress = (step - self.warmup) / (self.total - 1 - self.warmup)
        return self.min_lr + (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def alpha_at(self, step: int) -> float:
        """Weight of the teacher's targets in update `step`: a linear rise from 0."""
        return self.alpha * min(1.0, step / self.alpha_ramp) if self.alpha_ramp else self.alpha

    def decay_of(self, name: str, parameter: Tensor) -> float:
        """Weight decay: none for vectors (biases, norms), tokens, positions, embedding tables and
        temperatures."""
        is_vector = parameter.ndim <= 1 or name.endswith(".bias")
        return 0.0 if is_vector or any(part in name for part in NOT_DECAYED) else self.weight_decay

    def lr_scale_of(self, parameter: Tensor) -> float:
        return self.scalar_lr_scale if parameter.ndim == 0 else 1.0


def check_run(script: str, flags: list, recipe: Recipe, processes: int = 1) -> None:
    """Run the script and compare every update with the reference, on every rank."""
    on_processes(processes, record_and_check, script, flags, recipe)


def record_and_check(script: str, flags: list, recipe: Recipe) -> None:
    record = record_main(script, flags)
    with process_group():
        check(record, recipe)


def check(record: Record, recipe: Recipe) -> None:
    """Every update of the record against the recipe. Collective: the losses gather over the
    ranks."""
    assert len(record.updates) == recipe.total
    check_start(record)
    reference = record.network
    optimizer = adamw(reference, recipe)
    logged = [line for line in record.log if "loss" in line]
    previous = None
    for step, update in enumerate(record.updates):
        check_options(update, recipe, step, reference)
        check_teacher(previous, update, recipe, reference)
        check_counts(update)
        gradients, means = replay(reference, update, recipe, step)
        norm = clip(gradients, recipe.clip)
        compare_gradients(update.gradients, gradients, step)
        check_during(reference, update, step)
        check_step(reference, optimizer, update, recipe, step)
        check_log(logged[step], recipe, step, {**means, "grad_norm": norm})
        previous = update
    # after the last update nothing moves any more, the teacher neither
    compare_states(record.final, record.updates[-1].after, "at the end")


def check_start(record: Record) -> None:
    """The same weights on every rank; other random numbers; other samples in every micro-batch of
    every rank.

    The student is in training mode, the teacher is not: it has no dropout.
    """
    for name, module in record.network.named_modules():
        assert module.training != is_teacher(name), (
            f"{name or 'the network'}.training is {module.training}"
        )
    first = record.updates[0].calls[0]
    mine = {
        "weights": fingerprint(first.state.values()),
        "random": first.random[0].numpy().tobytes(),
        "batches": [
            fingerprint(value for name, value in call.inputs.items() if name != "alpha")
            for call in record.updates[0].calls
        ],
    }
    ranks = gather(mine)
    assert len({rank["weights"] for rank in ranks}) == 1, "the ranks start from different weights"
    assert len({rank["random"] for rank in ranks}) == len(ranks), (
        "two ranks draw the same random numbers"
    )
    batches = [batch for rank in ranks for batch in rank["batches"]]
    assert len(set(batches)) == len(batches), "two micro-batches of an update are the same"


@contextlib.contextmanager
def loss_scaling(steps: int) -> Iterator[None]:
    """Switch the loss scaler of fp16 on, which a CPU cannot run otherwise, for a run of so many
    steps."""
    original, scalers = torch.amp.GradScaler.__init__, []

    def switched_on(scaler, device="cuda", **_):
        original(scaler, device, init_scale=1024.0, enabled=True)
        scalers.append(scaler)

    with mock.patch.object(torch.amp.GradScaler, "__init__", switched_on):
        yield
    good_steps = [scaler._growth_tracker.item() for scaler in scalers]
    assert good_steps == [steps], f"the scaler should have made {steps} steps: {good_steps}"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    content = sha256()
    for tensor in tensors:
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def check_options(update: Update, recipe: Recipe, step: int, network: nn.Module) -> None:
    """The optimizer's learning rates and weight decays; every trainable parameter once; the alpha
    that was given."""
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    free = [
        name
        for name, _ in network.named_parameters()
        if not is_teacher(name) and not name.startswith(recipe.frozen)
    ]
    assert sorted(trainable) == sorted(free), "not the parameters that should be trained"
    named = [name for group in update.groups for name in group.names]
    assert sorted(named) == sorted(trainable), (
        "the optimizer does not hold every trainable parameter once"
    )
    for name, parameter in trainable.items():
        lr = recipe.lr(step) * recipe.lr_scale_of(parameter)
        assert update.option(name, "lr") == pytest.approx(lr, rel=1e-9), (
            f"learning rate of {name} in update {step}"
        )
        decay = update.option(name, "weight_decay")
        assert decay == recipe.decay_of(name, parameter), f"weight decay of {name} in update {step}"
    assert len(update.calls) == recipe.accumulate
    for call in update.calls:
        if recipe.alpha is not None:
            alpha = float(call.inputs["alpha"])
            assert alpha == pytest.approx(recipe.alpha_at(step), rel=1e-6), (
                f"alpha in update {step}"
            )


def check_teacher(
    previous: Update | None, update: Update, recipe: Recipe, network: nn.Module
) -> None:
    """From the end of an update to the first forward pass of the next the teacher moves once, and
    nothing else."""
    if previous is not None:
        start = previous.after
    # without a checkpoint teacher and student are the same, which the first move leaves as it is
    else:
        start = {**update.calls[0].state, **(recipe.start or {})}
    expected = dict(start)
    if recipe.momentum is not None:
        expected.update(moved_teacher(start, recipe.momentum, network))
    # where teacher and student nearly cancel, the rounding of either is all that is left
    compare_states(
        update.calls[0].state, expected, "at the first forward pass of an update", absolute=5e-7
    )


def check_counts(update: Update) -> None:
    """Masked tokens and patches that a micro-batch has: the mean over micro-batches and ranks."""
    inputs = [call.inputs for call in update.calls]
    masks = {}
    if "mlm_labels" in inputs[0]:
        masks["mlm_count"] = [given["mlm_labels"] != -100 for given in inputs]
    if "patch_mask" in inputs[0]:
        masks["mim_count"] = [given["patch_mask"] for given in inputs]
    for name, masked in masks.items():
        mean = mean_over_ranks(sum(mask.sum() for mask in masked) / len(masked))
        assert {float(given[name]) for given in inputs} == {float(mean)}, name


@torch.no_grad()
def another_teacher(record: Record, file: Path) -> State:
    """Save the network's first weights, as a checkpoint, with a teacher of its own; the
    parameters."""
    torch.manual_seed(1)
    network = record.network
    for name, parameter in network.named_parameters():
        if is_teacher(name):
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"model": network.state_dict()}, file)
    return {name: parameter.clone() for name, parameter in network.named_parameters()}


def is_teacher(name: str) -> bool:
    """Whether a parameter is of a momentum copy X_m of a module X."""
    return name.partition(".")[0].endswith("_m")


def moved_teacher(state: State, momentum: float, network: nn.Module) -> State:
    """The teacher's parameters X_m after its update: momentum * teacher + (1 - momentum) *
    student."""
    moved = {}
    for name, _ in network.named_parameters():
        if is_teacher(name):
            module, _, rest = name.partition(".")
            student = f"{module.removesuffix('_m')}.{rest}"
            moved[name] = momentum * state[name] + (1 - momentum) * state[student]
    assert moved, "the network has no teacher"
    return moved


def replay(network: nn.Module, update: Update, recipe: Recipe, step: int) -> tuple[dict, dict]:
    """Gradients of the global batch before clipping, and mean losses over micro-batches and
    ranks."""
    load(network, update.calls[0].state)
    network.zero_grad(set_to_none=True)
    total = dict.fromkeys(["loss", *recipe.losses], 0.0)
    for call in update.calls:
        replay_random(call)
        inputs = dict(call.inputs)
        if recipe.alpha is not None:
            inputs["alpha"] = torch.tensor(recipe.alpha_at(step))
        cast = torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else contextlib.nullcontext()
        with cast:
            losses = network(**inputs)
            loss = sum(losses[name] for name in recipe.losses)
        (loss / recipe.accumulate).backward()
        for name, value in {"loss": loss, **losses}.items():
            if name in total:
                total[name] += value.item() / recipe.accumulate
    gradients = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            gradients[name] = None if parameter.grad is None else mean_over_ranks(parameter.grad)
    ranks = gather(total)
    return gradients, {name: sum(rank[name] for rank in ranks) / len(ranks) for name in total}


def clip(gradients: dict[str, Tensor | None], limit: float | None) -> float:
    """Scale all gradients, in place, to a global L2 norm of at most `limit`; the norm before."""
    norm = math.sqrt(
        sum(g.double().square().sum().item() for g in gradients.values() if g is not None)
    )
    if limit is not None and norm > limit:
        for gradient in gradients.values():
            if gradient is not None:
                gradient.mul_(limit / norm)
    return norm


def adamw(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with a group for each weight decay and learning rate."""
    groups = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            kind = (recipe.decay_of(name, parameter), recipe.lr_scale_of(parameter))
            groups.setdefault(kind, []).append(parameter)
    groups = [{"params": group, "weight_decay": decay} for (decay, _), group in groups.items()]
    return torch.optim.AdamW(
        groups, lr=recipe.peak_lr, betas=recipe.betas, eps=recipe.eps, fused=True
    )


def check_step(network: nn.Module, optimizer, update: Update, recipe: Recipe, step: int) -> None:
    """The weights after the update: AdamW's arithmetic on the gradients, which `compare_gradients`
    has checked."""
    load(network, update.before)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.grad = (
                None if update.gradients[name] is None else update.gradients[name].clone()
            )
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr(step) * recipe.lr_scale_of(group["params"][0])
    optimizer.step()
    expected = {
        name: value.detach()
        for name, value in [*network.named_parameters(), *network.named_buffers()]
    }
    compare_states(update.after, expected, f"after update {step}", absolute=1e-5 * recipe.lr(step))


def compare_gradients(
    seen: dict[str, Tensor | None], expected: dict[str, Tensor | None], step: int
) -> None:
    """Within 1e-5 of each tensor's largest entry; gradients that are zero but for rounding within
    1e-7 of all."""
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        if gradient is None:
            assert seen[name] is None, f"update {step}: {name} has a gradient"
            continue
        assert seen[name] is not None, f"update {step}: {name} has no gradient"
        tolerance = 1e-5 * gradient.abs().max().item() + 1e-7 * largest
        distance = (seen[name] - gradient).abs().max().item()
        assert distance <= tolerance, (
            f"update {step}: gradient of {name} is off by {distance:.3g} > {tolerance:.3g}"
        )


def check_during(network: nn.Module, update: Update, step: int) -> None:
    """Forward and backward passes move no weight, and fill queues as the reference's did."""
    start = update.calls[0].state
    for name, _ in network.named_parameters():
        assert torch.equal(update.before[name], start[name]), (
            f"{name} moved before the step of update {step}"
        )
    for name, value in network.named_buffers():
        where = f"{name} before the step of update {step}: "
        torch.testing.assert_close(
            update.before[name], value, rtol=1e-5, atol=1e-6, msg=where.__add__
        )


def compare_states(seen: State, expected: State, when: str, absolute: float = 1e-9) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        if torch.equal(seen[name], value):
            continue
        where = f"{name} {when}: "
        torch.testing.assert_close(seen[name], value, rtol=1e-6, atol=absolute, msg=where.__add__)


def check_log(line: dict, recipe: Recipe, step: int, means: dict[str, float]) -> None:
    """The line of log.jsonl: the learning rate used, and means over micro-batches and ranks."""
    assert line["step"] == step + 1
    assert line["lr"] == pytest.approx(recipe.lr(step), rel=1e-6)
    for name, value in means.items():
        assert line[name] == pytest.approx(value, rel=1e-5), f"{name} in the log of update {step}"


def mean_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
