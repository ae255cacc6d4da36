"""Pretrain.py's own loop against a reference written out: SIMLA and ALBEF."""

import json
from pathlib import Path

import pytest

from tests.helpers.loops import ROOT, record_run
from tests.helpers.pretraining import arguments
from tests.loops.negatives import check_hard_negatives
from tests.loops.reference import Recipe, another_teacher, check_run, loss_scaling

ALBEF = ("loss_ita", "loss_itm", "loss_mlm")
SIMLA = (*ALBEF, "loss_mim", "loss_pseudo")
STEPS = 6


def flags(
    data: Path,
    out: Path,
    method: str,
    tokenizer: Path | str,
    dropout: float = 0.1,
    layers: int = 1,
    **changes,
) -> list[str]:
    """A run of six updates: two of warm-up, alpha reached with the fourth, strong decay, dropout.
    layers: of SIMLA's BERT; ALBEF's needs two."""
    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text())
    geometry["hidden_dropout_prob"] = dropout
    if method == "albef":
        geometry.pop("add_cross_attention")
        geometry["fusion_layer"] = 1
    else:
        geometry["num_hidden_layers"] = layers
    out.mkdir(parents=True)
    (out / "bert.json").write_text(json.dumps(geometry))
    values = {
        "method": method,
        "image_tokenizer_path": tokenizer if method == "simla" else "none",
        "bert_config": out / "bert.json",
        "vision_depth": 1,
        "device": "cpu",
        "batch_size": 4,
        "queue_size": 22,
        "momentum": 0.9,
        "alpha": 0.4,
        "alpha_ramp": "3 steps",
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.5,
        "optimizer.betas": "[0.8, 0.95]",
        "optimizer.eps": 1e-6,
        "optimizer.clip_grad_norm": 1.0,
        "optimizer.scalar_lr_scale": 0.03,
        "scheduler.epochs": f"{STEPS} steps",
        "scheduler.warmup": "2 steps",
        "save_every": "100 steps",
    }
    return arguments(data, tokenizer, out, **(values | changes))


def recipe(method: str, **changes) -> Recipe:
    values = {
        "losses": SIMLA if method == "simla" else ALBEF,
        "total": STEPS,
        "weight_decay": 0.5,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "clip": 1.0,
        "scalar_lr_scale": 0.03,
        "alpha_ramp": 3,
        "momentum": 0.9,
    }
    return Recipe(**(values | changes))


# processes, micro-batches, the limit of gradients
WORLDS = {"one process": (1, 1, None), "two processes, two micro-batches": (2, 2, 1.0)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", ["albef", "simla"])
def test_updates(method, world, digitscenes, image_tokenizer, tmp_path):
    processes, accumulate, clip = WORLDS[world]
    changes = {"accumulate": accumulate, "optimizer.clip_grad_norm": clip}
    given = flags(digitscenes, tmp_path / "run", method, image_tokenizer, **changes)
    check_run("Pretrain.py", given, recipe(method, accumulate=accumulate, clip=clip), processes)


def test_bf16(digitscenes, image_tokenizer, tmp_path):
    given = flags(digitscenes, tmp_path / "run", "simla", image_tokenizer, precision="bf16")
    check_run("Pretrain.py", given, recipe("simla", bf16=True))


def test_scaled_gradients_are_unscaled_before_they_are_clipped(
    digitscenes, image_tokenizer, tmp_path
):
    given = flags(
        digitscenes, tmp_path / "run", "albef", image_tokenizer, **{"optimizer.clip_grad_norm": 0.1}
    )
    with loss_scaling(STEPS):
        check_run("Pretrain.py", given, recipe("albef", clip=0.1))


def test_the_log_has_means_over_the_updates_since_the_last_line(digitscenes, tmp_path):
    for every in (1, 3):
        given = flags(digitscenes, tmp_path / str(every), "albef", "none", log_every=every)
        [record] = record_run("Pretrain.py", given)
        if every == 1:
            each = record.log
    assert [line["step"] for line in record.log] == [3, 6]
    for line, part in zip(record.log, (each[:3], each[3:]), strict=True):
        for name in ("loss", *ALBEF, "grad_norm"):
            assert line[name] == pytest.approx(
                sum(update[name] for update in part) / 3, rel=1e-5
            ), name


def test_the_teacher_moves_before_the_first_forward_pass(digitscenes, tmp_path):
    given = flags(digitscenes, tmp_path / "first", "albef", "none")
    [record] = record_run("Pretrain.py", [*given, "--max_steps", "1"])
    start = another_teacher(record, tmp_path / "start.pth")
    given = flags(
        digitscenes, tmp_path / "second", "albef", "none", checkpoint=tmp_path / "start.pth"
    )
    check_run("Pretrain.py", given, recipe("albef", start=start))


@pytest.mark.parametrize("method", ["albef", "simla"])
def test_hard_negatives(method, digitscenes, image_tokenizer, tmp_path):
    # of one layer both directions have nearly the same loss
    given = flags(digitscenes, tmp_path / "run", method, image_tokenizer, dropout=0.0, layers=2)
    [record] = record_run("Pretrain.py", [*given, "--max_steps", "1"])
    check_hard_negatives(record.network, record.updates[0].calls[0].inputs)
