"""The fine-tuning scripts' own loops against a reference written out: every update on one process
and on two."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.loops import ROOT, record_run
from tests.helpers.runs import log_lines, words_of
from tests.loops.negatives import check_hard_negatives
from tests.loops.reference import Recipe, another_teacher, check_run, loss_scaling

SAMPLES = 24  # of the training list
BATCH = 4  # per process and micro-batch
STEPS = 5
# processes, micro-batches, the limit of gradients
WORLDS = {"one process": (1, 1, None), "two processes, two micro-batches": (2, 2, 1.0)}
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
    """A run of five updates of towers of one layer: two of warm-up, strong decay, clipping, dropout;
    no validation and no test."""
    recipe, annotations, root, _ = TASKS[task]
    out.mkdir(parents=True)
    entries = json.loads((data / f"{annotations}.json").read_text())
    (out / "train.json").write_text(json.dumps(entries[:SAMPLES]))
    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text())
    geometry |= {"num_hidden_layers": 1, "hidden_dropout_prob": dropout}
    (out / "bert.json").write_text(json.dumps(geometry))
    values = {
        "vision_depth": 1,
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
        "optimizer.betas": "[0.8, 0.95]",
        "optimizer.eps": 1e-6,
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
    if task == "Grounding":
        values["refcoco_data"], values["det_file"] = data, data / "refcoco+/dets.json"
    values.update(NO_EVALUATION[task])
    return words_of({**values, **changes})


def recipe(task: str, processes: int = 1, accumulate: int = 1, **changes) -> Recipe:
    """What these flags ask for; alpha rises during the first epoch."""
    epoch = SAMPLES // (BATCH * processes) // accumulate
    values = {
        "losses": TASKS[task][-1],
        "total": STEPS,
        "weight_decay": 0.5,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "clip": 1.0,
        "scalar_lr_scale": 0.03,
        "momentum": 0.9,
        "alpha_ramp": epoch,
        "accumulate": accumulate,
    }
    if task in NO_TEACHER:
        # the features that pick similar images are not trained
        values.update(
            {"alpha": None, "momentum": None, "frozen": ("vision_proj.", "text_proj.", "temp")}
        )
    return Recipe(**{**values, **changes})


def script(task: str) -> str:
    return f"{task.split()[0]}.py"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_updates(task, world, digitscenes, tmp_path):
    processes, accumulate, clip = WORLDS[world]
    changes = {"accumulate": accumulate, "optimizer.clip_grad_norm": clip}
    given = flags(task, digitscenes, tmp_path / "run", **changes)
    check_run(script(task), given, recipe(task, processes, accumulate, clip=clip), processes)


@pytest.mark.parametrize("task", ["Retrieval", "VQA", "NLVR", "VE"])
def test_the_teacher_moves_before_the_first_forward_pass(task, digitscenes, tmp_path):
    [record] = record_run(
        script(task), [*flags(task, digitscenes, tmp_path / "first"), "--max_steps", "1"]
    )
    start = another_teacher(record, tmp_path / "start.pth")
    given = flags(task, digitscenes, tmp_path / "second", checkpoint=tmp_path / "start.pth")
    check_run(script(task), given, recipe(task, start=start))


def test_validation_does_not_disturb_the_training(digitscenes, tmp_path):
    changes = {"val_file": digitscenes / "ve_val.json", "eval_every": "2 steps"}
    given = flags("VE", digitscenes, tmp_path / "run", **changes)
    check_run("VE.py", given, recipe("VE"))
    log = log_lines(tmp_path / "run")
    assert [line["step"] for line in log if "val_accuracy" in line] == [2, 4, 5]
    [record] = record_run("VE.py", flags("VE", digitscenes, tmp_path / "without"))
    assert record.log[-1]["loss"] == log[-2]["loss"]


def test_without_teacher_and_ramp(digitscenes, tmp_path):
    """As VE by default: alpha is what it is from the first update on."""
    given = flags("VE", digitscenes, tmp_path / "run", distill="false", warm_up="false")
    check_run("VE.py", given, recipe("VE", momentum=None, alpha_ramp=0))


def test_a_frozen_image_encoder(digitscenes, tmp_path):
    given = flags("Retrieval", digitscenes, tmp_path / "run", freeze_visual_encoder="true")
    check_run("Retrieval.py", given, recipe("Retrieval", frozen=("visual_encoder.",)))


def test_scaled_gradients_are_unscaled_before_they_are_clipped(digitscenes, tmp_path):
    given = flags("VE", digitscenes, tmp_path / "run", **{"optimizer.clip_grad_norm": 0.1})
    with loss_scaling(STEPS):
        check_run("VE.py", given, recipe("VE", clip=0.1))


def test_bf16(digitscenes, tmp_path):
    given = flags("Retrieval", digitscenes, tmp_path / "run", precision="bf16")
    check_run("Retrieval.py", given, recipe("Retrieval", bf16=True))


@pytest.mark.parametrize("task", ["Retrieval", "Grounding"])
def test_hard_negatives(task, digitscenes, tmp_path):
    """Texts of one image are no negatives of it."""
    given = flags(task, digitscenes, tmp_path / "run", dropout=0.0)
    [record] = record_run(script(task), [*given, "--max_steps", "1"])
    inputs = record.updates[0].calls[0].inputs
    inputs["image_id"] = torch.tensor([0, 1, 2, 0])
    check_hard_negatives(record.network, inputs)
