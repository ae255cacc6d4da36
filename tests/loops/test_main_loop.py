"""main.py's own loop for every method, against the loop written out here: on one process, on two,
with accumulation.

The script runs whole (`tests.helpers.loops`). The reference takes the batches that the network was
given, the network's features and its weights at the start; the rest is computed here: losses
(`dual_losses`), means over micro-batches and processes, clipping, learning rates, AdamW or LAMB,
the momentum teacher, frozen prototypes, clamped temperatures.
Sources: CLIP-rocket (Fini et al. 2023), SLIP (Mu et al. 2021), SigLIP (Zhai et al. 2023),
COYO-ALIGN.
"""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.dual_encoder import factory
from tests.helpers.loops import (
    ROOT,
    Call,
    Record,
    State,
    load,
    on_processes,
    process_group,
    record_main,
    state_of,
)
from tests.helpers.main_runs import arguments
from tests.loops import dual_losses as losses
from tests.loops.common import HALF, IMAGENET, check_gradients, check_pixels, close, gather

LR, LR_START, LR_END, WARMUP = 0.01, 0.002, 0.0005, 2
DECAY, BETAS = 0.3, (0.9, 0.98)
EPS = 1e-2  # larger than usual: Adam's steps then tell how large gradients are
LARGEST = math.log(100)  # of a temperature's scale
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A method, what its command line says, and what follows from that."""

    loss: Callable[[losses.Features, nn.Module, "Case"], Tensor]
    flags: tuple[str, ...]
    noise: tuple[str, ...] = ()  # flags of dropout and the like, for one process alone
    summed: bool = True  # --loss-avg-or-sum sum, of configs/main/debug.yaml
    smoothing: float = 0.1  # --label-smoothing, likewise
    tau: float | None = None  # momentum of the teacher, if there is one
    frozen_prototypes: int = 0  # updates
    clip_norm: float | None = None
    original: bool = False
    lamb: bool = False
    cached: bool = False


TEXT_NOISE = ("--text-dropout-prob", "0.3", "--text-drop-path-prob", "0.2")  # of local texts
CASES = {
    "CLIP": Case(losses.clip, ("--model", "CLIP_VITT8_CLIP"), clip_norm=0.5),
    "SigLIP": Case(losses.siglip, ("--model", "CLIP_VITT8_SIGLIP")),
    "CL2L": Case(losses.cl2l, ("--model", "CL2L_VITT8_CL2L"), TEXT_NOISE),
    "CL2L, mean of both directions": Case(
        losses.cl2l,
        ("--model", "CL2L_VITT8_CL2L", "--loss-avg-or-sum", "avg", "--label-smoothing", "0"),
        summed=False,
        smoothing=0.0,
    ),
    "SiamLIP": Case(losses.siamlip, ("--model", "CL2L_VITT8_SIAMLIP"), TEXT_NOISE),
    "BYOLIP": Case(
        losses.siamlip,
        ("--model", "CL2L_VITT8_SIAMLIP", "--momentum", "--momentum-tau", "0.8"),
        tau=0.8,
    ),
    "BarLIP": Case(
        losses.barlip, ("--model", "CL2L_VITT8_BARLIP", "--barlip-scale-loss", "0.025"), TEXT_NOISE
    ),
    "SwALIP": Case(
        losses.swalip,
        ("--model", "CL2L_VITT8_SWALIP", "--label-smoothing", "0", "--swalip-weight", "0.7"),
        TEXT_NOISE,
        smoothing=0.0,
    ),
    "SWALIPV1": Case(
        losses.swalipv1,
        (
            "--model",
            "CLIP_VITT8_SWALIPV1",
            "--swalip-freeze-proto-iters",
            "2",
            "--swalip-weight",
            "0.7",
        ),
        frozen_prototypes=2,
    ),
    "SLIP": Case(losses.slip, ("--model", "SLIP_VITT8", "--ssl-scale", "0.6")),
    "SimCLR": Case(losses.simclr, ("--model", "SIMCLR_VITT8", "--separate-proj", "false")),
    "ALIGN": Case(
        losses.align,
        ("--scalar-lr-scale", "0.5", "--lr-scales", "text_=0.2"),
        ("--bert-dropout", "0.1", "--drop-connect", "0.2"),
        lamb=True,
    ),
}


def flags_of(case: Case, data: Path, output: Path, **changes) -> list[str]:
    """Command line of four updates of a method."""
    values = {
        "epochs": "4 steps",
        "warmup_epochs": f"{WARMUP} steps",
        "lr": LR,
        "lr_start": LR_START,
        "lr_end": LR_END,
        "wd": DECAY,
        "betas": BETAS,
        "eps": EPS,
        "val_folder": "none",
        "save_every": "100 steps",
    }
    if case.lamb:
        values["lr_start"] = values["lr_end"] = 0.0
        values["config"] = ROOT / "configs/main/debug_align.yaml"
        values["tokenizer"], values["shards"] = data / "tokenizer", data / "tfrecord/train"
    if case.clip_norm:
        values["clip_grad_norm"] = case.clip_norm
    values |= changes
    values["betas"] = list(values["betas"])
    words = arguments(data, output, *case.flags, **values)
    if case.lamb:  # which has shards alone
        for name in ("--metadata", "--root", "--bpe-path"):
            place = words.index(name)
            del words[place : place + 2]
    return ["--output_dir" if word == "--output-dir" else word for word in words]


# ------------------------------------------------------------------------------------------------ the loop, written out
def learning_rate(case: Case, step: int, total: int) -> float:
    """Of update `step`, the first is 0. CLIP-rocket: the warm-up reaches both its ends, then a
    cosine that begins at the peak again and would be at its end behind the last update. ALIGN: in a
    line from 0 to the peak, then to 0."""
    done = (step - WARMUP) / (total - WARMUP)
    if case.lamb:
        return LR * step / WARMUP if step < WARMUP else LR * (1 - done)
    if step < WARMUP:
        return torch.linspace(LR_START, LR, WARMUP, dtype=torch.float64)[step].item()
    return LR_END + 0.5 * (LR - LR_END) * (1 + math.cos(math.pi * done))


def share_of_rate(case: Case, name: str) -> float:
    """What --lr-scales and --scalar-lr-scale make of the learning rate of a parameter."""
    if not case.lamb:
        return 1.0
    if name == "temperature":
        return 0.5
    return 0.2 if name.startswith("text_") else 1.0


def is_decayed(case: Case, name: str, value: Tensor) -> bool:
    if case.lamb:  # all but the batch norms of EfficientNet
        return not (name.startswith("vision_model") and ("norm" in name or "_bn" in name))
    free = ("positional_embedding", "token_embedding", "cls_token", "pos_embed")
    if case.original:
        free = ("bias", "ln", "bn")
    return value.ndim >= 2 and not any(part in name for part in free)


@torch.no_grad()
def take_step(
    case: Case, name: str, value: nn.Parameter, grad: Tensor, memory: dict, lr: float
) -> None:
    """AdamW (Loshchilov 2019) or LAMB (You 2020) on one parameter; memory: its moments, by name."""
    first, second, count = memory.get(name, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
    beta1, beta2 = BETAS
    count += 1
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    memory[name] = (first, second, count)
    direction = (first / (1 - beta1**count)) / ((second / (1 - beta2**count)).sqrt() + EPS)
    if is_decayed(case, name, value):
        direction = direction + DECAY * value
        if case.lamb and value.norm() > 0 and direction.norm() > 0:
            direction = direction * value.norm() / direction.norm()
    value.sub_(lr * direction)


# ------------------------------------------------------------------------------------------------ features
Part = tuple[
    Batch, tuple
]  # what one process gave to its network in a forward pass, and its generators then


def part_of(call: Call) -> Part:
    given = dict(call.inputs)
    for value in call.inputs.values():  # what the network takes as **batch
        given.update(value if isinstance(value, dict) else {})
    return {
        name: given[name] for name in ("image", "image_local", "text_ids") if name in given
    }, call.random


def joined(batches: list[Batch]) -> Batch:
    """The rows of all processes in turns, so that virtual batches are what they were; texts padded
    to one length."""
    result = {}
    for name in batches[0]:
        rows = [batch[name] for batch in batches]
        if name == "text_ids":
            longest = max(each.shape[-1] for each in rows)
            rows = [nn.functional.pad(each, (0, longest - each.shape[-1])) for each in rows]
        result[name] = torch.stack(rows, 1).flatten(0, 1)
    return result


def features_of(student: nn.Module, batch: Batch, case: Case) -> losses.Features:
    """The network's, and the targets of predictors: the teacher's, who sees the same batch, or its
    own."""
    targets = {}
    if case.tau is not None:
        with torch.no_grad():
            targets = student.momentum_model.features(**batch)
    out = student.features(**batch)
    return out | {
        f"target_{name}": value for name, value in (targets or out).items() if name.startswith("v_")
    }


def losses_of(student: nn.Module, parts: list[list[Part]], case: Case) -> list[Tensor]:
    """The loss of every micro-batch; parts[process][micro-batch]. Cached features: one loss of them
    all."""
    alone = len(parts) == 1
    if case.cached:
        every = []
        for batch, generators in (part for own in parts for part in own):
            torch.set_rng_state(generators[0])
            every.append(features_of(student, batch, case))
        out = {
            name: torch.cat([each[name] for each in every])
            for name, first in every[0].items()
            if first.ndim
        }
        return [case.loss(out, student, case)]
    result = []
    for micro in zip(*parts, strict=True):
        if alone:
            torch.set_rng_state(micro[0][1][0])
        out = features_of(student, joined([batch for batch, _ in micro]), case)
        result.append(case.loss(out, student, case))
    return result


# ------------------------------------------------------------------------------------------------ comparison
def moved(name: str, value: Tensor, start: State) -> Tensor:
    return (value.detach() - start[name]).float().norm()


def check_loop(record: Record, parts: list[list[list[Part]]], case: Case) -> None:
    """Every update of a record against the loop. parts[update][process][micro-batch]."""
    student, memory = copy.deepcopy(record.network).train(), {}
    total = len(record.updates)
    weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
    logged = [line for line in record.log if "loss" in line]
    assert len(logged) == total
    for step, update in enumerate(record.updates):
        what, lr = f"update {step + 1}", learning_rate(case, step, total)
        start = state_of(student)
        assert logged[step]["lr"] == pytest.approx(lr, rel=1e-9), what
        for name in weights:
            assert update.option(name) == pytest.approx(lr * share_of_rate(case, name), rel=1e-9), (
                what,
                name,
            )
            decay = DECAY if is_decayed(case, name, weights[name]) else 0.0
            assert update.option(name, "weight_decay") == decay, (what, name)

        micro_losses = losses_of(student, parts[step], case)
        loss = torch.stack(micro_losses).mean()
        loss.backward()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4), what

        grads = {name: p.grad for name, p in weights.items() if p.grad is not None}
        if step < case.frozen_prototypes:
            grads = {name: grad for name, grad in grads.items() if not name.endswith("weight_v")}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), what
        grads = check_gradients(update.gradients, grads, case.clip_norm, what)
        for name, grad in grads.items():
            take_step(case, name, weights[name], grad, memory, lr * share_of_rate(case, name))
        for name, value in student.named_parameters():
            size = moved(name, value, start)
            close(update.after[name], value, size, LR, f"{what}: {name} after the optimizer")

        follow_and_clamp(student, case)
        student.zero_grad()
        following = record.updates[step + 1].calls[0].state if step + 1 < total else record.final
        own = state_of(student)
        for name in set(own) - set(dict(student.named_parameters())):
            if name.startswith(
                "momentum_model."
            ):  # its statistics have seen the next batch by then
                following = {**following, name: own[name]}
        for name, value in own.items():
            size = moved(name, value, start)
            close(following[name], value, size, LR, f"{what}: {name} in the end")
        load(student, following)  # so that rounding does not grow


@torch.no_grad()
def follow_and_clamp(student: nn.Module, case: Case) -> None:
    """What follows an update: the teacher, of all parameters, and then the temperatures' limits."""
    own = dict(student.named_parameters())
    if case.tau is not None:
        for name, value in student.momentum_model.named_parameters():
            value.copy_(case.tau * value + (1 - case.tau) * own[name])
    for name in ("logit_scale", "l2l_logit_scale"):
        if name in own and not case.lamb:
            own[name].clamp_(0, LARGEST)


