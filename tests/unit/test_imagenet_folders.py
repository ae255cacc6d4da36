"""ImageNet's variants by class folders: which class an image counts for, and what is said of
folders that do not fit."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from base.errors import MissingData, UserError
from dataset.tasks.catalog import CATALOG, CatalogOptions, Entry, Prompts, wanted_entries
from dataset.tasks.imagenet_folders import imagenet_classes
from dataset.tasks.zeroshot import open_set
from runtime.safe_pickle import load_plain

NAMES = Prompts().find("labels", "imagenet")


def fill(root, folders) -> None:
    """A class folder each, with one small image."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / folder / "0.bmp")


def opened(entry: Entry, tmp_path):
    return open_set(entry, Prompts(), tmp_path / "cache", load_plain)


def targets(data) -> dict[str, int]:
    """Label by class folder."""
    labels = data.images.labels.tolist()
    return {file.parent.name: label for file, label in zip(data.images.files, labels, strict=True)}


def test_the_classes_are_imagenets():
    facts = imagenet_classes()
    library = Path(find_spec("timm").origin).parent / "data/_info"  # importing it takes seconds
    assert facts["wnids"] == (library / "imagenet_synsets.txt").read_text().split()
    assert len(NAMES) == 1000
    for name in ("imagenet-a", "imagenet-r", "imagenet-o"):
        assert len(facts[name]) == 200 and facts[name] == sorted(set(facts[name]))


def test_numbered_folders_count_as_numbers(tmp_path):
    """ImageNet-v2's folders: in alphabetical order 10 would come before 2."""
    fill(tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val", map(str, range(1000)))
    data = opened(CATALOG["imagenetv2"].below(tmp_path), tmp_path)
    assert targets(data) == {str(number): number for number in range(1000)}
    assert data.classes == NAMES and len(data.templates) == 80


def test_a_subset_counts_among_its_own_classes(tmp_path):
    wnids, numbers = imagenet_classes()["wnids"], imagenet_classes()["imagenet-r"]
    fill(tmp_path / "imagenet-r", [wnids[number] for number in numbers])
    data = opened(CATALOG["imagenet-r"].below(tmp_path), tmp_path)
    assert len(data.classes) == 200 and data.classes[:3] == [
        "goldfish",
        "great white shark",
        "hammerhead shark",
    ]
    assert targets(data)["n01443537"] == 0 and targets(data)[wnids[numbers[199]]] == 199

    shutil.rmtree(tmp_path / "imagenet-r/n01443537")
    with pytest.raises(UserError, match=r"has 200 classes; no folder for n01443537 \(goldfish\)"):
        opened(CATALOG["imagenet-r"].below(tmp_path), tmp_path)
    fill(tmp_path / "imagenet-r", ["n01443537", "n01440764"])
    with pytest.raises(UserError, match=r"not one of them: n01440764 \(tench\)"):
        opened(CATALOG["imagenet-r"].below(tmp_path), tmp_path)


def test_any_folders_of_wordnet_ids(tmp_path):
    fill(tmp_path / "mine/test", ["n01443537", "n01440764"])
    data = opened(Entry("mine", "imagenet", str(tmp_path / "mine")), tmp_path)
    assert data.classes == ["tench", "goldfish"]
    assert targets(data) == {"n01440764": 0, "n01443537": 1}
    fill(tmp_path / "mine/test", ["cat"])
    with pytest.raises(UserError, match="mine/test/cat: no class of ImageNet"):
        opened(Entry("mine", "imagenet", str(tmp_path / "mine")), tmp_path)
    away = opened(CATALOG["imagenet-a"].below(tmp_path), tmp_path)
    assert isinstance(away, MissingData) and "no folder" in str(away)


def test_babel_imagenet_has_the_classes_that_a_language_names(tmp_path):
    wnids = imagenet_classes()["wnids"]
    fill(tmp_path / "imagenet/val", [wnids[number] for number in (0, 1, 7)])
    folder = tmp_path / "babel_imagenet"
    folder.mkdir()
    (folder / "babel_imagenet.json").write_text(json.dumps({"DE": [[1, 7], ["Karausche", "Hahn"]]}))
    prompts = {"DE": ["ein Foto: {}", "{c}!"]}
    (folder / "nllb_dist13b_prompts.json").write_text(json.dumps(prompts))
    (entry,) = wanted_entries(
        CatalogOptions(datasets=["babel_imagenet"], root=tmp_path, language=["de"])
    )
    assert (entry.published, entry.language) == ("babel_imagenet", "de")
    data = opened(entry, tmp_path)
    assert (data.classes, data.templates) == (["Karausche", "Hahn"], ["ein Foto: {}", "{}!"])
    assert targets(data) == {wnids[1]: 0, wnids[7]: 1}
    with pytest.raises(UserError, match="no language 'dd'; did you mean de"):
        opened(replace(entry, language="dd"), tmp_path)
    shutil.rmtree(tmp_path / "imagenet/val" / wnids[7])
    with pytest.raises(UserError, match=rf"no folder for {wnids[7]} \(Hahn\)"):
        opened(entry, tmp_path)
    (folder / "nllb_dist13b_prompts.json").unlink()
    assert "LAION-AI/CLIP_benchmark" in str(opened(entry, tmp_path))


def test_objectnet_by_its_mappings(tmp_path):
    """Three classes, one of them not ImageNet's; an ObjectNet class may be several of ImageNet's."""
    root = tmp_path / "objectnet/objectnet-1.0"
    fill(root / "images", ["alarm_clock", "air_freshener", "chair"])
    (root / "mappings").mkdir()
    called = {"chair": "Chair", "air_freshener": "Air freshener", "alarm_clock": "Alarm clock"}
    overlap = {"Chair": "folding chair", "Alarm clock": "analog clock; digital clock"}
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(called))
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    entry = CATALOG["objectnet"].below(tmp_path)
    data = opened(entry, tmp_path)
    assert data.classes == ["alarm clock", "chair"]
    assert targets(data) == {"alarm_clock": 0, "chair": 1} and len(data.templates) == 80
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(called | {"x": [1]}))
    with pytest.raises(UserError, match="the names of folders must be texts"):
        opened(entry, tmp_path)
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(called))
    shutil.rmtree(root / "images/chair")
    with pytest.raises(UserError, match="no folder of images for chair; unpack"):
        opened(entry, tmp_path)
