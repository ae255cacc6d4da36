"""Classification.py's own loop against the loop written out here: on one process, on two, with accumulation.

The script runs whole (`tests.helpers.loops`). The reference takes the batches that the network was given, its logits and
its weights at the start; losses, means over micro-batches and processes, clipping, learning rates, AdamW or SGD and the
moving average are computed here. What mixup and CutMix made of a batch is compared with the batch of a run without
them. Source: COYO-ViT; `original` is its arithmetic, that of Keras.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers import classification_runs
from tests.helpers.loops import (
    Record,
    State,
    load,
    on_processes,
    process_group,
    record_main,
    state_of,
)
from tests.loops.common import CLIP, check_gradients, check_pixels, close, gather

LR, MIN_LR, WARMUP = 0.02, 0.001, 2
DECAY, BETAS = 0.3, (0.9, 0.98)
EPS = 1e-2  # larger than usual: Adam's steps then tell how large gradients are
MOMENTUM, SMOOTHING = 0.9, 0.1
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A way to train, what its command line says, and what follows from that."""

    changes: tuple[tuple[str, object], ...]
    fine_tuning: bool = False  # one label an image and the softmax, else any number and the sigmoid
    schedule: str = "cosine"
    sgd: bool = False
    original: bool = False
    clip_norm: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float = 0.0
    ema_start: int = 0
    noise: bool = True  # dropout, for one process alone


CASES = {
    "pre-training": Case((), mixup=0.6, clip_norm=0.5, ema_decay=0.25),
    "fine-tuning": Case(
        (),
        fine_tuning=True,
        schedule="vit_cosine",
        sgd=True,
        cutmix=1.0,
        ema_decay=0.9,
        ema_start=2,
    ),
    "both mixtures": Case((), fine_tuning=True, mixup=0.6, cutmix=1.0),
    "original": Case((), schedule="vit_linear", original=True, clip_norm=0.5, ema_decay=0.9),
    "original fine-tuning": Case(
        (), fine_tuning=True, sgd=True, original=True, cutmix=1.0, clip_norm=0.5
    ),
}


def flags_of(case: Case, data: Path, output: Path, **changes) -> list[str]:
    """Command line of four updates."""
    values = {
        "batch_size": 8,
        "label_smoothing": SMOOTHING,
        "scheduler.epochs": "4 steps",
        "scheduler.warmup": f"{WARMUP} steps",
        "scheduler.sched": case.schedule,
        "scheduler.min_lr": MIN_LR,
        "lr": LR,
        "weight_decay": 0.0 if case.sgd else DECAY,
        "betas": list(BETAS),
        "eps": EPS,
        "opt": "sgd" if case.sgd else "adamw",
        "clip_grad_norm": case.clip_norm or "none",
        "mixup_alpha": case.mixup,
        "cutmix_alpha": case.cutmix,
        "ema_decay": case.ema_decay,
        "ema_start": case.ema_start,
        "val_data": "none",
        "save_every": "100 steps",
    }
    if not case.noise:
        values["dropout"] = 0.0
    if case.schedule == "vit_linear":
        values["scheduler.power"] = 2.0
    if case.original:
        values["compat"], values["keras"] = "original", "true"
    build = classification_runs.fine_tuning if case.fine_tuning else classification_runs.flags
    words = build(data, output, **{**values, **changes})
    return ["--output_dir" if word == "--output-dir" else word for word in words]


# ------------------------------------------------------------------------------------------------ the loop, written out
def learning_rate(case: Case, step: int, total: int) -> float:
    """Of update `step`, the first is 0: from 0 in a line to the peak, then down. The cosine reaches its end with the
    last update; COYO-ViT's cosine and power of what is left would reach it one update later."""
    if step < WARMUP:
        return LR * step / WARMUP
    if case.schedule == "cosine":
        share = (1 + math.cos(math.pi * (step - WARMUP) / (total - 1 - WARMUP))) / 2
    elif case.schedule == "vit_cosine":
        share = (1 + math.cos(math.pi * (step - WARMUP) / (total - WARMUP))) / 2
    else:
        share = (1 - (step - WARMUP) / (total - WARMUP)) ** 2
    return MIN_LR + (LR - MIN_LR) * share


