"""The originals' own YAML files and command lines do what they did there.

Files: original_configs/, keys and values as published. Expected: the table of settings and the
formula of the warm-up in the papers' repositories (github.com/codezakh/SIMLA, salesforce/ALBEF,
main.py of clip-rocket, the configurations of NXTP).
"""

import importlib
import math
import shlex
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from runtime.config.cli import parse
from runtime.optim.schedule import Plan
from tests.helpers.configs import load

FILES = Path(__file__).with_name("original_configs")
DEIT = Path("weights/deit_base_patch16_224-b5f2ef4d.pth")
COMMON = {"optimizer.opt": "adamW", "optimizer.weight_decay": 0.02, "scheduler.sched": "cosine"}
SOFT = {"alpha": 0.4, "distill": True, "warm_up": True}
QUEUE = {"queue_size": 65536, "momentum": 0.995, "temp": 0.07, "embed_dim": 256}
BOTH = ("simla", "albef")


def settings(batch, epochs, lr, min_lr, stairs, resolution, **more):
    """A line of the table: batch per GPU, epochs, learning rates, stairs of 100 updates, pixels."""
    found = {"batch": batch, "epochs": epochs, "stairs": stairs, "image_res": resolution}
    rates = {"optimizer.lr": lr, "scheduler.min_lr": min_lr, "scheduler.warmup_lr": 1e-5}
    return COMMON | found | rates | more


PRETRAIN = settings(64, 30, 1e-4, 1e-5, 20, 256, vision_weights=DEIT, alpha=0.4, **QUEUE)
PRETRAIN |= {"mlm_probability": 0.15, "text_weights": "bert-base-uncased", "checkpoint": None}
COCO = settings(32, 5, 1e-5, 1e-6, 1, 384, k_test=256, **SOFT, **QUEUE)
FLICKR = settings(32, 10, 1e-5, 1e-6, 1, 384, k_test=128, batch_size_test=64, **SOFT, **QUEUE)
VQA = settings(32, 8, 2e-5, 1e-6, 4, 384, k_test=128, batch_size_test=16, **SOFT)
NLVR = {"stage": "finetune", "crop_scale": (0.5, 1.0)} | SOFT
ASSIGNMENT = {"stage": "text_assignment", "crop_scale": (0.2, 1.0), "max_tokens": 25}
VE = settings(32, 5, 2e-5, 1e-6, 1, 384, batch_size_test=64, **(SOFT | {"warm_up": False}))
GROUNDING = settings(32, 5, 1e-5, 1e-6, 1, 384, gradcam_mode="itm", block_num=8, **SOFT, **QUEUE)

CASES = {
    ("simla", "Pretrain"): ("Pretrain", PRETRAIN | {"method": "simla"}),
    ("albef", "Pretrain"): ("Pretrain", PRETRAIN | {"method": "albef"}),
    ("simla", "Retrieval_coco"): ("Retrieval", COCO | {"batch_size_test": 32}),
    ("albef", "Retrieval_coco"): ("Retrieval", COCO | {"batch_size_test": 64}),
    ("simla", "NLVR"): ("NLVR", settings(8, 10, 2e-5, 1e-6, 1, 384, **NLVR)),
    ("albef", "NLVR"): ("NLVR", settings(16, 10, 2e-5, 1e-6, 1, 384, **NLVR)),
    ("simla", "NLVR_Pretrain"): ("NLVR", settings(64, 1, 2e-5, 1e-5, 1, 256, **ASSIGNMENT)),
    ("albef", "NLVR_pretrain"): ("NLVR", settings(64, 1, 2e-5, 1e-5, 1, 256, **ASSIGNMENT)),
    **{(system, "Retrieval_flickr"): ("Retrieval", FLICKR) for system in BOTH},
    **{(system, "VQA"): ("VQA", VQA) for system in BOTH},
    **{(system, "VE"): ("VE", VE) for system in BOTH},
    **{(system, "Grounding"): ("Grounding", GROUNDING) for system in BOTH},
}


def at(config, path):
    """The value of a dotted path; `batch`, `epochs` and `stairs` by any name."""
    if path == "batch":
        return getattr(config, "batch_size_train", None) or config.batch_size
    if path == "epochs":
        return float(config.scheduler.duration)
    if path == "stairs":
        steps, unit = config.scheduler.warmup.split()
        assert unit == "steps" and config.scheduler.original_warmup
        return int(steps) / 100
    for name in path.split("."):
        config = getattr(config, name)
    return config


def published_rate(iteration, epoch_steps, lr, min_lr, warmup_lr, stairs, epochs):
    """Learning rate of the update of `iteration`, from 0, in the originals' loops."""
    epoch, i = divmod(iteration, epoch_steps)
    if epoch == 0:
        stair = max(0, math.ceil(i / 100) - 1)
        return lr if stair >= stairs else warmup_lr + stair * (lr - warmup_lr) / stairs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def test_every_file_has_a_case():
    assert {(path.parent.name, path.stem) for path in FILES.glob("*/*.yaml")} == set(CASES)


