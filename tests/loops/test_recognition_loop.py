"""Recognition.py's own loop against the loop written out here: on one process, on two, with
accumulation.

The script runs whole (`tests.helpers.loops`). The reference takes the batches that the network was
given, its logits and its weights at the start; losses, their weights, means over the targets of all
processes and micro-batches, clipping, learning rates, AdamW and what stays frozen are computed
here. Source: NXTP (Yue et al. 2024).
"""

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.loops import Record, load, on_processes, process_group, record_main, state_of
from tests.helpers.recognition_runs import arguments
from tests.loops.common import CLIP, check_gradients, check_pixels, close, gather

LR, MIN_LR, WARMUP = 0.01, 0.001, 2
DECAY, BETAS = 0.3, (0.9, 0.98)
EPS = 1e-2  # larger than usual: Adam's steps then tell how large gradients are
IGNORED = -100  # label of a position without a target
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A way to train, what its command line says, and what follows from that."""

    changes: dict = field(default_factory=dict)
    caption_weight: float = 0.0
    clip_norm: float | None = None
    original: bool = False
    projection_share: float = 1.0  # of the learning rate, for the tower's projection (--lr-scales)
    trained_blocks: int | None = None  # of the image tower's two; None: the whole tower


CASES = {
    "captions": Case(
        {"train_vision_blocks": 1}, caption_weight=0.25, clip_norm=0.5, trained_blocks=1
    ),
    "original": Case(
        {
            "compat": "original",
            "scheduler.sched": "nxtp",
            "train_vision_blocks": 1,
            "decouple_labels": "false",
            "optimizer.lr_scales": "vision_encoder.proj=0.5",
        },
        original=True,
        projection_share=0.5,
        trained_blocks=1,
    ),
    "ResNet": Case({"resnet": [8, 1, 1]}, caption_weight=0.25, clip_norm=0.5),
}


def flags_of(case: Case, data: Path, output: Path, **changes) -> list[str]:
    """Command line of four updates."""
    values = {
        "batch_size": 8,
        "scheduler.epochs": "4 steps",
        "scheduler.warmup": f"{WARMUP} steps",
        "scheduler.min_lr": MIN_LR,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "optimizer.clip_grad_norm": case.clip_norm or "none",
        "caption_weight": case.caption_weight,
        "val": "none",
        "test": "none",
        "log_every": 1,
        "save_every": "100 steps",
    }
    return arguments(data, output, **{**values, **case.changes, **changes})


# ----------------------------------------------------------------------------- the loop, written out
def learning_rate(case: Case, step: int, total: int) -> float:
    """Of update `step`, the first is 0. A line from 0 to the peak, then a cosine that ends with the
    last update. The original sets a step's rate behind that step: the first has the peak, all others
    lag by one, and the cosine would end one update later."""
    if case.original:
        if step == 0:
            return LR
        step -= 1
        if step <= WARMUP:
            return LR * step / WARMUP
        done = (step - WARMUP) / (total - WARMUP)
    else:
        if step < WARMUP:
            return LR * step / WARMUP
        done = (step - WARMUP) / (total - 1 - WARMUP)
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2


def is_trained(case: Case, name: str) -> bool:
    """The decoder; of the tower the projection, the last norm and the last blocks, or everything."""
    tower = (
        "vision_encoder.proj.",
        "vision_encoder.ln_post.",
        "vision_encoder.transformer.resblocks.1.",
    )
    return case.trained_blocks is None or name.startswith(("language_decoder.", *tower))


def share_of_rate(case: Case, name: str) -> float:
    return case.projection_share if name.startswith("vision_encoder.proj.") else 1.0


def is_decayed(case: Case, name: str, value: Tensor) -> bool:
    """Matrices but for token and position embeddings; the original also decays the decoder's last
    norm."""
    is_embedding = "tok_embeddings" in name or "positional_embedding" in name
    matrix = value.ndim >= 2 and not is_embedding
    return matrix or (case.original and name == "language_decoder.norm.weight")


def cross_entropies(network: nn.Module, images: Tensor, batch: Batch) -> Tensor:
    """Of all targets of the batch; positions are those of the predicting tokens, flat in B * T."""
    states = network.states(images, batch["text_ids"], batch["segments"]).flatten(0, 1)
    chances = network.logits(states[batch["positions"]]).log_softmax(1)
    counted = batch["labels"] != IGNORED
    return -chances[counted].gather(1, batch["labels"][counted, None])


def loss_of(network: nn.Module, batches: list[Batch], case: Case) -> Tensor:
    """That of the labels + caption_weight times that of the captions, each the mean over the targets
    of all micro-batches."""
    labels = []
    captions = []
    for batch in batches:
        images = network.encode_image(batch["image"])
        labels.append(cross_entropies(network, images, batch))
        prefix = "caption_"
        caption = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        assert bool(caption) == bool(case.caption_weight), "captions nobody asked for, or none"
        if caption:
            captions.append(cross_entropies(network, images, caption))
    loss = torch.cat(labels).mean()
    return loss + case.caption_weight * torch.cat(captions).mean() if captions else loss


@torch.no_grad()
def take_step(value: nn.Parameter, grad: Tensor, moments: list, decay: float, lr: float) -> None:
    """AdamW (Loshchilov 2019) on one parameter; moments: first, second and how many updates so far."""
    beta1, beta2 = BETAS
    moments[0] = beta1 * moments[0] + (1 - beta1) * grad
    moments[1] = beta2 * moments[1] + (1 - beta2) * grad * grad
    moments[2] += 1
    first, second = moments[0] / (1 - beta1 ** moments[2]), moments[1] / (1 - beta2 ** moments[2])
    value.sub_(lr * (decay * value + first / (second.sqrt() + EPS)))


# ----------------------------------------------------------------------------- comparison
def check_loop(record: Record, batches: list[list[Batch]], case: Case) -> None:
    """Every update of a record against the loop. batches[update][micro-batch]: of all processes."""
    student = copy.deepcopy(record.network).train()
    total = len(record.updates)
    weights = {name: p for name, p in student.named_parameters() if is_trained(case, name)}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p), 0] for name, p in weights.items()}
    logged = [line for line in record.log if "loss" in line]
    for step, update in enumerate(record.updates):
        what, lr = f"update {step + 1}", learning_rate(case, step, total)
        start = state_of(student)
        assert sorted(weights) == sorted(name for group in update.groups for name in group.names)
        rates = {name: lr * share_of_rate(case, name) for name in weights}
        for name, value in weights.items():
            assert update.option(name) == pytest.approx(rates[name], rel=1e-9), (what, name)
            decay = DECAY if is_decayed(case, name, value) else 0.0
            assert update.option(name, "weight_decay") == decay, (what, name)
        assert logged[step]["lr"] == pytest.approx(lr, rel=1e-9), what

        loss = loss_of(student, batches[step], case)
        loss.backward()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4), what

        grads = {name: p.grad for name, p in weights.items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), what
        grads = check_gradients(update.gradients, grads, case.clip_norm, what)
        for name, grad in grads.items():
            decay = DECAY if is_decayed(case, name, weights[name]) else 0.0
            take_step(weights[name], grad, moments[name], decay, rates[name])
        student.zero_grad()
        following = record.updates[step + 1].calls[0].state if step + 1 < total else record.final
        for name, value in state_of(student).items():
            moved = (value - start[name]).float().norm()
            close(following[name], value, moved, LR, f"{what}: {name}")
            frozen = name not in weights and name in dict(student.named_parameters())
            assert not frozen or torch.equal(following[name], start[name]), f"{name} is not trained"
        load(student, following)  # so that rounding does not grow


# ----------------------------------------------------------------------------- batches
def given(record: Record) -> list[list[Batch]]:
    """The batches that the network was given: [update][micro-batch]."""
    result = []
    for update in record.updates:
        micros = []
        for call in update.calls:
            inputs = dict(call.inputs)
            for value in call.inputs.values():  # what the network takes as **caption
                inputs.update(value if isinstance(value, dict) else {})
            micros.append({k: v for k, v in inputs.items() if isinstance(v, Tensor)})
        result.append(micros)
    return result


def joined(parts: list[Batch]) -> Batch:
    """One batch of the rows of all processes: texts as long as the longest, positions moved along."""
    result = {"image": torch.cat([part["image"] for part in parts])}
    for prefix in ("", "caption_"):
        if f"{prefix}text_ids" not in parts[0]:
            continue
        longest = max(part[f"{prefix}text_ids"].shape[1] for part in parts)
        rows, collected = 0, {name: [] for name in ("text_ids", "segments", "positions", "labels")}
        for part in parts:
            ids, positions = part[f"{prefix}text_ids"], part[f"{prefix}positions"]
            length = ids.shape[1]
            filler = (0, longest - length)
            collected["text_ids"].append(nn.functional.pad(ids, filler))
            collected["segments"].append(
                nn.functional.pad(part[f"{prefix}segments"], filler, value=-1)
            )
            row = positions // length + rows
            collected["positions"].append(row * longest + positions % length)
            collected["labels"].append(part[f"{prefix}labels"])
            rows += len(ids)
        result.update({f"{prefix}{name}": torch.cat(values) for name, values in collected.items()})
    return result


def run_and_check(case: Case, flags: list[str]) -> None:
    """On every rank: the script, then all of it against the loop."""
    record = record_main("Recognition.py", flags)
    own = given(record)
    check_pixels(own[0][0]["image"], CLIP)
    with process_group():
        ranks = gather({"batches": own, "random": record.updates[0].calls[0].random[0]})
        states = gather([float(value.double().abs().sum()) for value in record.final.values()])
    assert all(state == states[0] for state in states), "processes end with different weights"
    for rank in ranks[1:]:
        assert not torch.equal(rank["batches"][0][0]["image"], own[0][0]["image"]) or record.rank
        assert not torch.equal(rank["random"], ranks[0]["random"]), "the same random numbers twice"
    if record.rank == 0:
        updates = zip(*(rank["batches"] for rank in ranks), strict=True)
        batches = [
            [joined(list(micro)) for micro in zip(*update, strict=True)] for update in updates
        ]
        check_loop(record, batches, case)


# ----------------------------------------------------------------------------- tests
@pytest.mark.parametrize("case", CASES)
def test_one_process(case, digitscenes, tmp_path):
    run_and_check(CASES[case], flags_of(CASES[case], digitscenes, tmp_path / "run"))


def test_two_micro_batches(digitscenes, tmp_path):
    """Every target counts the same; validation in between changes nothing."""
    case = replace(CASES["captions"], changes={}, trained_blocks=None)
    changes = {
        "batch_size": 4,
        "accumulate": 2,
        "val": digitscenes / "nxtp/val.list",
        "eval_every": "3 steps",
    }
    run_and_check(case, flags_of(case, digitscenes, tmp_path / "run", **changes))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_two_micro_batches(case, digitscenes, tmp_path):
    """Every target of all processes counts the same, and batch norms see all processes' images."""
    flags = flags_of(CASES[case], digitscenes, tmp_path / "run", batch_size=4, accumulate=2)
    on_processes(2, run_and_check, CASES[case], flags)