def is_decayed(case: Case, name: str, value: Tensor) -> bool:
    """Matrices; the original decays everything. Not the class token and positions."""
    return case.original or (value.ndim >= 2 and name not in ("cls_token", "pos_embed"))


@torch.no_grad()
def take_step(
    case: Case, name: str, value: nn.Parameter, grad: Tensor, memory: dict, lr: float
) -> None:
    """AdamW or SGD on one parameter; memory: its moments by name.

    Keras (original): the epsilon stands beside the uncorrected root, the decay comes first, and the velocity of SGD
    holds the learning rates of its time.
    """
    if case.sgd:
        velocity = memory.get(name, torch.zeros_like(grad))
        velocity = MOMENTUM * velocity + (lr * grad if case.original else grad)
        memory[name] = velocity
        value.sub_(velocity if case.original else lr * velocity)
        return
    first, second, count = memory.get(name, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
    beta1, beta2 = BETAS
    count += 1
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    memory[name] = (first, second, count)
    if is_decayed(case, name, value):
        value.mul_(1 - lr * DECAY)
    corrected_first, root = first / (1 - beta1**count), (second / (1 - beta2**count)).sqrt()
    if case.original:
        value.sub_(
            lr * math.sqrt(1 - beta2**count) / (1 - beta1**count) * first / (second.sqrt() + EPS)
        )
    else:
        value.sub_(lr * corrected_first / (root + EPS))


def dense(batch: Batch, classes: int) -> Tensor:
    """Targets [B,C] of lists of labels and their weights."""
    target = torch.zeros(len(batch["labels"]), classes)
    for row, (labels, weights) in enumerate(
        zip(batch["labels"].tolist(), batch["label_weights"].tolist(), strict=True)
    ):
        for label, weight in zip(labels, weights, strict=True):
            target[row, label] += weight
    return target


def loss_of(case: Case, logits: Tensor, batch: Batch) -> Tensor:
    """Softmax cross-entropy, or binary cross-entropy summed over the classes; the mean over the images."""
    target = dense(batch, logits.shape[1])
    if case.fine_tuning:
        target = target * (1 - SMOOTHING) + SMOOTHING / logits.shape[1]
        return -(target * logits.log_softmax(1)).sum(1).mean()
    target = target * (1 - SMOOTHING) + SMOOTHING / 2
    chances = logits.sigmoid()
    return -(target * chances.log() + (1 - target) * (1 - chances).log()).sum(1).mean()


@torch.no_grad()
def follow(case: Case, student: nn.Module, updates: int) -> None:
    """The moving average of the weights and of the statistics of batch norms, after so many updates."""
    k = updates - case.ema_start
    decay = min(case.ema_decay, (1 + k) / (10 + k)) if k >= 0 else 0.0
    own = state_of(student)
    for name, value in [*student.ema.named_parameters(), *student.ema.named_buffers()]:
        if value.is_floating_point():
            value.copy_(decay * value + (1 - decay) * own[name])


# ------------------------------------------------------------------------------------------------ comparison
def compare(found: State, expected: nn.Module, start: State, what: str) -> None:
    """All parameters and buffers, the average's too, measured by how far each is from where it was."""
    for name, value in state_of(expected).items():
        moved = (value - start[name]).float().norm()
        close(found[name], value, moved, LR, f"{what}: {name}")


def check_loop(record: Record, batches: list[list[Batch]], case: Case, alone: bool) -> None:
    """Every update of a record against the loop. batches[update][micro-batch]: the rows of all processes."""
    student, memory = copy.deepcopy(record.network).train(), {}
    total = len(record.updates)
    if case.ema_decay:
        check_start_of_average(case, state_of(student))
    weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
    logged = [line for line in record.log if "loss" in line]
    for step, update in enumerate(record.updates):
        what, lr = f"update {step + 1}", learning_rate(case, step, total)
        start = state_of(student)
        for name, value in weights.items():
            assert update.option(name) == pytest.approx(lr, rel=1e-9), (what, name)
            decay = DECAY if is_decayed(case, name, value) and not case.sgd else 0.0
            assert update.option(name, "weight_decay") == decay, (what, name)
        assert logged[step]["lr"] == pytest.approx(lr, rel=1e-9), what
        micro_losses = []
        for call, batch in zip(update.calls, batches[step], strict=True):
            if alone:
                torch.set_rng_state(call.random[0])
            micro_losses.append(loss_of(case, student.logits(batch["image"]), batch))
        loss = torch.stack(micro_losses).mean()
        loss.backward()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4), what

        grads = {name: p.grad for name, p in weights.items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), what
        grads = check_gradients(update.gradients, grads, case.clip_norm, what)
        for name, grad in grads.items():
            take_step(case, name, weights[name], grad, memory, lr)
        compare(update.after, student, start, f"{what}, after the optimizer")
        if case.ema_decay:
            follow(case, student, step + 1)
        student.zero_grad()
        following = record.updates[step + 1].calls[0].state if step + 1 < total else record.final
        compare(following, student, start, f"{what}, in the end")
        load(student, following)  # so that rounding does not grow