def digest(record: Record) -> str:
    """Of the parameters after every update and in the end."""
    names = [name for name, _ in record.network.named_parameters()]
    states = [*(update.after for update in record.updates), record.final]
    return hashlib.sha256(
        b"".join(state[name].numpy().tobytes() for state in states for name in names)
    ).hexdigest()


def record_small(flags: list[str]) -> Record:
    """Of main.py with one narrow block in its ViT: more do the same once more."""
    with mock.patch.dict(factory.VITS, VITT8=(32, 1, 2, 8)):
        return record_main("main.py", flags)


def run_and_check(case: Case, flags: list[str]) -> Record | None:
    """On every rank: the script, then all of it against the loop."""
    record = record_small(flags)
    own = [[part_of(call) for call in update.calls] for update in record.updates]
    for name in {"image", "image_local"} & set(own[0][0][0]):
        check_pixels(own[0][0][0][name], HALF if case.lamb else IMAGENET)
    with process_group():
        everyone, digests = gather(own), gather(digest(record))
    assert len(set(digests)) == 1, "processes end with different weights"
    firsts = [parts[0][0] for parts in everyone]
    for batch, generators in firsts[1:]:
        assert not torch.equal(batch["image"], firsts[0][0]["image"]), (
            "processes see the same images"
        )
        assert not torch.equal(generators[0], firsts[0][1][0]), (
            "processes draw the same random numbers"
        )
    if record.rank == 0:
        check_loop(record, [list(parts) for parts in zip(*everyone, strict=True)], case)
    return record if len(everyone) == 1 else None


