"""Short optimisation runs of clip-rocket: our networks and losses in a plain loop against the
recorded trajectories."""

import copy

import pytest
import torch

from models.dual_encoder.base import names_by_decay
from models.dual_encoder.factory import build_dual
from models.layers.average import WeightAverage
from tests.golden.clip_cases import close, config_of, recipe_state, sum_and_norm, toy_vit, views_of
from tests.golden.report import same
from tests.helpers.clip_toys import with_total
from tests.helpers.golden import golden_json, golden_tensors, recorded

EXACT_STEPS = 6  # later losses reproduce to about 1e-3 only, says the golden README
LATER, CHANGE = 5e-3, 2e-2


def batches(tensors: dict, scale: float) -> list[dict]:
    """The recorded batches in order."""
    result = []
    for i in range(len([name for name in tensors if name.endswith(".image")])):
        local = torch.stack([tensors[name] for name in views_of(tensors, f"{i}.image_local.")], 1)
        image = tensors[f"{i}.image"].float() * scale
        result.append(
            {"image": image, "image_local": local.float() * scale, "text_ids": tensors[f"{i}.text"]}
        )
    return result


def flag(flags: list[str], name: str, default: str) -> str:
    return flags[flags.index(name) + 1] if name in flags else default


@pytest.mark.parametrize(
    "name", recorded("clip_rocket", "train", "trajectories.json", within="runs")
)
def test_trajectory(name):
    """Losses of every micro-batch and their means, and how far weights and statistics have moved.

    A run whose number of batches is no multiple of the accumulation leaves gradients over for its
    next epoch, as in the original, and is recorded up to the original's failure.
    """
    meta = golden_json("clip_rocket", "train", "trajectories.json")
    epoch = batches(
        golden_tensors("clip_rocket", "train", "batches.safetensors"), meta["image_scale"]
    )
    run, toy = meta["runs"][name], meta["config"]
    flags = run["flags"]
    model = build_dual(config_of(run["model"], flags, toy, compat="original"), toy_vit(toy)).train()
    shapes = {k: [list(v.shape), str(v.dtype)] for k, v in model.state_dict().items()}
    model.load_state_dict(recipe_state(shapes, toy["seed"], half=True))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = copy.deepcopy(model).requires_grad_(False) if "--momentum" in flags else None
    parameters = dict(model.named_parameters())
    decay, no_decay = (
        [parameters[n] for n in names] for names in names_by_decay(model, original=True)
    )
    weight_decay = float(flag(flags, "--wd", "0.1"))
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    if teacher:
        model.momentum_model = teacher
        average = WeightAverage([(teacher, model)])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-4)
    every = int(flag(flags, "--update-freq", "1"))
    seen: list[list[dict]] = []  # by epoch: what the original averages at each update
    rates: list[float] = []  # at the end of each epoch
    updates = 0
    for i, expected in enumerate(run["per_micro_batch"]):
        number, place = divmod(i, len(epoch))
        batch, rate = (
            epoch[place],
            run["lr_schedule"][number * (len(epoch) // every) + place // every],
        )
        if place == 0:
            seen.append([])
        if place + 1 == len(epoch):
            rates.append(rate)
        losses = with_total(model(**batch), model.config)
        (losses["loss"] / every).backward()
        same(f"train_{name}", "names of the losses", losses.keys(), expected.keys())
        for key, value in expected.items():
            tolerance = 1e-4 if i < EXACT_STEPS else LATER
            close(losses[key].detach(), value, f"train_{name} {key} of step {i}", tolerance)
        if (place + 1) % every == 0:
            for group in optimizer.param_groups:
                group["lr"] = rate
            updates += 1
            optimizer.step()
            optimizer.zero_grad()
            if teacher:
                average.update(float(flag(flags, "--momentum-tau", "0.99")))
            model.clamp_scales()
            logged = {key: float(value.detach()) for key, value in losses.items()}
            logged["loss"] /= every
            logged["logit_scale"] = float(model.logit_scale.detach().exp())
            seen[-1].append(logged)
    same(f"train_{name}", "micro-batches", len(run["per_micro_batch"]), run["micro_batches"])
    same(f"train_{name}", "updates", updates, run["optimizer_steps"])
    # a failed run has no means of its last epoch
    for stats, logged, rate in zip(run["epoch_stats"], seen, rates, strict=False):
        for key, theirs in stats.items():
            ours = rate if key == "lr" else sum(step[key] for step in logged) / len(logged)
            close(ours, theirs, f"train_{name} {key} of an epoch", LATER)
    least = 0.1 * sum(run["lr_schedule"][:updates])
    compare_change(
        f"train_{name} weights", dict(model.named_parameters()), start, run["final"], least
    )
    compare_change(
        f"train_{name} buffer", dict(model.named_buffers()), start, run["buffers"], least
    )
    if teacher:
        copies = dict(teacher.named_parameters()), dict(teacher.named_buffers())
        compare_change(f"train_{name} weights", copies[0], start, run["momentum_final"], least)
        compare_change(f"train_{name} buffer", copies[1], start, run["momentum_buffers"], least)


def compare_change(what: str, own: dict, start: dict, expected: dict, least: float) -> None:
    """The change of a tensor's sum and norm since the start, measured by the norm of the change.

    Weights that were not trained have no change to measure by, and fail. least: how far an element
    moves at the very least, for biases that have no gradient but rounding noise.
    """
    for key, theirs in expected.items():
        ours, before = own[key].detach().double(), start[key].double()
        moved = max(float((ours - before).norm()), least * ours.numel() ** 0.5)
        error = (sum_and_norm(ours) - torch.tensor(theirs, dtype=torch.float64)) / moved
        close(error, torch.zeros(2), f"{what} {key}", CHANGE)