def check_start_of_average(case: Case, start: State) -> None:
    """The average begins with the network's weights, that of the original with zeros."""
    for name, value in start.items():
        if name.startswith("ema.") and value.is_floating_point():
            own = start[name.removeprefix("ema.")]
            zero = case.original and "running" not in name
            assert torch.equal(value, torch.zeros_like(own) if zero else own), name


def check_export(record: Record, folder: Path, case: Case) -> None:
    """model.safetensors holds the average where there is one."""
    prefix = "ema." if case.ema_decay else ""
    exported = load_file(folder / "model.safetensors")
    assert exported.keys() == {name for name in record.final if not name.startswith("ema.")}
    for name, value in exported.items():
        assert torch.equal(value, record.final[prefix + name]), name


# ------------------------------------------------------------------------------------------------ mixtures
def check_mixing(case: Case, raw: Batch, mixed: Batch) -> list[float]:
    """That a batch is `raw` mixed with itself in reverse order; the shares of one's own image."""
    assert raw["image"].shape == mixed["image"].shape
    rows = len(raw["image"])
    middle = rows // 2 if case.mixup and case.cutmix else 0
    parts = [slice(0, middle), slice(middle, rows)] if middle else [slice(0, rows)]
    shares = []
    for number, part in enumerate(parts):
        own, found = (
            {name: value[part] for name, value in batch.items()} for batch in (raw, mixed)
        )
        if case.mixup and number == 0:
            shares += check_mixup(own, found)
        else:
            shares += check_cutmix(own, found, case)
    return shares


def check_labels(raw: Batch, mixed: Batch, shares: list[float]) -> None:
    classes = int(max(raw["labels"].max(), mixed["labels"].max())) + 1
    own, found = dense(raw, classes), dense(mixed, classes)
    share = torch.tensor(shares)[:, None]
    torch.testing.assert_close(found, share * own + (1 - share) * own.flip(0), rtol=0, atol=1e-4)


def check_mixup(raw: Batch, mixed: Batch) -> list[float]:
    """share · own + (1 - share) · partner, of images and labels, with a share of at least a half for each image."""
    shares = []
    for own, partner, found in zip(raw["image"], raw["image"].flip(0), mixed["image"], strict=True):
        apart = own - partner
        share = ((found - partner) * apart).sum() / apart.square().sum()
        torch.testing.assert_close(found, share * own + (1 - share) * partner, rtol=0, atol=1e-4)
        shares.append(share.item())
    assert min(shares) >= 0.5 - 1e-5 and max(shares) <= 1 + 1e-5
    check_labels(raw, mixed, shares)
    return shares


def check_cutmix(raw: Batch, mixed: Batch, case: Case) -> list[float]:
    """A rectangle of the partner in one's own image, and labels by area (original: by the mean area of the batch)."""
    areas = []
    for own, partner, found in zip(raw["image"], raw["image"].flip(0), mixed["image"], strict=True):
        changed = (found != own).any(0)
        area = 0
        if changed.any():
            rows, columns = (changed.any(dim).nonzero().flatten() for dim in (1, 0))
            inside = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            assert torch.equal(found[inside], partner[inside]), "not a rectangle of the partner"
            area = found[inside][0].numel()
        areas.append(area / own[0].numel())
    if case.original:
        areas = [sum(areas) / len(areas)] * len(areas)
    shares = [1 - area for area in areas]
    check_labels(raw, mixed, shares)
    return shares