# ------------------------------------------------------------------------------------------------ tests
@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def noisy(case: Case) -> Case:
    return replace(case, flags=(*case.flags, *case.noise))


@pytest.mark.parametrize("method", CASES)
def test_one_process(method, digitscenes, tmp_path):
    case = noisy(CASES[method])
    changes = (
        {"peak_tflops": 1} if method == "CL2L" else {}
    )  # FLOPs are counted where the MFU is reported
    record = run_and_check(case, flags_of(case, digitscenes, tmp_path / "run", **changes))
    assert ("mfu" in record.log[-1]) == bool(changes)


@pytest.mark.parametrize("method", ["CLIP", "CL2L", "BYOLIP", "ALIGN"])
def test_two_micro_batches(method, digitscenes, tmp_path):
    """Each is a contrastive batch of its own; their gradients are averaged. Validation in between
    changes nothing."""
    case = noisy(CASES[method])
    changes = {"batch_size": 4, "accumulate": 2, "epochs": "3 steps"}
    if method == "CL2L":
        changes["val_folder"], changes["eval_every"] = digitscenes / "imagefolder/val", "1 steps"
    run_and_check(case, flags_of(case, digitscenes, tmp_path / "run", **changes))


# SiamLIP's loss is BYOLIP's, and SimCLR's is in SLIP's; a mean of two is taken on each process alone
ALIKE = ("SiamLIP", "SimCLR", "CL2L, mean of both directions")


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in CASES],
)
def test_two_processes_with_two_micro_batches(method, digitscenes, tmp_path):
    """A contrastive batch and its statistics are those of both processes."""
    case = CASES[method]
    flags = flags_of(
        case, digitscenes, tmp_path / "run", batch_size=4, accumulate=2, epochs="3 steps"
    )
    on_processes(2, run_and_check, case, flags)


