"""One image under several names is one image, and is found; names of two images stay two."""

import json
import os
import pathlib
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch

from base.errors import BadSample, UserError
from base.image_names import ImageKeys, existing
from dataset.health.samples import examine_file
from dataset.health.start import look_over
from dataset.images.decode import check_image_root, decode_image, size_of
from dataset.loading.stream import RecordSource
from dataset.sources.records import Records
from dataset.tasks.caption_lists import retrieval_list
from dataset.tasks.catalog import Entry
from dataset.tasks.compositional import choices_of_file
from dataset.tasks.record import image_of
from dataset.tasks.retrieval import RetrievalPair, RetrievalSet, number_images
from tests.helpers.images import of_colour

NFC, NFD = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))


def save_image(file: Path, colour: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(of_colour(colour, (40, 30), "JPEG"))


@pytest.fixture
def root(tmp_path):
    """photos/train/0001.jpg and photos/train/0002.jpg, beside a link to photos."""
    for number, colour in enumerate(("red", "blue"), 1):
        save_image(tmp_path / f"photos/train/000{number}.jpg", colour)
    (tmp_path / "link").symlink_to("photos")
    return tmp_path / "photos"


def names_of_one(root: Path) -> list[str]:
    """All ways to write train/0001.jpg below a folder."""
    return [
        "train/0001.jpg",
        "./train//0001.jpg",
        "train/../train/0001.jpg",
        "../photos/train/0001.jpg",
        "train\\0001.jpg",
        ".\\train\\..\\train\\0001.jpg",
        str(root / "train/0001.jpg"),
        f"{root}/train/../train/0001.jpg",
    ]


def test_all_names_of_an_image_are_one(root):
    names = names_of_one(root)
    assert number_images([*names, "train/0002.jpg"], root).tolist() == [0] * len(names) + [1]
    rows = [{"image": name, "caption": f"text {n}"} for n, name in enumerate(names)]
    data = RetrievalSet(rows, root, lambda image: image)
    assert data.images == names[:1] and data.img2txt == [list(range(len(names)))]
    file = root / "list.json"
    file.write_text(json.dumps(rows))
    images, captions = retrieval_list(Entry("mine", "retrieval", str(file)))
    assert images == [root / names[0]] and len(captions[0]) == len(names)


@pytest.mark.parametrize("through", ["link", "photos"])
def test_absolute_names_lead_through_a_link_or_not(root, through):
    keys = ImageKeys(root.parent / "link")
    assert keys(str(root.parent / through / "train/0001.jpg")) == "train/0001.jpg"


def test_an_image_is_found_by_each_of_its_names(root):
    expected = decode_image(root / "train/0001.jpg")
    for name in names_of_one(root):
        assert torch.equal(image_of({"image": name}, root), expected), name
        assert size_of(root / name) == (expected.shape[2], expected.shape[1])
        assert examine_file(root, name).size == tuple(expected.shape[1:])
        check_image_root(root, [name])
    with pytest.raises(BadSample, match=r"0003\.jpg: No such file"):
        image_of({"image": "train\\0003.jpg"}, root)


def test_parents_of_folders_that_are_not_there_or_are_links(root):
    assert existing(root / "none/../train/0001.jpg") == root / "train/0001.jpg"
    (root / "elsewhere/inner").mkdir(parents=True)
    (root / "away").symlink_to("elsewhere/inner")
    save_image(root / "elsewhere/a.jpg", "green")
    save_image(root / "a.jpg", "white")
    keys = ImageKeys(root)
    assert keys("away/../a.jpg") != keys("a.jpg")  # the system reads it as elsewhere/a.jpg
    assert image_of({"image": "away/../a.jpg"}, root)[:, 0, 0].tolist() != [255] * 3


def test_a_file_with_a_backslash_in_its_name_is_itself(root):
    save_image(root / "train\\0001.jpg", "green")
    keys = ImageKeys(root)
    assert keys("train\\0001.jpg") == "train\\0001.jpg" != keys("train/0001.jpg")
    assert not torch.equal(
        image_of({"image": "train\\0001.jpg"}, root), image_of({"image": "train/0001.jpg"}, root)
    )


@pytest.mark.parametrize("stored, listed", [(NFC, NFD), (NFD, NFC)])
def test_accents_may_be_composed_or_not(tmp_path, stored, listed):
    save_image(tmp_path / f"{stored}/{stored}.jpg", "red")
    for name in (f"{listed}/{listed}.jpg", f"{stored}/{listed}.jpg", f"{listed}\\{listed}.jpg"):
        check_image_root(tmp_path, [name])
        assert image_of({"image": name}, tmp_path).shape[0] == 3
        assert number_images([name, f"{stored}/{stored}.jpg"], tmp_path).tolist() == [0, 0]
    archive = tmp_path / f"{stored}.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(tmp_path / f"{stored}/{stored}.jpg", f"{stored}.jpg")
    assert image_of({"image": f"{listed}.zip/{listed}.jpg"}, tmp_path).shape[0] == 3
    assert image_of({"image": f".\\{listed}.zip\\{listed}.jpg"}, tmp_path).shape[0] == 3


def test_two_files_whose_accents_differ_are_two(tmp_path):
    for name, colour in ((NFC, "red"), (NFD, "blue")):
        save_image(tmp_path / f"{name}.jpg", colour)
    assert number_images([f"{NFC}.jpg", f"{NFD}.jpg"], tmp_path).tolist() == [0, 1]
    mixed = "e\u0301t\u00e9.jpg"  # neither of them: which one is meant is unknown
    assert existing(tmp_path / mixed) == tmp_path / mixed
    with pytest.raises(BadSample):
        image_of({"image": mixed}, tmp_path)


def test_names_that_are_no_paths_are_missing(tmp_path):
    for name in ("é" * 300 + ".jpg", "a\\\0.jpg", "..\\..\\..", "\\"):
        with pytest.raises(BadSample):
            image_of({"image": name}, tmp_path)
        ImageKeys(tmp_path)(name)


def test_images_of_the_training_are_noticed_by_any_name(root, tmp_path):
    rows = [
        {"image": "train/0001.jpg", "caption": "a"},
        {"image": "train/0002.jpg", "caption": "b"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    held = [{"image": str(root / "train/0001.jpg"), "caption": "a"}]
    (tmp_path / "val.json").write_text(json.dumps(held))
    records = Records(tmp_path / "train.json")
    pair = RetrievalPair(tuple, root, number_images(["a", "b"]))
    source = RecordSource(records, pair, "train_file")
    lines = look_over([source], None, {"val_file": [str(tmp_path / "val.json")]})
    assert any("1 of 1 images, too: train/0001.jpg" in line for line in lines)


def test_examples_of_one_image_have_it_once(root):
    rows = {
        str(n): {"filename": name, "caption": "a", "negative_caption": "b"}
        for n, name in enumerate(("train/0001.jpg", "./train/../train/0001.jpg", "train\\0001.jpg"))
    }
    (root / "add_att.json").write_text(json.dumps(rows))
    data = choices_of_file(root / "add_att.json", root)
    assert len(data) == 1 and data.example_images.tolist() == [[0]] * 3
    beside = root / "val2017"  # COCO's folder needs no --images
    beside.symlink_to(root)
    (found,) = choices_of_file(root / "add_att.json", Path(".")).sources
    assert found.is_relative_to(beside) and not data.sources[0].is_relative_to(beside)


def test_names_of_other_files_cost_no_system_call(root, monkeypatch):
    asked = []

    def count(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, **k: (asked.append(a), real(*a, **k))[1])

    for name in ("lstat", "stat", "readlink"):
        count(os, name)
    if hasattr(pathlib, "_normal_accessor"):  # paths of Python 3.10 took os.stat at their import
        count(pathlib._normal_accessor, "stat")
    keys = ImageKeys(root)
    asked.clear()
    for name in ("train/0001.jpg", "train/0002.jpg", f"{NFC}.jpg", str(root / "train/0001.jpg")):
        keys(name)
    assert existing("train/0003.jpg") == Path("train/0003.jpg")
    assert not asked
    decode_image(root / "train/0001.jpg")
    assert len(asked) == 1


def test_a_folder_without_the_images_is_still_refused(tmp_path):
    with pytest.raises(UserError, match="none of the first 1 images"):
        check_image_root(tmp_path, ["train\\0001.jpg"])
