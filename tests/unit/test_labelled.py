"""Images with labels, from every kind of source; and what is wrong with them."""

import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from base.errors import BadSample, UserError
from dataset.health.samples import label_texts
from dataset.health.survey import open_list, split_folders
from dataset.images.vit import ViTEvalView, ViTTrainView, ViTViews
from dataset.loading.filtered import Filtered
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.class_folder import ClassFolder
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import list_shards
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.classification import (
    FolderRecords,
    LabelCollate,
    Labelled,
    LabelledImage,
    LabelOptions,
    Labels,
    Split,
    TorchvisionRecords,
    class_names,
    identity,
    open_records,
    read_class_names,
    training_source,
)
from dataset.tasks.record import image_of
from dataset.tasks.torchvision_sets import sample_of, split_options
from tests.helpers.images import of_colour

VIEW = ViTEvalView(8)
HERE = Path(".")


def options(root: Path) -> SimpleNamespace:
    return SimpleNamespace(data_root=root, download=False, shuffle_buffer=10)


def labels(classes=10, names=(), **options) -> Labels:
    return Labels(classes, LabelOptions(**options), "list", names)


def jpeg(value=100, size=(12, 10)) -> bytes:
    return of_colour((value, 50, 200), size, "JPEG")


RECORDS = {
    "one": ({"label": 3}, [3]),
    "list": ({"labels": [2, 5, 2]}, [2, 5]),
    "WebDataset's cls": ({"cls": b"7"}, [7]),
    "json member": ({"json": json.dumps({"labels": [4, 1]}).encode()}, [4, 1]),
    "TFRecord feature": ({"label": [6]}, [6]),
    "COYO-Labeled": ({"labels": [1, 9, 4], "label_probs": [0.5, 0.2, 0.9]}, [4, 1, 9]),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_labels_of_every_kind_of_record(kind):
    record, expected = RECORDS[kind]
    assert labels()(record) == (expected, [1.0] * len(expected))


NAMES = ["cat", "caf\u00e9", "n01440764 tench, Tinca tinca", "crane", "7", "crane"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"labels": ["cafe\u0301", "cat", "cat"]}, [1, 0]),  # as macOS spells it
        ({"label": "n01440764"}, [2]),
        ({"cls": b"cat\n"}, [0]),
        ({"labels": ["cat", 2, "3"]}, [0, 2, 3]),  # numbers stay numbers
    ],
)
def test_labels_by_the_names_of_the_classes(record, expected):
    assert labels(6, NAMES)(record)[0] == expected


@pytest.mark.parametrize(
    ("label", "names", "words"),
    [
        ("crane", NAMES, "the name of several classes"),
        ("catt", NAMES, "did you mean cat"),
        ("cat", (), "--classes FILE"),
        ("7", NAMES, "label 7 is outside"),
    ],
)
def test_labels_that_name_no_class(label, names, words):
    with pytest.raises(UserError, match=words):
        labels(6, names)({"label": label})


def test_threshold_number_and_soft_labels():
    record = {"labels": [1, 9, 4], "label_probs": [0.5, 0.2, 0.9]}
    assert labels(label_threshold=0.3)(record)[0] == [4, 1]
    assert labels(label_threshold=0.95)(record) == ([], [])
    assert labels(label_top=1)(record)[0] == [4]
    assert labels(soft_labels=True)(record) == ([4, 1, 9], [0.9, 0.5, 0.2])


@pytest.mark.parametrize(
    "record, words",
    [
        (
            {"labels": [1, 10], "index": 7},
            "list, entry 7: label 10 is outside the list of 10 classes",
        ),
        ({"labels": [-1], "key": "a.tar/0"}, "a.tar/0: label -1 is outside"),
        ({"labels": [1, 2], "label_probs": [0.5]}, "2 labels with 1 label_probs"),
        ({"label": "cat"}, "'cat' is no class number"),
    ],
)
def test_wrong_labels_end_the_run(record, words):
    with pytest.raises(UserError, match=words):
        labels()(record)