CACHED = Case(
    losses.cl2l,
    ("--model", "CL2L_VITT8_CL2L", "--cl2l-img-proj-type", "linear", "--cl2l-txt-proj-type", "linear", *TEXT_NOISE,
     "--cache-features"),
    cached=True,
)  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_cached_features(processes, digitscenes, tmp_path):
    """All micro-batches of all processes are one contrastive batch; each is embedded twice with the
    same noise."""
    flags = flags_of(
        CACHED, digitscenes, tmp_path / "run", batch_size=4, accumulate=2, epochs="3 steps"
    )
    on_processes(processes, run_and_check, CACHED, flags)


@pytest.mark.parametrize("method", ["CL2L", "BYOLIP"])
def test_temperatures_are_clamped(method, digitscenes, tmp_path):
    """From 5.0 and -0.5 to ln 100 and 0 after the first update; a teacher follows what was there
    before."""
    case = CASES[method]
    plain = replace(case, tau=None, flags=case.flags[:2])
    record_small(
        flags_of(plain, digitscenes, tmp_path / "first", epochs="1 steps", warmup_epochs=0)
    )
    weights = load_file(tmp_path / "first/model.safetensors")
    weights["logit_scale"], weights["l2l_logit_scale"] = torch.tensor(5.0), torch.tensor(-0.5)
    save_file(weights, tmp_path / "start.safetensors")
    flags = flags_of(
        case,
        digitscenes,
        tmp_path / "run",
        epochs="3 steps",
        checkpoint=tmp_path / "start.safetensors",
    )
    record = run_and_check(case, flags)
    after = record.updates[1].calls[0].state
    assert (
        after["logit_scale"].item() == pytest.approx(4.6052, abs=1e-4)
        and after["l2l_logit_scale"].item() == 0
    )


