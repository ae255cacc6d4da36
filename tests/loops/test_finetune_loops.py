"""The fine-tuning scripts' own loops against a reference written out: every update on one process and on two."""

import json
from pathlib import Path

import pytest

from tests.helpers.loops import ROOT
from tests.loops.reference import Recipe, check_run

SAMPLES = 24  # of the training list
BATCH = 4  # per process and micro-batch
STEPS = 5
WORLDS = {"one process": (1, 1), "two micro-batches": (1, 2), "two processes": (2, 2)}
CONTRAST = ("loss_ita", "loss_itm")
# by script: its debug recipe, its annotations, their knobs, the losses
TASKS = {
    "Retrieval": ("Retrieval/debug", "retrieval_train", "image_root", CONTRAST),
    "VQA": ("VQA/debug", "vqa_train", "vqa_root", ("loss_vqa",)),
    "NLVR": ("NLVR/debug", "nlvr_train", "image_root", ("loss_cls",)),
    "NLVR text assignment": ("NLVR/debug_assignment", "pretrain_train", "image_root", ("loss_ta",)),
    "VE": ("VE/debug", "ve_train", "image_root", ("loss_cls",)),
    "Grounding": ("Grounding/debug", "refcoco+_train", "image_root", CONTRAST),
}
NO_TEACHER = ("NLVR text assignment",)
NO_EVALUATION = {
    "Retrieval": {"val_file": "none", "test_file": "none"},
    "VQA": {"val_file": "none", "test_file": "[]", "test_answers": "none"},
    "NLVR": {"val_file": "[]", "test_file": "[]"},
    "NLVR text assignment": {},
    "VE": {"val_file": "none", "test_file": "none"},
    "Grounding": {"test_file": "[]"},
}


def flags(task: str, data: Path, out: Path, dropout: float = 0.1, **changes) -> list[str]:
    """A run of five updates: two of warm-up, strong decay, clipping, dropout; no validation and no test."""
    recipe, annotations, root, _ = TASKS[task]
    out.mkdir(parents=True)
    entries = json.loads((data / f"{annotations}.json").read_text())
    (out / "train.json").write_text(json.dumps(entries[:SAMPLES]))
    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text())
    (out / "bert.json").write_text(json.dumps({**geometry, "hidden_dropout_prob": dropout}))
    values = {
        "config": f"configs/{recipe}.yaml",
        "output_dir": out,
        "device": "cpu",
        "text_encoder": data / "tokenizer",
        "bert_config": out / "bert.json",
        "train_file": out / "train.json",
        root: data,
        "batch_size_train": BATCH,
        "alpha": 0.4,
        "momentum": 0.9,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.5,
        "optimizer.clip_grad_norm": 1.0,
        "optimizer.scalar_lr_scale": 0.03,
        "scheduler.epochs": f"{STEPS} steps",
        "scheduler.warmup": "2 steps",
        "log_every": 1,
        "save_every": "100 steps",
        "tensorboard": "false",
    }
    if task not in NO_TEACHER:
        values["warm_up"] = "true"
    if task == "VQA":
        values["answer_list"] = data / "answer_list.json"
    values.update(NO_EVALUATION[task])
    words = []
    for name, value in {**values, **changes}.items():
        words += [f"--{name}", str(value)]
    return words


def recipe(task: str, processes: int = 1, accumulate: int = 1, **changes) -> Recipe:
    """What these flags ask for; alpha rises during the first epoch."""
    epoch = SAMPLES // (BATCH * processes) // accumulate
    values = {
        "losses": TASKS[task][-1],
        "total": STEPS,
        "weight_decay": 0.5,
        "clip": 1.0,
        "scalar_lr_scale": 0.03,
        "momentum": 0.9,
        "alpha_ramp": epoch,
        "accumulate": accumulate,
    }
    if task in NO_TEACHER:
        values.update({"alpha": None, "momentum": None})
    return Recipe(**{**values, **changes})


def script(task: str) -> str:
    return f"{task.split()[0]}.py"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_updates(task, world, digitscenes, tmp_path):
    processes, accumulate = WORLDS[world]
    given = flags(task, digitscenes, tmp_path / "run", accumulate=accumulate)
    check_run(script(task), given, recipe(task, processes, accumulate), processes)