@pytest.mark.parametrize(
    "record",
    [{}, {"labels": []}, {"label": " "}, {"json": b"{}"}, {"json": b"["}, {"caption": "a cat"}],
)
def test_a_sample_without_label_is_a_bad_sample(record):
    with pytest.raises(BadSample, match=r"no label|not valid JSON"):
        labels()(record | {"key": "a.tar/0"})


def test_a_batch_pads_labels():
    samples = [
        {
            "image": torch.zeros(3, 2, 2, dtype=torch.uint8),
            "labels": ids,
            "label_weights": [1.0] * len(ids),
        }
        for ids in ([4], [1, 2, 3, 0, 5], [])
    ]
    batch = LabelCollate()(samples)
    assert batch["labels"].shape == (3, 8) and batch["label_weights"].sum(1).tolist() == [1, 5, 0]
    assert (
        batch["labels"][1, :5].tolist() == [1, 2, 3, 0, 5] and batch["image"].dtype == torch.uint8
    )
    assert LabelCollate()(samples[:1])["labels"].shape == (1, 1)


def folder_of(root, names=("cat", "dog"), each=3):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{name}_{i}.jpg").write_bytes(jpeg(40 * number + i))
    return root


def test_class_folders(tmp_path):
    root = folder_of(tmp_path / "train")
    assert class_names([str(root)], None, HERE) == ["cat", "dog"]
    split = Split(str(root), HERE, VIEW, labels(2), ["cat", "dog"])
    assert (
        len(split) == 6
        and split.load(4)["labels"] == [1]
        and split.load(4)["image"].shape == (3, 8, 8)
    )
    assert [Path(name).name for name in split.file_names][:2] == ["cat_0.jpg", "cat_1.jpg"]
    other = folder_of(tmp_path / "val", ("dog", "cats"))
    with pytest.raises(UserError, match="cats: not among the 2 classes; did you mean cat"):
        Split(str(other), HERE, VIEW, labels(2), ["cat", "dog"])
    before = identity(split.records, str(root))
    (root / "dog" / "more.jpg").write_bytes(jpeg())
    assert identity(open_records(str(root), HERE, "test"), str(root)) != before


def test_lists(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    lines = [{"url": "a.jpg", "labels": [i % 3], "label_probs": [0.9]} for i in range(4)]
    file = tmp_path / "list.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = Split(str(file), tmp_path, VIEW, labels(3))
    assert [split.load(i)["labels"] for i in range(4)] == [[0], [1], [2], [0]]
    with pytest.raises(UserError, match=r"entry 2: label 2 is outside the list of 2 classes"):
        training_source(str(file), VIEW, labels(2), [], options(tmp_path))
    with pytest.raises(UserError, match=r"entry 2: label 2 is outside the list of 2 classes"):
        Split(str(file), tmp_path, VIEW, labels(2))  # before the training, too
    file.write_text(json.dumps({"url": "a.jpg"}) + "\n")
    with pytest.raises(UserError, match="no field 'labels'"):
        open_records(str(file), tmp_path, "train")
    with pytest.raises(UserError, match="neither a folder"):
        open_records(str(tmp_path / "nothing"), tmp_path, "train")
    with pytest.raises(UserError, match="no such file; name a text file"):
        class_names([], tmp_path / "classes.txt", tmp_path)


def tar_of(path, count):
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for ending, data in (
                ("jpg", jpeg(i)),
                ("json", json.dumps({"labels": [i % 4]}).encode()),
            ):
                member = tarfile.TarInfo(f"{i:05d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": count}))


def shards_of(folder, kind):
    for number, count in enumerate((5, 3)):
        path = folder / f"{number:05d}.{kind}"
        if kind == "tar":
            tar_of(path, count)
        else:
            write_records(
                path, [encode_example({"jpg": jpeg(i), "label": i % 4}) for i in range(count)]
            )
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_shards(kind, tmp_path):
    data = shards_of(tmp_path, kind)
    split = Split(data, HERE, VIEW, labels(4))
    expected = [i % 4 for i in range(5)] + [i % 4 for i in range(3)]
    assert [split.load(i)["labels"][0] for i in range(8)] == expected
    assert [split.load(i)["labels"][0] for i in (6, 1, 7, 0)] == [1, 1, 2, 0]  # in any order, too
    source = training_source(data, VIEW, labels(4), [], options(HERE))
    loader = StreamLoader(Stream([source], LabelCollate()), 4, workers=0)
    seen = torch.cat([next(loader)["labels"][:, 0] for _ in range(2)])
    assert sorted(seen.tolist()) == sorted(expected)


