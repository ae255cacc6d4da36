"""`--evaluate` with a split on the command line reads that split alone: those of the recipe may not
be on this machine. A list to evaluate is read whole or refused."""

import importlib
import json
from pathlib import Path

import pytest

from base.errors import UserError
from dataset.tasks.caption_lists import retrieval_list
from dataset.tasks.catalog import Entry
from dataset.tasks.classification import class_names
from dataset.tasks.recognition import ImageSet
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


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("script", "root", "gone", "stays"),
    [
        ("VQA", "vqa_root", ["val_file", "test_file", "answer_list"], "train_file"),
        ("Grounding", "image_root", ["refcoco_data", "det_file", "test_file"], "train_file"),
        ("Recognition", "image_root", ["val", "test"], "train_list"),
        ("Classification", "train_data", ["val_data", "classes"], "data_root"),
    ],
)
def test_lists_of_digitscenes_do_not_belong_to_other_images(
    script, root, gone, stays, copy, tmp_path, capsys
):
    recipe = {"Classification": "digitscenes_pretrain"}.get(script, "digitscenes")
    words = ["--config", str(ROOT / f"configs/{script}/{recipe}.yaml"), f"--{stays}", "mine.json"]
    if copy:  # of DigitScenes, elsewhere
        (tmp_path / "manifest.json").touch()
        (tmp_path / "train").mkdir()
    images = tmp_path / "train" if copy else tmp_path
    config = parse(importlib.import_module(script).Config, [*words, f"--{root}", str(images)])
    assert "mine.json" in str(getattr(config, stays))
    for name in gone:
        assert bool(getattr(config, name)) is copy
    assert (f"{gone[0]} of the recipe is not read" in capsys.readouterr().out) is not copy


def test_lists_of_digitscenes_stay_where_its_images_are_among_others(tmp_path):
    import Classification

    (tmp_path / "scenes/train").mkdir(parents=True)
    (tmp_path / "scenes/manifest.json").touch()
    recipe = ["--config", str(ROOT / "configs/Classification/digitscenes_pretrain.yaml")]
    words = [*recipe, "--train_data", str(tmp_path / "scenes/train"), str(tmp_path)]
    assert parse(Classification.Config, words).val_data


def test_no_images_at_all_are_none_of_others():
    import eval_knn

    with pytest.raises(
        UserError, match="--train-data: is needed"
    ):  # which the script cannot do without
        parse(eval_knn.Config, ["--train_data", "none", "--checkpoint", "x.pt"])


def test_the_lists_of_recognition_have_the_names_of_the_other_scripts():
    import Recognition

    files = ["--train_file", "a.json", "--val_file", "b.json", "--test_file", "c.json"]
    config = parse(Recognition.Config, files)
    assert (config.train_list, config.val, config.test) == ([Path("a.json")], "b.json", "c.json")
    assert parse(Recognition.Config, ["--test_list", "d.json"]).test == "d.json"


def test_classes_come_from_the_data_that_are_here(tmp_path):
    """Classification.py --evaluate --val_data MINE, without the recipe's training data."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(b"")
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


PAIR = {"image": "0.jpg", "caption": "a cat"}
QUESTION = {"image": "0.jpg", "question": "a cat?", "question_id": 1, "answer": ["yes"]}
SENTENCE = {"image": "0", "sentence": "a cat", "label": "entailment"}
STATEMENT = {"images": ["0.jpg", "0.jpg"], "sentence": "two cats", "label": "True"}
EXPRESSION = {"image": "0.jpg", "text": "the cat", "ref_id": 1}
LABELLED = {"image": "0.jpg", "labels": [1], "label_probs": [1.0]}
NOUNS = {"image": "0.jpg", "labels": ["cat"]}
# script, its option, an entry of the list, the function that reads it
LISTS = [
    ("Retrieval", "val_file", PAIR, "evaluation_data"),
    ("Retrieval", "test_file", PAIR, "evaluation_data"),
    ("VQA", "val_file", QUESTION, "evaluation_data"),
    ("VQA", "test_file", QUESTION, "evaluation_data"),
    ("VE", "val_file", SENTENCE, "evaluation_data"),
    ("VE", "test_file", SENTENCE, "evaluation_data"),
    ("NLVR", "val_file", STATEMENT, "evaluation_data"),
    ("NLVR", "test_file", STATEMENT, "evaluation_data"),
    ("Grounding", "test_file", EXPRESSION, "test_data"),
    ("Classification", "val_data", LABELLED, "evaluation_data"),
]


@pytest.mark.parametrize(("script", "option", "entry", "read"), LISTS)
def test_a_list_with_an_unusable_entry_is_not_evaluated(script, option, entry, read, tmp_path):
    """Training leaves it out and says so; the score of what is left is not that of the list."""
    module = importlib.import_module(script)
    file = write_list(tmp_path, entry)
    words = [f"--{option}", str(file), "--image_root", str(tmp_path)]
    words += ["--evaluate", "--checkpoint", "x.pt"]
    if script == "Grounding":
        words += ["--refcoco_data", str(tmp_path), "--det_file", str(tmp_path / "dets.json")]
    config = parse(module.Config, words)
    names = [[]] if script == "Classification" else []
    with pytest.raises(UserError, match="an evaluation needs every entry"):
        getattr(module, read)(config, *names)


def test_lists_of_labels_and_of_zero_shot_retrieval_are_read_whole_too(tmp_path):
    with pytest.raises(UserError, match="an evaluation needs every entry"):
        ImageSet(write_list(tmp_path, NOUNS), view=None)
    with pytest.raises(UserError, match="an evaluation needs every entry"):
        retrieval_list(Entry("mine", "retrieval", str(write_list(tmp_path, PAIR))))


def write_list(folder: Path, entry: dict) -> Path:
    """A list of 200 entries of one image, the last of which says nothing."""
    (folder / "0.jpg").touch()
    file = folder / "list.jsonl"
    file.write_text("\n".join([json.dumps(entry)] * 199 + ["{}"]))
    return file