# ------------------------------------------------------------------------------------------------ tests
def given(record: Record) -> list[list[Batch]]:
    """The batches that the network was given: [update][micro-batch]."""
    names = ("image", "labels", "label_weights")
    return [
        [{name: call.inputs[name] for name in names} for call in update.calls]
        for update in record.updates
    ]


def joined(batches: list[Batch]) -> Batch:
    """The rows of all processes; labels without a weight are filled up."""
    longest = max(batch["labels"].shape[1] for batch in batches)
    result = {"image": torch.cat([batch["image"] for batch in batches])}
    for name in ("labels", "label_weights"):
        rows = [
            nn.functional.pad(batch[name], (0, longest - batch[name].shape[1])) for batch in batches
        ]
        result[name] = torch.cat(rows)
    return result


def batches_of_a_run(flags: list[str]) -> list[list[Batch]]:
    return given(record_main("Classification.py", flags))


def check_mixtures(case: Case, raw: list[list[Batch]], own: list[list[Batch]]) -> list[float]:
    """Every micro-batch is mixed by shares of its own; the shares."""
    shares = []
    for raw_micros, mixed_micros in zip(raw, own, strict=True):
        for before, mixed in zip(raw_micros, mixed_micros, strict=True):
            found = check_mixing(case, before, mixed)
            assert min(found) < 0.99, "a micro-batch is not mixed"
            shares += found
    micro_batches = sum(len(micros) for micros in own)
    least = micro_batches if case.original else micro_batches + 1  # the original's are alike in one
    assert len(set(shares)) >= least, "all shares are alike"
    assert sum(shares) / len(shares) < 0.97, "hardly anything is mixed"
    return shares


def run_and_check(case: Case, flags: list[str], plain: list | None, folder: Path) -> None:
    """On every rank: the script, then all of it against the loop. plain: the batches of every rank
    without mixing."""
    record = record_main("Classification.py", flags)
    own = given(record)
    raw = plain[record.rank] if plain else own
    shares = check_mixtures(case, raw, own) if plain else []
    if not case.original:
        check_pixels(raw[0][0]["image"], CLIP)
    with process_group():
        mine = {"batches": own, "random": record.updates[0].calls[0].random[0], "shares": shares}
        ranks = gather(mine)
        states = gather([float(value.double().abs().sum()) for value in record.final.values()])
    assert all(state == states[0] for state in states), "processes end with different weights"
    first = ranks[0]
    for rank in ranks[1:]:
        images = [each["batches"][0][0]["image"] for each in (rank, first)]
        assert not torch.equal(*images), "processes see the same images"
        assert not torch.equal(rank["random"], first["random"]), "the same random numbers twice"
        assert not plain or rank["shares"] != first["shares"]
    if record.rank == 0:
        updates = zip(*(rank["batches"] for rank in ranks), strict=True)
        batches = [
            [joined(list(micro)) for micro in zip(*update, strict=True)] for update in updates
        ]
        check_loop(record, batches, case, alone=len(ranks) == 1)
        check_export(record, folder, case)


def run(case: Case, data: Path, folder: Path, processes: int = 1, **changes) -> None:
    case = replace(case, noise=case.noise and processes == 1)
    flags = flags_of(case, data, folder / "run", **changes)
    plain = None
    if case.mixup or case.cutmix:
        same = replace(case, mixup=0.0, cutmix=0.0)
        words = flags_of(same, data, folder / "plain", **changes)
        plain = on_processes(processes, batches_of_a_run, words)
    on_processes(processes, run_and_check, case, flags, plain, folder / "run")


@pytest.mark.parametrize("case", CASES)
def test_one_process(case, digitscenes, tmp_path):
    run(CASES[case], digitscenes, tmp_path)


@pytest.mark.parametrize("case", ["pre-training", "fine-tuning"])
def test_two_micro_batches(case, digitscenes, tmp_path):
    run(CASES[case], digitscenes, tmp_path, batch_size=4, accumulate=2)


# each process mixes and moves as one does; what they share is in the others
ALIKE = ("both mixtures", "original fine-tuning")


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in CASES],
)
def test_two_processes_with_two_micro_batches(case, digitscenes, tmp_path):
    run(CASES[case], digitscenes, tmp_path, processes=2, batch_size=4, accumulate=2)