@pytest.mark.parametrize("nothing", [None, [], float("nan"), "", [None]], ids=str)
def test_an_entry_without_labels_is_left_out_of_a_list(nothing, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    lines = [{"url": "a.jpg", "labels": each} for each in ([0], nothing, [1], [0])]
    file = tmp_path / "list.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = training_source(str(file), VIEW, labels(2), [], options(tmp_path))
    loader = StreamLoader(Stream([source], LabelCollate()), 3, workers=0, error_budget=0.5)
    assert sorted(torch.cat([next(loader)["labels"] for _ in range(2)])[:, 0].tolist()[:3]) == [
        0,
        0,
        1,
    ]
    assert loader.errors[str(file)] >= 1 and "entry 1: no label" in loader.bad_samples[0]


def test_an_example_without_an_image_is_left_out_of_shards(tmp_path):
    """As a sample of a tar without one."""
    fields = [{"jpg": jpeg(1), "label": 1}, {"label": 2}, {"jpg": jpeg(3), "label": 3}]
    path = tmp_path / "a.tfrecord"
    write_records(path, [*map(encode_example, fields), b"\x0a\xff"])
    index = ShardIndex([path], error_budget=0.5)
    assert [record["label"] for record in index] == [[1], [3]] and index.lost == 2
    assert index.bad[0].startswith(f"{path}/1: no image (image, jpg, ")
    split = Split(str(path), HERE, VIEW, labels(4), records=index)
    assert [split.load(i)["labels"] for i in range(2)] == [[1], [3]]
    with pytest.raises(
        UserError, match=r"2 of 4 samples are unusable(.|\n)*a\.tfrecord/1: no image"
    ):
        ShardIndex([path])


def test_a_broken_checksum_is_counted(tmp_path):
    data = shards_of(tmp_path, "tfrecord")
    path = tmp_path / "00000.tfrecord"
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # inside the first image
    path.write_bytes(content)
    source = training_source(data, VIEW, labels(4), [], options(HERE))
    loader = StreamLoader(Stream([source], LabelCollate()), 7, workers=0, error_budget=0.2)
    next(loader)
    assert loader.errors == {data: 1} and "checksum" in loader.bad_samples[0]
    with pytest.raises(UserError, match=r"1 of 8 samples are unusable.*\n.*checksum is wrong"):
        Split(data, HERE, VIEW, labels(4))


def test_images_without_likely_labels_are_left_out_and_not_counted(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    records = [{"image": "a.jpg", "labels": [i], "label_probs": [i / 10]} for i in range(10)]
    reader = labels(label_threshold=0.5)
    source = Labelled(RecordSource(records, LabelledImage(VIEW, reader, tmp_path)), reader)
    loader = StreamLoader(Stream([source], LabelCollate()), 5, workers=0)
    first = next(loader)
    state = loader.state_dict()
    assert (
        sorted(first["labels"][:, 0].tolist()) == [5, 6, 7, 8, 9]
        and sum(loader.errors.values()) == 0
    )
    again = StreamLoader(Stream([source], LabelCollate()), 5, workers=0, state=state)
    for a, b in zip(islice(loader, 3), islice(again, 3), strict=True):
        assert torch.equal(a["labels"], b["labels"])
    nothing = labels(label_threshold=0.95)
    with pytest.raises(UserError, match=r"no image has a label of probability 0.95"):
        Labelled(RecordSource(records, LabelledImage(VIEW, nothing, tmp_path)), nothing)
    never = Filtered(RecordSource(records, LabelledImage(VIEW, reader, tmp_path)), len, "is empty")
    never.keep = lambda record: False
    with pytest.raises(UserError, match="is empty"):
        next(StreamLoader(Stream([never], LabelCollate()), 5, workers=0))


def test_records_left_out_here_and_there_are_no_epoch(monkeypatch):
    monkeypatch.setattr("dataset.loading.filtered.ENOUGH", 3)
    numbers = RecordSource([{"number": number} for number in range(10)], None)
    even = Filtered(numbers, lambda record: record["number"] % 2 == 0, "all are odd", kept=0.5)
    found = [record["number"] for _, record, _ in islice(even.read(0, 0, 1, 0), 50)]
    assert sorted(set(found)) == [0, 2, 4, 6, 8] and len(found) == 50


@pytest.mark.parametrize("count, epoch", [(10, 5), (40, 35), (3, 1)])
def test_an_epoch_counts_the_images_that_keep_a_label(tmp_path, count, epoch):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    records = [{"image": "a.jpg", "labels": [1], "label_probs": [i / 10]} for i in range(count)]
    reader = labels(label_threshold=0.5 if count > 3 else 0.2)
    source = Labelled(RecordSource(records, LabelledImage(VIEW, reader, tmp_path)), reader)
    assert len(source) == epoch
    _, taken, _ = source.start(epoch, 0, 1)
    assert taken == count  # an epoch of kept records is one of the list


def test_torchvision(tmp_path):
    split = Split("torchvision/FakeData", tmp_path, VIEW, labels(10))
    assert split.load(3)["image"].shape == (3, 8, 8) and len(split) == 1000
    with pytest.raises(UserError, match="did you mean CIFAR10"):
        open_records("torchvision/CIFAR-10", tmp_path, "train")
    with pytest.raises(UserError, match=r"CIFAR10:test: .*--download"):
        open_records("torchvision/CIFAR10:test", tmp_path, "train")
    assert not list(tmp_path.iterdir())


def eurosat(root: Path) -> Path:
    for name in ("Forest", "River"):
        file = root / f"eurosat/2750/{name}/{name}_1.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes(jpeg())
    return root


@pytest.mark.parametrize("name", ["MNIST:trian", "MNIST:val", "EuroSAT:test", "SUN397:train"])
def test_a_name_that_no_split_of_torchvision_has_means_no_other_images(tmp_path, name):
    with pytest.raises(UserError, match="splits"):
        open_records(f"torchvision/{name}", eurosat(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "split", "named", "options"),
    [
        ("MNIST", "test", "", {"train": False}),
        ("MNIST", "test", "train", {"train": True}),
        ("STL10", "train", "unlabeled", {"split": "unlabeled"}),
        ("EMNIST", "train", "letters", {"split": "letters", "train": True}),
        ("EMNIST", "test", "letters", {"split": "letters", "train": False}),
        ("INaturalist", "train", "2021_valid", {"version": "2021_valid"}),
        ("LFWPeople", "test", "", {"split": "test"}),
        ("EuroSAT", "test", "", {}),
    ],
)
def test_what_torchvision_is_told_of_a_split(name, split, named, options):
    assert split_options(name, split, named) == options


def test_a_torchvision_set_without_splits_says_so_and_drops_broken_images(tmp_path, capsys):
    split = Split("torchvision/EuroSAT", eurosat(tmp_path), VIEW, labels(10))
    assert "has no splits; all of its 2 images" in "".join(capsys.readouterr())
    assert split.records.classes == ["Forest", "River"] and split.load(1)["labels"] == [1]
    (tmp_path / "eurosat/2750/River/River_1.jpg").write_bytes(b"no image")
    with pytest.raises(BadSample, match="EuroSAT, image 1"):
        split.load(1)


@pytest.mark.parametrize("name", ["CocoCaptions", "VisionDataset"])
def test_what_is_no_set_of_labelled_images_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=f"torchvision/{name}: "):
        open_records(f"torchvision/{name}", tmp_path, "train")


def test_a_target_that_is_no_class_is_one_sentence():
    with pytest.raises(UserError, match="a target is 'a dog'"):
        sample_of([(Image.new("RGB", (4, 4)), "a dog")], 0, "torchvision/SBU")


def test_views():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 30, 20), dtype=np.uint8))
    view = ViTTrainView(16, ViTViews(crop_area=(0.3, 1.0), policy="trivialaugment"))
    assert view(image).shape == (3, 16, 16) and view(image).dtype == torch.uint8
    exact = ViTTrainView(16, ViTViews(flip=False), exact=True)
    assert exact(image).dtype == torch.float32
    assert ViTEvalView(16, resize_small=20)(image).shape == (3, 16, 16)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip": False}
    grey = torch.full((3, 40, 40), 7, dtype=torch.uint8)
    for exact in (False, True):  # random erasing: noise in one rectangle of 2 to 33 % of the area
        view = ViTTrainView(40, ViTViews(**whole, erase=1.0), exact)(grey)
        rows, columns = (view != 7).any(0).nonzero().unbind(1)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0.015 * 1600 < box < 0.36 * 1600 and len(rows) > 0.9 * box and view.max() > 100
        assert view.dtype == (torch.float32 if exact else torch.uint8)
    never = ViTTrainView(40, ViTViews(**whole))(grey)
    assert (never == 7).all()
    with pytest.raises(UserError, match="at least 16"):
        ViTEvalView(16, resize_small=10)
    with pytest.raises(UserError, match="policy 'auto' is unknown"):
        ViTViews(policy="auto")
    with pytest.raises(UserError, match="crop_area"):
        ViTViews(crop_area=(0.5, 0.1))