def test_weight_decay_of_the_original(digitscenes, tmp_path):
    """Everything of two and more dimensions but what has `bias`, `ln` or `bn` in its name:
    embeddings, too."""
    case = replace(
        CASES["CLIP"], flags=(*CASES["CLIP"].flags, "--compat", "original"), original=True
    )
    run_and_check(case, flags_of(case, digitscenes, tmp_path / "run", epochs="3 steps"))


def test_scaled_gradients_are_unscaled_before_they_are_clipped(digitscenes, tmp_path, monkeypatch):
    """As fp16 has it, whose scaler runs on the CPU, too: the limit is one of true gradients."""
    ready = torch.amp.GradScaler.__init__

    def enabled(self, device, *args, **kwargs):
        ready(self, device, init_scale=1024.0, growth_interval=1000, enabled=True)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", enabled)
    case = CASES["CLIP"]
    record = run_and_check(case, flags_of(case, digitscenes, tmp_path / "run", epochs="3 steps"))
    assert len(record.updates) == 3


def test_a_resumed_run_obeys_its_command_line(digitscenes, tmp_path):
    """Options of the optimizer are those given now, not those of the checkpoint; so are its groups:
    the original decays position embeddings."""
    case = CASES["SigLIP"]
    flags = {"data": digitscenes, "output": tmp_path / "run"}
    first = record_small(flags_of(case, **flags, max_steps=2))
    changes = {"wd": 0.1, "betas": (0.8, 0.95), "eps": 0.02, "compat": "original"}
    changes["resume"] = "yes"  # a run of other rules is continued only where that is asked for
    again = record_small(flags_of(case, **flags, **changes))
    assert [len(record.updates) for record in (first, again)] == [2, 2]
    resumed = again.updates[0]
    expected = {
        "positional_embedding": 0.1,
        "visual.blocks.0.mlp.fc1.weight": 0.1,
        "visual.blocks.0.mlp.fc1.bias": 0.0,
    }
    for name, decay in expected.items():
        found = [resumed.option(name, option) for option in ("weight_decay", "betas", "eps")]
        assert found == [decay, (0.8, 0.95), 0.02]
