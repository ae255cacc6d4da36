"""Pretrain.py's own loop against a reference written out: SIMLA and ALBEF."""

import json
from pathlib import Path

import pytest

from tests.helpers.loops import ROOT
from tests.loops.reference import Recipe, check_run
from tests.pretraining import arguments

ALBEF = ("loss_ita", "loss_itm", "loss_mlm")
SIMLA = (*ALBEF, "loss_mim", "loss_pseudo")
STEPS = 6


def flags(data: Path, out: Path, method: str, tokenizer: Path | str, **changes) -> list[str]:
    """A run of six updates: two of warm-up, alpha reached with the fourth, strong decay, dropout."""
    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text()) | {"hidden_dropout_prob": 0.1}
    if method == "albef":
        geometry.pop("add_cross_attention")
        geometry["fusion_layer"] = 1
    out.mkdir(parents=True)
    (out / "bert.json").write_text(json.dumps(geometry))
    values = {
        "method": method,
        "bert_config": out / "bert.json",
        "device": "cpu",
        "batch_size": 4,
        "queue_size": 22,
        "momentum": 0.9,
        "alpha": 0.4,
        "alpha_ramp": "3 steps",
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.5,
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
        "clip": 1.0,
        "scalar_lr_scale": 0.03,
        "alpha_ramp": 3,
        "momentum": 0.9,
    }
    return Recipe(**(values | changes))


@pytest.mark.parametrize(
    ("processes", "accumulate"), [(1, 1), (1, 2), (2, 2)], ids=["one process", "two micro-batches", "two processes"]
)
def test_albef(processes, accumulate, digitscenes, tmp_path):
    given = flags(digitscenes, tmp_path / "run", "albef", "none", accumulate=accumulate)
    check_run("Pretrain.py", given, recipe("albef", accumulate=accumulate), processes)