def test_splits_are_no_classes(tmp_path):
    folder_of(tmp_path / "train", ("cat", "dog"))
    folder_of(tmp_path / "Val", ("cat", "dog"))
    with pytest.raises(
        UserError, match=r"holds splits \(Val, train\), not classes; name one: .*/Val"
    ):
        FolderRecords(tmp_path)
    with pytest.raises(UserError, match="holds splits"):
        class_names([str(tmp_path)], None, tmp_path)
    with pytest.raises(UserError, match="holds splits"):
        FolderRecords(tmp_path, ["train", "bus"])
    assert class_names([str(tmp_path / "train")], None, tmp_path) == ["cat", "dog"]
    folder_of(tmp_path, ("bus",))  # beside which a train is a class
    assert FolderRecords(tmp_path).classes == ["Val", "bus", "train"]


def test_classes_may_be_called_as_splits_where_a_list_names_them(tmp_path):
    root = folder_of(tmp_path / "set", ("test", "train"), 2)
    (tmp_path / "names.txt").write_text("train\ntest\n")
    names = class_names([str(root)], tmp_path / "names.txt", tmp_path)
    labels = [record["label"] for record in FolderRecords(root, names)]
    assert labels == [1, 1, 0, 0]
    assert ClassFolder(root, None, [["a train", "Train"], "test"]).labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="list their names"):
        ClassFolder(root, None, ["cat", "dog"])
    assert split_folders([str(root)]) == [str(root / "train"), str(root / "test")]
    assert split_folders([str(root)], names) == [str(root)]
    assert [record["label"] for record in open_list(str(root))] == [0, 0, 1, 1]


