"""main.py's validation during training: the classes are those of the folders, in whatever order
the list of labels names them."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import main
from base.distributed import ALONE
from base.errors import UserError
from dataset.images.align import AlignView
from dataset.images.clip import EvalView
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


@pytest.mark.parametrize(
    ("model", "view"),
    [("ALIGN_B0_MINI", AlignView(32)), ("ViT-B-32", EvalView(32, "bicubic"))]
    + [("CL2L_VITT8_CL2L", EvalView(32, "bilinear"))],
)
def test_images_are_resized_as_the_model_was_trained(model, view, tmp_path):
    folders(tmp_path / "val", ["cat", "dog"])
    config = config_of(tmp_path, ["cat", "dog"])
    config.network = replace(config.network, model=model, image_size=32)
    data, _ = main.validation_data(config)
    found = data.transform
    assert type(found) is type(view) and vars(found) == vars(view)


def test_unreadable_images_stand_beside_the_scores_and_chance(tmp_path, monkeypatch):
    folders(tmp_path / "val", ["cat", "dog", "eel", "fox"])
    (tmp_path / "val/cat/a.png").write_bytes(b"no image")
    config = config_of(tmp_path, ["cat", "dog", "eel", "fox"])
    config.error_budget, config.workers = 0.5, 0
    config.network = replace(config.network, model="CLIP_VITT8_CLIP", image_size=32)
    data, prompts = main.validation_data(config)
    monkeypatch.setattr(main, "text_classifier", lambda *_: None)

    def counted(embed_image, classes, batches, own, labels, world):
        return {"acc1_z": float(sum(len(batch["image"]) for batch in batches)), "own": list(own)}

    monkeypatch.setattr(main, "zero_shot_accuracy", counted)
    model = SimpleNamespace(embed_text=None, embed_image=None)
    monkeypatch.setattr(main, "evaluating", lambda model: nullcontext())
    found = main.evaluate(model, data, prompts, None, config, ALONE)
    expected = {"acc1_z": 4.0, "own": [0, 1, 2, 3], "chance": 25.0, "unreadable_images": 1}
    assert found == expected
