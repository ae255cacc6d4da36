"""main.py's validation during training: the classes are those of the folders, in whatever order
the list of labels names them."""

import json

import pytest
from PIL import Image

import main
from base.errors import UserError
from dataset.tasks.catalog import PROMPTS, named_list


def folders(root, classes):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / "a.png")


def config_of(root, labels):
    (root / "labels.json").write_text(json.dumps({"x": labels}))
    (root / "templates.json").write_text(json.dumps({"x": ["a {}."]}))
    files = {name: root / f"{name}.json" for name in ("labels", "templates")}
    return main.Config(val_folder=root / "val", val_dataset="x", **files)


def test_labels_go_to_the_folders_of_their_names(tmp_path):
    folders(tmp_path / "val", ["Apple_pie", "C#", "C++", "ресторан"])
    labels = ["ресторан", "C++", ["apple pie", "tart"], "C#"]
    data, prompts = main.validation_data(config_of(tmp_path, labels))
    assert data.folders == ["Apple_pie", "C#", "C++", "ресторан"]
    assert prompts == [["a apple pie.", "a tart."], ["a C#."], ["a C++."], ["a ресторан."]]


def test_an_order_that_cannot_be_told_is_refused(tmp_path):
    folders(tmp_path / "val", ["cat", "dog", "n01440764"])
    with pytest.raises(UserError, match="class 0 of the data is 'cat'"):
        main.validation_data(config_of(tmp_path, ["dog", "cat", "tench"]))


def test_synsets_are_in_the_order_of_the_list(tmp_path):
    folders(tmp_path / "val", ["n01440764", "n01443537"])
    _, prompts = main.validation_data(config_of(tmp_path, ["tench", "goldfish"]))
    assert prompts == [["a tench."], ["a goldfish."]]


def test_without_files_the_names_are_those_of_openai(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    classes = named_list(PROMPTS / "labels.json", "cifar10")
    folders(tmp_path / "val", classes)
    config = main.Config(val_folder=tmp_path / "val", val_dataset="cifar10")
    _, prompts = main.validation_data(config)
    assert prompts[0][0] == "a photo of a airplane." and len(prompts) == 10
    assert "labels.json is not here" in capsys.readouterr().out
    (tmp_path / "labels.json").write_text(json.dumps({"cifar10": classes[::-1]}))
    (tmp_path / "templates.json").write_text(json.dumps({"cifar10": ["my {}"]}))
    assert main.validation_data(config)[1][0] == ["my airplane"]
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="elsewhere"):  # a file that was named
        named_list(tmp_path / "elsewhere/labels.json", "cifar10")