def test_the_key_of_a_data_set_changes_with_its_images(tmp_path):
    root = folder_of(tmp_path / "train", ("cat", "dog"))
    file = next(root.rglob("*.jpg"))
    keys = {identity(FolderRecords(root), str(root))}
    assert keys == {identity(FolderRecords(root), str(root))}
    before = file.stat()
    file.write_bytes(jpeg(10, (40, 40)))
    keys.add(identity(FolderRecords(root), str(root)))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # the same size and time of change
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.add(identity(FolderRecords(root), str(root)))
    file.rename(file.with_name("renamed.jpg"))
    keys.add(identity(FolderRecords(root), str(root)))
    assert len(keys) == 4


def test_the_key_of_a_torchvision_set_changes_with_its_images_behind_links(tmp_path):
    disk = folder_of(tmp_path / "disk", ("cat", "dog"))
    (tmp_path / "root").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).symlink_to(disk / name)
    records = TorchvisionRecords("ImageFolder", tmp_path / "root", "train")
    before = records.content()
    next((disk / "cat").iterdir()).write_bytes(jpeg(10, (40, 40)))
    assert len(records) > 1 and records.content() != before


@pytest.mark.parametrize("relative", [False, True])
def test_the_key_of_a_torchvision_set_is_of_its_own_folder(tmp_path, monkeypatch, relative):
    """What lies beside it in torchvision's root is not even looked at."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "food-101/images", ("cake", "soup"))
    files = sorted((tmp_path / "food-101/images").rglob("*.*"))
    (tmp_path / "food-101/meta").mkdir()
    lists = {
        name: [f"{name}/{f.stem}" for f in files if f.parent.name == name]
        for name in ("cake", "soup")
    }
    for split in ("train", "test"):
        (tmp_path / f"food-101/meta/{split}.json").write_text(json.dumps(lists))
    folder_of(tmp_path / "test", ("cat",))  # another set, of a split's name
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")  # a walk of the root would stop here
    records = TorchvisionRecords("Food101", Path(".") if relative else tmp_path, "test")
    before = records.content()
    folder_of(tmp_path / "beside", ("dog",))
    assert len(records) == len(files) and records.content() == before
    files[0].write_bytes(jpeg(10, (40, 40)))
    assert records.content() != before


def test_the_key_of_a_list_changes_with_its_images_and_their_folder(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(jpeg())
    file = tmp_path / "list.jsonl"
    file.write_text(json.dumps({"image": "a.jpg", "label": 0}) + "\n")

    def key(folder: str) -> str:
        records = open_records(str(file), tmp_path / folder, "test")
        return identity(records, str(file), tmp_path / folder)

    first = key("one")
    assert key("one") == first != key("two")
    (tmp_path / "one/a.jpg").write_bytes(jpeg(200))
    assert key("one") != first


def test_the_key_of_a_list_changes_with_the_order_of_the_names(tmp_path):
    """For the numbers of labels that are names change with it."""
    (tmp_path / "a.jpg").write_bytes(jpeg())
    file = tmp_path / "list.jsonl"
    file.write_text(json.dumps({"image": "a.jpg", "label": "cat"}) + "\n")
    found = []
    for names in (["cat", "dog"], ["dog", "cat"]):
        which = Labels(2, LabelOptions(), "list", names)
        split = Split(str(file), tmp_path, VIEW, which, names)
        key = identity(split.records, str(file), tmp_path, split.classes)
        found.append((split.load(0)["labels"], key))
    assert [place for place, _ in found] == [[0], [1]]
    assert found[0][1] != found[1][1]


def test_the_key_of_shards_changes_with_the_members_that_their_address_names(tmp_path):
    data = shards_of(tmp_path, "tar")
    addresses = [data, f"{data}?labels=json.a", f"{data}?labels=json.b", f"{data}?image=jpg"]
    keys = {identity(ShardIndex(list_shards(address)), address) for address in addresses}
    assert len(keys) == 4


def test_the_key_of_tables_that_a_pattern_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    data = str(tmp_path / "train-*.parquet")
    keys = set()
    for label in (0, 1):
        table = pyarrow.table({"image": ["a.jpg"], "label": [label]})
        parquet.write_table(table, tmp_path / "train-00000.parquet")
        keys.add(identity(open_records(data, tmp_path, "test"), data, tmp_path))
    assert len(keys) == 2


def test_class_folders_below_a_relative_data_root(tmp_path, monkeypatch):
    folder_of(tmp_path / "data/val", ("cat", "dog"))
    monkeypatch.chdir(tmp_path)
    split = Split("data/val", Path("data"), VIEW, labels(2))
    assert split.load(0)["image"].shape[0] == 3


def test_class_lists(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbfcat \r\n dog\r\ncrane\ncrane\n\n \n")
    assert class_names([], file, tmp_path) == ["cat", "dog", "crane", "crane"]
    file.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match=r"classes\.txt, line 2: is blank"):
        class_names([], file, tmp_path)
    file.write_text("\n\n")
    with pytest.raises(UserError, match="holds no names"):
        class_names([], file, tmp_path)
    root = folder_of(tmp_path / "train", ("cat", "crane"))
    with pytest.raises(UserError, match="'crane' is the name of several classes"):
        FolderRecords(root, ["cat", "crane", "crane"])
    accented = folder_of(tmp_path / "nfd", ("e\u0301clair", "cat"))
    records = FolderRecords(accented, ["cat", "\u00e9clair"])
    assert {
        str(records[i]["image"].parent.name): records[i]["label"] for i in range(len(records))
    } == {
        "cat": 0,
        "e\u0301clair": 1,
    }


@pytest.mark.parametrize(
    "record",
    [
        {"labels": "cat"},
        {"label": 1.7},
        {"label": True},
        {"labels": [1], "label_probs": "high"},
        {"labels": [1], "label_probs": [None]},
        {"labels": [1], "label_probs": [float("nan")]},
        {"labels": [1], "label_probs": [-0.5]},
        {"labels": [[1]]},
        {"labels": {"1": 1}},
    ],
    ids=str,
)
def test_labels_of_another_type_are_refused_in_one_sentence(record):
    with pytest.raises(
        UserError, match=r"entry 3: (label|label_probs) .*(no class number|no prob)"
    ):
        labels()(record | {"index": 3})


def test_labels_in_other_spellings():
    assert labels()({"labels": ["1", 2.0, "03"]}) == ([1, 2, 3], [1.0, 1.0, 1.0])
    assert labels()({"cls": b" 7\n"}) == ([7], [1.0])
    assert labels()({"label": 4, "label_probs": 0.5}) == ([4], [1.0])


def test_null_among_labels_is_none():
    likely = labels(label_threshold=0.5)
    assert likely({"labels": [None, 1, "2"], "label_probs": [0.9, 0.3, 0.8]}) == ([2], [1.0])
    assert labels()({"labels": [1, None, " ", float("nan")]}) == ([1], [1.0])
    with pytest.raises(BadSample, match="entry 3: no label"):
        labels()({"labels": [None, ""], "index": 3})


def test_class_names_may_be_a_json_list(tmp_path):
    (tmp_path / "names.json").write_text('["cat", "dog \\ud83d"]')
    assert read_class_names(tmp_path / "names.json") == ["cat", "dog \ufffd"]
    (tmp_path / "names.json").write_text('{"cat": 0}')
    with pytest.raises(UserError, match=r"names\.json: expected a list"):
        read_class_names(tmp_path / "names.json")


@pytest.mark.parametrize("name", ["filename", "image"])
@pytest.mark.parametrize("column", ["labels", "class", "label"])
def test_tables_of_labels_by_their_usual_names(name, column, tmp_path):
    (tmp_path / "0.jpg").write_bytes(of_colour((9, 9, 9)))
    file = tmp_path / "t.csv"
    several = '"1, 2"' if column == "labels" else "1"
    file.write_text(f"{name},{column}\n0.jpg,{several}\n")
    (record,) = open_records(str(file), tmp_path, "train")
    found, _ = Labels(3, LabelOptions(), "t")(record)
    assert record["image"] == "0.jpg" and found == ([1, 2] if column == "labels" else [1])
    (row,) = open_list(str(file))
    assert label_texts(row) == [str(label) for label in found]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_folders_of_parquet_and_saved_data_sets_have_labels(kind, tmp_path):
    images = [of_colour((9, 9, number)) for number in range(2)]
    data = {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 1]}
    table, folder = pyarrow.table(data), tmp_path / "data"
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    else:
        (folder / "dataset_info.json").write_text("{}")
        with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table)
    records = open_records(str(folder), tmp_path, "train")
    assert [image_of(row)[2, 0, 0] for row in records] == [0, 1]
    labels = Labels(2, LabelOptions(), "t")
    assert [labels(row)[0] for row in records] == [[0], [1]]
    assert class_names([str(folder)], None, tmp_path) == []
    assert [label_texts(row) for row in open_list(str(folder))] == [["0"], ["1"]]
