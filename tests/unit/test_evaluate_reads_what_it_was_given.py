"""`--evaluate` with a split on the command line reads that split alone: those of the recipe may not
be on this machine."""

import importlib
from pathlib import Path

import pytest

from dataset.tasks.classification import class_names
from runtime.config.cli import parse

ROOT = Path(__file__).parents[2]
# script, recipe, what the command line names, what must be empty then
CASES = [
    ("Retrieval", "coco.yaml", "test_file", ["val_file"]),
    ("Retrieval", "flickr.yaml", "val_file", ["test_file"]),
    ("VE", "snli_ve.yaml", "test_file", ["val_file"]),
    ("VE", "snli_ve.yaml", "val_file", ["test_file"]),
    ("NLVR", "nlvr2.yaml", "test_file", ["val_file"]),
    ("NLVR", "nlvr2.yaml", "val_file", ["test_file"]),
    ("VQA", "digitscenes.yaml", "test_file", ["val_file", "test_answers"]),
    ("VQA", "digitscenes.yaml", "val_file", ["test_file"]),
    ("Recognition", "digitscenes.yaml", "test", ["val"]),
]


@pytest.mark.parametrize(("script", "recipe", "given", "empty"), CASES)
def test_the_named_split_alone(script, recipe, given, empty, capsys):
    module = importlib.import_module(script)
    words = ["--config", str(ROOT / f"configs/{script}/{recipe}"), f"--{given}", "mine.json"]
    training = parse(module.Config, words)
    assert any(getattr(training, name) for name in empty)  # of the recipe: it trains with them
    capsys.readouterr()
    config = parse(module.Config, [*words, "--evaluate", "--checkpoint", "x.pt"])
    found = getattr(config, given)
    assert [str(path) for path in (found if isinstance(found, list) else [found])] == ["mine.json"]
    for name in empty:
        assert not getattr(config, name)
    assert f"{empty[0]} of the recipe is not read" in capsys.readouterr().out


def test_answers_of_the_recipe_do_not_belong_to_another_test_file(capsys):
    import VQA

    recipe = ["--config", str(ROOT / "configs/VQA/digitscenes.yaml")]
    assert parse(VQA.Config, recipe).test_answers
    own = [*recipe, "--train_file", "a.json", "--test_file", "b.json"]
    assert not parse(VQA.Config, own).test_answers
    assert "test_answers of the recipe is not read" in capsys.readouterr().out
    assert parse(VQA.Config, [*own, "--test_answers", "c.json"]).test_answers


def test_classes_come_from_the_data_that_are_here(tmp_path):
    """Classification.py --evaluate --val_data MINE, without the recipe's training data."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"")
    for recipe in ("imagenet/train", "torchvision/CIFAR10:train", "coyo/*.tar", "list.jsonl"):
        assert class_names([recipe, str(tmp_path)], None, tmp_path / "x") == ["cat", "dog"]


def test_without_a_named_split_the_recipes_are_evaluated():
    import VE

    words = ["--config", str(ROOT / "configs/VE/snli_ve.yaml"), "--evaluate", "--checkpoint", "x"]
    config = parse(VE.Config, words)
    assert config.val_file and config.test_file
    both = parse(VE.Config, [*words, "--val_file", "a.json", "--test_file", "b.json"])
    assert (str(both.val_file), str(both.test_file)) == ("a.json", "b.json")
    without = parse(VE.Config, [*words, "--val_file", "none"])
    assert not without.val_file and without.test_file