@pytest.mark.parametrize("system, name", CASES, ids=map("-".join, CASES))
def test_an_original_file_trains_as_it_did_there(system, name):
    script, expected = CASES[system, name]
    config = load(importlib.import_module(script).Config, FILES / system / f"{name}.yaml")
    assert {path: at(config, path) for path in expected} == expected
    rates = [expected["optimizer.lr"], expected["scheduler.min_lr"]]
    plan = Plan.of(config.scheduler, rates[0], loader_steps=2500, accumulate=1, batch=1)
    for step in (0, 100, 101, 200, 201, 400, 401, 2001, 2499, 2500, 5000):
        if step < plan.total:
            stairs, epochs = expected["stairs"], expected["epochs"]
            theirs = published_rate(step, 2500, *rates, 1e-5, stairs, epochs)
            assert plan.lr(step) == pytest.approx(theirs, rel=1e-9), step


def test_numbers_that_the_originals_print():
    config = load(importlib.import_module("VQA").Config, FILES / "albef/VQA.yaml")
    plan = Plan.of(config.scheduler, config.optimizer.lr, loader_steps=10, accumulate=1, batch=1)
    rates = [1.92769e-5, 1.72175e-5, 1.41355e-5, 1.05e-5, 6.86451e-6, 3.78249e-6, 1.72314e-6]
    assert [plan.lr(10 * epoch) for epoch in range(1, 8)] == pytest.approx(rates, rel=1e-5)
    config = load(importlib.import_module("Pretrain").Config, FILES / "simla/Pretrain.yaml")
    plan = Plan.of(config.scheduler, config.optimizer.lr, loader_steps=3000, accumulate=1, batch=1)
    assert [plan.lr(3000), plan.lr(87000)] == pytest.approx([9.97535e-5, 1.02465e-5], rel=1e-5)


def test_what_differs_is_printed_once(capsys):
    pretrain = importlib.import_module("Pretrain").Config
    parse(pretrain, ["--config", str(FILES / "albef/Pretrain.yaml")])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["note"] * 3
    assert "docs/DIFFERENCES.md" in said[0] and f"vision_weights {DEIT}" in said[1]
    assert "schedular.decay_rate (no schedule" in said[2]
    parse(importlib.import_module("NLVR").Config, ["--config", str(FILES / "simla/NLVR.yaml")])
    assert "eval_ema (the originals read it nowhere)" in capsys.readouterr().out


