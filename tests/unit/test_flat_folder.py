"""ImageNet's validation set as published: one folder of images and a list, in every evaluation."""

import pytest
import torch
from PIL import Image

from base.errors import UserError
from dataset.sources.flat_folder import DEVKIT, KAGGLE, SYNSETS, flat_folder, is_flat
from dataset.tasks.classification import FolderRecords, class_names

NAMES = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3, 4)]
CLASSES = ["n01440764", "n01443537", "n01484850"]
LABELS = [2, 0, 2, 1]


@pytest.fixture
def val(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def write_list(val, kind: str, inside: bool = False) -> None:
    place = val if inside else val.parent
    if kind.startswith("numbers"):
        above = "val/" if kind == "numbers, from above" else ""
        lines = [f"{above}{name} {label}" for name, label in zip(NAMES, LABELS, strict=True)]
        (place / "val.txt").write_text("\n".join(lines) + "\n")
    elif kind == "synsets":
        (place / SYNSETS).write_text("".join(f"{CLASSES[label]}\n" for label in LABELS))
    else:
        lines = ["ImageId,PredictionString"]
        for name, label in zip(NAMES[::-1], LABELS[::-1], strict=True):
            lines.append(f"{name.removesuffix('.JPEG')},{CLASSES[label]} 1 2 3 4 ")
        lines[1] = '"{}","{}"'.format(*lines[1].split(","))  # as a spreadsheet saves it
        (place / KAGGLE).write_text("\n".join(lines))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["numbers", "numbers, from above", "synsets", "kaggle"])
def test_lists_of_classes(val, kind, inside):
    write_list(val, kind, inside)
    assert is_flat(val)
    records = FolderRecords(val, CLASSES)
    found = {record["image"]: record["label"] for record in map(records.__getitem__, range(4))}
    assert found == dict(zip([val / name for name in NAMES], LABELS, strict=True))
    assert class_names([str(val)], None, val) == ([] if "numbers" in kind else CLASSES)
    assert flat_folder(val).labels.dtype == torch.int64


def test_the_classes_are_those_of_the_training_folders(val, tmp_path):
    write_list(val, "synsets")
    train = tmp_path / "train"
    for name in ["n00000001", *CLASSES]:
        (train / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(train / name / "a.png")
    names = class_names([str(train), str(val)], None, tmp_path)
    assert names == ["n00000001", *CLASSES] and not is_flat(train)
    kaggle = [f"{name} tench, Tinca tinca" for name in names]  # its LOC_synset_mapping.txt
    for known in (names, kaggle):
        labels = [FolderRecords(val, known)[i]["label"] for i in range(4)]
        assert labels == [label + 1 for label in LABELS]
        assert [record["label"] for record in FolderRecords(train, known)] == [0, 1, 2, 3]


def test_what_lacks_is_said(val):
    with pytest.raises(UserError, match=r"val\.txt with a line `name label`"):
        FolderRecords(val)
    (val.parent / DEVKIT).write_text("490\n361\n171\n822\n")
    with pytest.raises(UserError, match="counts classes in an order of its own"):
        FolderRecords(val)
    (val / SYNSETS).write_text("n01440764\n")
    with pytest.raises(UserError, match="1 synsets for the 4 images"):
        FolderRecords(val)
    write_list(val, "synsets", inside=True)
    with pytest.raises(UserError, match="'n01484850' is not among the 1 classes"):
        FolderRecords(val, ["n01440765"])
    (val / "val.txt").write_text(f"{NAMES[0]} 3\n")
    with pytest.raises(UserError, match="line 1: class 3, but there are 3"):
        FolderRecords(val, CLASSES)
    (val / "val.txt").write_text("n01440764_1.JPEG 0\nn01440764_2.JPEG 1\n")  # of another folder
    with pytest.raises(UserError, match=r"val\.txt: none of its first 2 images is there, e\.g\. /"):
        FolderRecords(val)
