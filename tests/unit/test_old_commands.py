"""Commands of the originals end in one sentence with the command that does the same here."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import main
from runtime.config import old_commands, old_names
from runtime.config.cli import parse
from runtime.config.schema import Schema
from tests.helpers.configs import NEEDED

ROOT = Path(__file__).resolve().parents[2]
FLICKR = "--config ./configs/Retrieval_flickr.yaml --output_dir out --checkpoint F.pth"
OLD = [  # as in the READMEs
    (
        f"zero_shot_retrieval.py {FLICKR} --evaluate",
        "Retrieval.py --config configs/Retrieval/flickr.yaml --output_dir out --checkpoint F.pth --evaluate",
        {"checkpoint": Path("F.pth"), "k_test": 128},
    ),
    (
        "Pretrain_NLVR.py --config=./configs/NLVR_Pretrain.yaml --checkpoint F.pth",
        "NLVR.py --config=configs/NLVR/assignment.yaml --checkpoint F.pth",
        {"stage": "text_assignment"},
    ),
    (
        "Pretrain_nlvr.py --config ./configs/NLVR_pretrain.yaml --checkpoint F.pth",
        "NLVR.py --config configs/NLVR/assignment.yaml --checkpoint F.pth",
        {"stage": "text_assignment"},
    ),
    (
        "-m trainer trainer=vit_l16_coyo300m runtime.tpu.name=t experiment.debug=false "
        "experiment.save_dir=run",
        "Classification.py --config configs/Classification/vit_l16_coyo300m.yaml --accumulate 16 "
        "--output_dir run   # without runtime.tpu.name, experiment.debug",
        {"output_dir": Path("run"), "accumulate": 16, "batch_size": 32},
    ),
    (
        "-m trainer trainer=vit_l16_i1k_downstream trainer.backbone.pretrained=W trainer.epochs=16 "
        "trainer.learning_rate.base_lr=3e-2 trainer.learning_rate.warmup_steps=9 "
        "trainer.global_batch_size=1024",
        "Classification.py --config configs/Classification/vit_l16_i1k_downstream.yaml "
        "--checkpoint W --epochs 16 --lr 3e-2 --warmup '9 steps' --accumulate 2",
        {"checkpoint": Path("W"), "optimizer.lr": 0.03, "scheduler.duration": "16"},
    ),
    (
        "-m trainer experiment.mode='eval' experiment.save_dir=run/ckpt",
        "Classification.py --config configs/Classification/vit_b16_i1k.yaml --evaluate --checkpoint run/ckpt",
        {"evaluate": True},
    ),
    (
        "scripts/run train.py configs/config_g70m.py",
        "Recognition.py --config configs/Recognition/g70m.yaml",
        {"batch_size": 16, "evaluate": False},
    ),
    (
        "scripts/run_dist eval_hook.py evals/eval.py configs/config_in1k.py",
        "Recognition.py --config configs/Recognition/in1k.yaml --evaluate --checkpoint FILE",
        {"batch_size": 4, "evaluate": True},
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), OLD, ids=[case[0].split()[0] + str(n) for n, case in enumerate(OLD)]
)
def test_an_old_command_says_the_new_one_which_parses(old, new, expected, tmp_path):
    words = old.split() if old.startswith("scripts/") else [sys.executable, *old.split()]
    for_torchrun = tmp_path / "error.json"
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(for_torchrun)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    sentence, _, command = done.stderr.strip().partition("; run: ")
    assert sentence.startswith("error: ") and "\n" not in done.stderr.strip()
    assert command == f"torchrun --nproc_per_node=8 {new}"
    assert json.dumps(command)[1:-1] in for_torchrun.read_text()  # its report ends with it
    config = parsed(new)
    assert {path: attrgetter(path)(config) for path in expected} == expected


def parsed(command):
    """The configuration of `SCRIPT.py FLAGS`, with comments left out as a shell does."""
    script, *rest = shlex.split(command, comments=True)
    return parse(importlib.import_module(script.removesuffix(".py")).Config, rest)


GLOBAL_BATCH = {  # global_batch_size of COYO-ViT's configs/trainer/*.yaml
    "vit_b16_i1k": 4096,
    "vit_l16_coyo300m": 4096,
    "vit_l16_i1k_downstream": 512,
    "vit_l16_i1k_downstream_ema": 512,
}


@pytest.mark.parametrize("name", old_commands.VIT_RECIPES)
def test_a_trainer_of_coyo_vit_keeps_its_batch(name):
    share = old_commands.VIT_RECIPES[name][1]
    command = old_commands.trainer([f"trainer={name}"])
    config = parsed(command.partition("=8 ")[2])
    assert (
        8 * config.batch_size * config.accumulate == GLOBAL_BATCH[name]
        and config.batch_size == share
    )


@pytest.mark.parametrize("old", ["NLVR_Pretrain.yaml", *sorted(old_commands.CONFIGS)])
def test_an_originals_configuration_that_is_not_there_names_its_recipe(old, capsys):
    recipe = old_commands.CONFIGS[old.lower()]
    assert Path(recipe).is_file()
    module = importlib.import_module(Path(recipe).parent.name)
    with pytest.raises(ValueError, match=f"configs/{old}: no such file; .*{recipe}"):
        parse(module.Config, ["--config", f"configs/{old}"])
    parse(module.Config, ["--config", recipe])


@pytest.mark.parametrize(
    ("files", "more", "model", "batch", "epochs"),
    [
        (["conf/cc3m.flags"], "--train_steps=9", "ALIGN_B3_MINI", 16384, "9 steps"),
        (["conf/coyo700.flags", "conf/b7-base.flags"], "", "ALIGN_B7_BASE", 65536, "300000 steps"),
        (["conf/cc3m.flags"], "--batch_size 256", "ALIGN_B3_MINI", 256, "100000 steps"),
    ],
)
def test_flag_files_of_coyo_align_say_the_new_command(files, more, model, batch, epochs):
    words = [f"--flagfile={file}" for file in files] + more.split()
    with pytest.raises(ValueError, match=r"; run: .*   # without tpu$") as error:
        parse(main.Config, [*words, "--outdir", "gs://o", "--dataset_dir", "gs://d", "--tpu", "t"])
    config = parsed(str(error.value).partition("=8 ")[2])
    assert (config.network.model, config.duration) == (model, epochs)
    assert (config.output_dir, config.shards) == (Path("gs://o"), ["gs://d"])
    assert 8 * config.batch_size * config.accumulate == batch
    assert config.cache_features == (config.accumulate > 1)


def test_a_flag_file_that_is_there_is_read(tmp_path):
    (tmp_path / "mine.flags").write_text("--train_steps=7\n--lr=0.003\n--batch_size=256\n")
    flags = ["--flagfile", str(tmp_path / "mine.flags"), "--lr", "0.004"]
    with pytest.raises(ValueError, match="; run: ") as error:
        parse(main.Config, [*flags, "--outdir", "o", "--dataset_dir", "d"])
    config = parsed(str(error.value).partition("=8 ")[2])
    assert (config.duration, config.optimizer.lr) == ("7 steps", 0.004)
    assert 8 * config.batch_size * config.accumulate == 256
    with pytest.raises(ValueError, match="its recipe is configs/main/align_cc3m"):
        parse(main.Config, ["--config", str(tmp_path / "mine.flags")])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "retrieval_coco.yaml",
            "vit: base\nvit_grad_ckpt: True\ninit_lr: 1e-5\n",
            r"of BLIP, .* is configs/Retrieval/coco\.yaml$",
        ),
        ("nocaps.yaml", "vit: base\nnum_beams: 3\n", "of BLIP, whose networks are not here$"),
        (
            "ret.yaml",
            "model: {arch: albef_retrieval}\nrun: {init_lr: 1e-5}\n",
            r"of LAVIS \(albef_retrieval\); start from ALBEF",
        ),
        (
            "base.yaml",
            "model: {arch: albef_vqa}\npreprocess: {}\n",
            r"of LAVIS \(albef_vqa\); start",
        ),
        (
            "opt.yaml",
            "model: {arch: blip2_opt}\nrun: {}\n",
            r"of LAVIS \(blip2_opt\), whose network",
        ),
        (
            "ret.yaml",
            "datasets: {coco_retrieval: {build_info: {}}}\n",
            r"data \(coco_retrieval\); name",
        ),
        (
            "vit_l16_coyo300m.yaml",
            "defaults: [/loss: sigmoid]\nbackbone: {}\nloss: {config: {}}\n",
            r"of COYO-ViT; start from configs/Classification/vit_l16_coyo300m\.yaml, ",
        ),
        (
            "args.yaml",
            "data_dir: d\nreprob: 0.1\nmodel_ema: true\n",
            r"timm's train\.py saved; start",
        ),
        (
            "params.txt",
            "accum_freq: 1\nforce_quick_gelu: False\n",
            "what open_clip's training saved",
        ),
    ],
)
def test_a_configuration_of_another_project_is_one_sentence(name, values, message, tmp_path):
    (tmp_path / name).write_text(values)
    with pytest.raises(ValueError, match=message) as error:
        parse(main.Config, ["--config", str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_file_of_the_user_is_taken_for_itself(tmp_path):
    (tmp_path / "VQA.yaml").write_text("seed: 1\n")
    assert old_commands.recipe_of(tmp_path / "VQA.yaml") is None
    assert old_commands.with_recipes([str(tmp_path / "VQA.yaml")]) == [str(tmp_path / "VQA.yaml")]


@pytest.mark.parametrize("name, key", [("main", "root"), ("Classification", "data_root")])
def test_every_script_takes_image_root(name, key):
    words = [*NEEDED.get(name, ()), "--image-root", "photos"]
    config = parse(importlib.import_module(name).Config, words)
    assert str(getattr(config, key)) == "photos"


@pytest.mark.parametrize(
    "script, names",
    [
        ("main", old_names.FLAGS_OF_MAIN),
        ("Recognition", old_names.FLAGS_OF_NXTP),
        ("Classification", old_names.FLAGS_OF_VIT),
        ("Pretrain", old_names.FLAGS_OF_PRETRAINING),
        ("VQA", old_names.FLAGS_OF_FINE_TUNING),
        ("Retrieval", old_names.FLAGS_OF_FINE_TUNING),
    ],
)
def test_flags_of_other_code_bases_name_the_options_here(script, names):
    config = importlib.import_module(script).Config
    assert config.NEW_NAMES is names
    schema = Schema(config)
    with pytest.raises(ValueError) as error:
        parse(config, [word for name in names for word in (f"--{name.replace('_', '-')}", "x")])
    said = str(error.value).splitlines()
    for name, here in names.items():
        assert schema.find(name) not in schema.knobs, f"{name} is an option here, too"
        assert f"  --{name.replace('_', '-')}: unknown key; here it is {here}" in said
        flags = re.findall(r"--([a-z][\w-]*)", here.partition(" (its")[0])
        assert all(schema.find(flag) for flag in flags), (name, here)


def test_a_warm_up_in_epochs_is_not_taken_for_simlas_stairs(tmp_path):
    """timm's --warmup-epochs counts epochs; SIMLA's and ALBEF's key of that name, stairs of 100
    updates, is for their own scripts, and for files of old runs inside of the section."""
    import Classification

    data = ["--train-data", "x"]
    for script in ("Classification", "Recognition"):
        config = importlib.import_module(script).Config
        with pytest.raises(ValueError, match="warmup-epochs: unknown key; here it is --warmup"):
            parse(config, [*data, "--warmup-epochs", "5"])
    (tmp_path / "old.yaml").write_text(
        "scheduler: {warmup_epochs: 20, original_warmup: false, decay_rate: 1}\n"
    )
    config = parse(Classification.Config, [*data, "--config", str(tmp_path / "old.yaml")])
    assert not config.scheduler.original_warmup and config.scheduler.warmup == "500 steps"


def test_a_batch_that_is_no_number_is_named_as_left_out():
    line = old_commands.trainer(["trainer=vit_b16_i1k", "trainer.global_batch_size=x"])
    assert line.endswith("--accumulate 8   # without trainer.global_batch_size")
    line = old_commands.align([("flagfile", ["cc3m"]), ("batch_size", ["x"])])
    assert "--accumulate 16 " in line and line.endswith("# without batch_size")