def test_a_file_of_ones_own_without_a_test_set_is_not_theirs(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("train_file: [a.json]\n")
    config = importlib.import_module("NLVR").Config
    assert parse(config, ["--config", str(own)]).stage == config().stage == "finetune"


def test_flags_win_over_what_their_code_says():
    pretrain = importlib.import_module("Pretrain").Config
    words = ["--config", str(FILES / "simla/Pretrain.yaml"), "--text_weights", "none"]
    config = parse(pretrain, [*words, "--warmup", "3 epochs", "--vision_weights", "mine.pth"])
    assert (config.text_weights, config.vision_weights) == (None, Path("mine.pth"))
    assert config.scheduler.warmup == "3 epochs"


def test_from_scratch_starts_from_random_weights(tmp_path):
    text = (FILES / "simla/Pretrain.yaml").read_text() + "from_scratch: true\n"
    (tmp_path / "scratch.yaml").write_text(text)
    config = load(importlib.import_module("Pretrain").Config, tmp_path / "scratch.yaml")
    assert (config.vision_weights, config.text_weights, config.method) == (None, None, "simla")
    words = ["--config", str(FILES / "simla/Pretrain.yaml"), "--from_scratch", "true"]
    config = parse(importlib.import_module("Pretrain").Config, words)
    assert (config.vision_weights, config.text_weights) == (None, None)


def test_our_saved_files_keep_their_warm_up(tmp_path):
    text = "scheduler: {epochs: 30, warmup: 5%, warmup_epochs: 20, original_warmup: false}"
    (tmp_path / "saved.yaml").write_text(text)
    config = load(importlib.import_module("Pretrain").Config, tmp_path / "saved.yaml")
    assert (config.scheduler.warmup, config.scheduler.original_warmup) == ("5%", False)
    assert config.vision_weights is None


def test_a_wrong_warm_up_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("alpha: 0.4\nschedular: {warmup_epochs: many}")
    with pytest.raises(UserError) as error:
        load(importlib.import_module("VE").Config, file)
    wanted = "warmup_epochs many: expected a whole number of 100 updates"
    assert str(error.value) == f"{file}:2: schedular: {wanted}"
    with pytest.raises(UserError, match=f"^--warmup_epochs: {wanted}"):  # as it was typed
        parse(importlib.import_module("VE").Config, ["--warmup_epochs", "many"])


# Commands as in the READMEs: script, words, what they set.
COMMANDS = [
    (
        "Pretrain",
        "--config simla/Pretrain.yaml --output_dir out --checkpoint start.pth --seed 3 --resume",
        {"output_dir": Path("out"), "checkpoint": Path("start.pth"), "seed": 3, "resume": "auto"},
    ),
    (
        "Pretrain",
        "--config albef/Pretrain.yaml --output_dir out --text_encoder bert-base-uncased "
        "--device cuda --world_size 8 --dist_url env:// --distributed True",
        {"text_encoder": "bert-base-uncased", "device": "cuda", "method": "albef"},
    ),
    (
        "Pretrain",
        "--config simla/Pretrain.yaml --overrides alpha=0.5 optimizer.lr=2e-4 schedular.epochs=10",
        {"alpha": 0.5, "optimizer.lr": 2e-4, "scheduler.duration": "10"},
    ),
    (
        "Retrieval",
        "--config albef/Retrieval_flickr.yaml --output_dir out --checkpoint ALBEF.pth --evaluate",
        {"evaluate": True, "checkpoint": Path("ALBEF.pth"), "k_test": 128},
    ),
    (
        "Retrieval",
        "--config simla/Retrieval_coco.yaml --checkpoint S.pth --freeze_visual_encoder True",
        {"evaluate": False, "freeze_visual_encoder": True},
    ),
    (
        "VQA",
        "--config albef/VQA.yaml --output_dir out --checkpoint ALBEF.pth "
        "--text_encoder bert-base-uncased --text_decoder bert-base-uncased --evaluate",
        {"evaluate": True, "text_encoder": "bert-base-uncased"},
    ),
    (
        "Grounding",
        "--config simla/Grounding.yaml --gradcam_mode itm --block_num 8 --checkpoint S.pth",
        {"gradcam_mode": "itm", "block_num": 8, "checkpoint": Path("S.pth")},
    ),
    ("NLVR", "--config albef/NLVR_pretrain.yaml --output_dir out", {"stage": "text_assignment"}),
    ("NLVR", "--config simla/NLVR.yaml --checkpoint out/c.pth", {"stage": "finetune"}),
    ("VE", "--config albef/VE.yaml --output_dir out --evaluate --checkpoint c", {"evaluate": True}),
    (
        "main",
        "--model CL2L_R50_CL2L --dataset cc3m --metadata m.npy --root r --separate-proj "
        "--text-augment --num-augs 2 --batch-size 128 --epochs 32 --warmup-epochs 1 --lr 3e-3 "
        "--lr-start 1e-6 --lr-end 1e-5 --wd 0.5 --betas 0.9 0.98 --eps 1e-8 --update-freq 2 "
        "--loss-avg-or-sum avg --label-smoothing 0.1 --transformer-layers 6 --checkpoint-grad "
        "--text-dropout-prob 0.2 --print-freq 10 -j 5 --eval-freq 2 --attn-layer flash --gpu 0",
        {
            "network.model": "CL2L_R50_CL2L",
            "network.transformer_layers": 6,
            "network.loss_avg_or_sum": "avg",
            "network.label_smoothing": 0.1,
            "network.text_dropout_prob": 0.2,
            "network.separate_proj": True,
            "texts.text_augment": True,
            "optimizer.lr": 3e-3,
            "optimizer.weight_decay": 0.5,
            "optimizer.betas": (0.9, 0.98),
            "scheduler.duration": "32",
            "scheduler.warmup": "1",
            "scheduler.warmup_lr": 1e-6,
            "scheduler.min_lr": 1e-5,
            "accumulate": 2,
            "activation_checkpointing": True,
            "workers": 5,
            "log_every": 10,
            "eval_every": "2",
        },
    ),
    (
        "main",
        "--model CL2L_R50_SIAMLIP --momentum --momentum-tau 0.99 --disable-amp --resume c.pt",
        {"momentum": True, "momentum_tau": 0.99, "disable_amp": True, "resume": "c.pt"},
    ),
]


@pytest.mark.parametrize("script, words, expected", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_of_the_readmes(script, words, expected):
    words = shlex.split(words)
    if "--config" in words:
        words[words.index("--config") + 1] = str(FILES / words[words.index("--config") + 1])
    config = parse(importlib.import_module(script).Config, words)
    assert {path: at(config, path) for path in expected} == expected


@pytest.mark.parametrize("script", ["eval_zeroshot", "main"])
def test_a_file_to_resume_from_is_said_to_be_a_checkpoint(script, tmp_path, capsys):
    file = tmp_path / "c.pt"
    file.touch()
    config = parse(importlib.import_module(script).Config, ["--resume", str(file)])
    if script == "main":
        config.resolve_auto(torch.device("cpu"))
        assert config.resume == "auto"
    assert config.checkpoint == file
    assert f"--resume {file}" in capsys.readouterr().out


def test_a_configuration_of_nxtp_is_named_by_its_recipe():
    with pytest.raises(UserError, match=r"config_g3m.py: .* is configs/Recognition/g3m.yaml"):
        parse(importlib.import_module("Recognition").Config, ["--config", "configs/config_g3m.py"])
