"""Commands of the originals end in one sentence with the command that does the same here."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import main
from runtime.config import old_commands
from runtime.config.cli import parse
from runtime.config.schema import Schema

ROOT = Path(__file__).resolve().parents[2]
FLICKR = "--config ./configs/Retrieval_flickr.yaml --output_dir out --checkpoint F.pth"
OLD = [
    (
        f"zero_shot_retrieval.py {FLICKR} --evaluate",
        "Retrieval.py --config configs/Retrieval/flickr.yaml --output_dir out --checkpoint F.pth --evaluate",
    ),
    (
        "Pretrain_NLVR.py --config configs/NLVR_Pretrain.yaml --checkpoint F.pth",
        "NLVR.py --config configs/NLVR/assignment.yaml --checkpoint F.pth",
    ),
    (
        "-m trainer trainer=vit_l16_coyo300m trainer.learning_rate.base_lr=0.1 experiment.comment=x",
        "Classification.py --config configs/Classification/vit_l16_coyo300m.yaml --lr 0.1",
    ),
    (
        "-m trainer experiment.mode=eval experiment.save_dir=run/ckpt",
        "Classification.py --config configs/Classification/vit_b16_i1k.yaml --evaluate --checkpoint run/ckpt",
    ),
    (
        "scripts/run src/train.py src/conf/g70m.py",
        "Recognition.py --config configs/Recognition/g70m.yaml",
    ),
]


@pytest.mark.parametrize(
    ("old", "new"), OLD, ids=[old.split()[0] + str(n) for n, (old, _) in enumerate(OLD)]
)
def test_an_old_command_says_the_new_one_which_parses(old, new, monkeypatch):
    words = old.split() if old.startswith("scripts/") else [sys.executable, *old.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    sentence, _, command = done.stderr.strip().partition("; run: ")
    assert sentence.startswith("error: ") and "\n" not in done.stderr.strip()
    assert command == f"torchrun --nproc_per_node=8 {new}"
    monkeypatch.chdir(ROOT)
    script, *rest = shlex.split(new)
    parse(importlib.import_module(script.removesuffix(".py")).Config, rest)


@pytest.mark.parametrize("old", sorted(old_commands.CONFIGS))
def test_an_originals_configuration_that_is_not_there_names_its_recipe(old, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = old_commands.CONFIGS[old]
    assert Path(recipe).is_file()
    module = importlib.import_module(Path(recipe).parent.name)
    with pytest.raises(ValueError, match=f"configs/{old}: no such file; .*{recipe}"):
        parse(module.Config, ["--config", f"configs/{old}"])
    parse(module.Config, ["--config", recipe])


def test_flag_files_of_coyo_align_name_their_recipe(monkeypatch):
    import main

    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"--flagfile.*--config configs/main/align_cc3m.yaml or"):
        parse(main.Config, ["--flagfile=flags/coyo700m", "--flagfile=flags/b7-base"])
    for recipe in old_commands.FLAG_FILES:
        parse(main.Config, ["--config", recipe])


def test_a_file_of_the_user_is_taken_for_itself(tmp_path):
    (tmp_path / "VQA.yaml").write_text("seed: 1\n")
    assert old_commands.recipe_of(tmp_path / "VQA.yaml") is None
    assert old_commands.translated([str(tmp_path / "VQA.yaml")]) == [str(tmp_path / "VQA.yaml")]


@pytest.mark.parametrize("name, key", [("main", "root"), ("Classification", "data_root")])
def test_every_script_takes_image_root(name, key):
    config = parse(importlib.import_module(name).Config, ["--image-root", "photos"])
    assert str(getattr(config, key)) == "photos"


@pytest.mark.parametrize("name", sorted(old_commands.NEW_FLAGS))
def test_flags_of_open_clip_and_align_name_the_options_of_main(name):
    here = old_commands.NEW_FLAGS[name]
    with pytest.raises(ValueError, match=re.escape(f"unknown key; here it is {here}")):
        parse(main.Config, [f"--{name.replace('_', '-')}", "x"])
    options = Schema(main.Config)
    assert all(options.find(flag) for flag in re.findall(r"--([a-z][\w-]*)", here))
