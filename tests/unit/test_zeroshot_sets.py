"""Data sets of zero-shot evaluation in every form they come in, and what is said of those that are
faulty."""

import io
import json
import re
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base.errors import MissingData, UserError
from dataset.sources.remote import address, local_copy
from dataset.sources.shard_index import ShardIndex
from dataset.sources.tar_writer import write_shard
from dataset.tasks.catalog import CatalogOptions, Entry, Prompts, choose, wanted_entries
from dataset.tasks.classification import LabelOptions, Labels, shared_split
from dataset.tasks.zeroshot import OpenSet, Viewed, open_set
from runtime.safe_pickle import load_plain
from tests.helpers.images import of_colour


def encoded(level: int, kind: str = "PNG") -> bytes:
    return of_colour((level, 0, 0), (6, 5), kind, lossless=True)


def image(path, level: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(level))


def tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def lists(tmp_path, **labels) -> Prompts:
    for kind, values in (("labels", labels), ("templates", {key: ["a {}."] for key in labels})):
        (tmp_path / f"{kind}.json").write_text(json.dumps(values))
    return Prompts(tmp_path / "labels.json", tmp_path / "templates.json")


def opened(entry: Entry, prompts: Prompts, tmp_path):
    return open_set(entry, prompts, tmp_path / "cache", load_plain)


def levels(data: OpenSet) -> list[tuple[int, object]]:
    """Red level and target of every image."""
    return [
        (int(s["image"][0, 0, 0]), s["target"].tolist())
        for s in map(data.images.__getitem__, range(len(data.images)))
    ]


@pytest.fixture
def shards(tmp_path):
    """A data set of CLIP_benchmark's layout: five images in two shards."""
    root = tmp_path / "wds_toys"
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        members = {}
        for n in numbers:
            members |= {
                f"s{n:07d}.cls": str(n % 2).encode(),
                f"s{n:07d}.webp": encoded(10 * n, "WEBP"),
            }
        tar(root / f"test/{shard}.tar", members)
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("red\nblue\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c} toy\n{c}\n")
    return root


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_shards_of_clip_benchmark(scheme, shards, tmp_path):
    data = opened(Entry("toys", "webdataset", f"{scheme}{shards}"), Prompts(), tmp_path)
    assert data.classes == ["red", "blue"] and data.templates == ["a {} toy", "{}"]
    assert levels(data) == [(0, 0), (10, 1), (20, 0), (30, 1), (40, 0)]
    fetched = list((tmp_path / "cache").rglob("*.tar"))
    assert len(fetched) == (2 if scheme else 0)
    if scheme:  # the second time nothing is fetched
        for shard in shards.glob("test/*.tar"):
            shard.unlink()
        assert levels(opened(Entry("toys", "webdataset", f"file://{shards}"), Prompts(), tmp_path))[
            4
        ] == (40, 0)


def test_several_labels_a_image(shards, tmp_path):
    (shards / "dataset_type.txt").write_text("multilabel\n")
    for shard in (0, 1):
        buffer = io.BytesIO()
        np.save(buffer, np.array([1, shard]))
        tar(shards / f"test/{shard}.tar", {"a.png": encoded(shard), "a.npy": buffer.getvalue()})
    data = opened(Entry("toys", "webdataset", str(shards)), Prompts(), tmp_path)
    assert data.entry.metric == "map11" and levels(data) == [(0, [1, 0]), (1, [1, 1])]


def test_captions_in_shards(shards, tmp_path):
    (shards / "dataset_type.txt").write_text("retrieval\n")
    for shard in (0, 1):
        tar(
            shards / f"test/{shard}.tar",
            {"a.png": encoded(shard), "a.txt": b"one\ntwo" if shard else b"three"},
        )
    data = opened(Entry("toys", "webdataset", str(shards)), Prompts(), tmp_path)
    assert data.images.captions == ["three", "one", "two"] and data.images.text_image.tolist() == [
        0,
        1,
        1,
    ]
    assert (
        data.entry.metric == "recall"
        and not data.classes
        and int(data.images[1]["image"][0, 0, 0]) == 1
    )


def test_names_that_shards_lack_come_from_the_lists(shards, tmp_path):
    (shards / "classnames.txt").unlink()
    (shards / "zeroshot_classification_templates.txt").unlink()
    data = opened(
        Entry("toys", "webdataset", str(shards)), lists(tmp_path, toys=["r", "b"]), tmp_path
    )
    assert (data.classes, data.templates) == (["r", "b"], ["a {}."])
    with pytest.raises(UserError, match="no labels for 'toys'"):
        opened(Entry("toys", "webdataset", str(shards)), Prompts(), tmp_path)


def test_faults_of_shards(shards, tmp_path):
    entry = Entry("toys", "webdataset", str(shards))
    (shards / "classnames.txt").write_text("red\n")
    with pytest.raises(UserError, match=r"class 1 occurs, but classnames\.txt has 1"):
        opened(entry, Prompts(), tmp_path)
    whole = (shards / "test/1.tar").read_bytes()
    for damage in (
        whole[:1200],
        whole[:600],
        whole[:1024] + b"x" * 512 + whole[1536:],
        b"no tar",
        whole[:512] * 2,
    ):
        (shards / "test/1.tar").write_bytes(damage)
        with pytest.raises(UserError, match=r"samples are unusable(.|\n)*1\.tar"):
            opened(entry, Prompts(), tmp_path)
    tar(shards / "test/1.tar", {"s1.png": encoded(1), "s1.cls": b"red"})
    with pytest.raises(UserError, match=r"1\.tar/s1: no readable \.cls"):
        opened(entry, Prompts(), tmp_path)
    (shards / "test/1.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar: no such file, though nshards"):
        opened(entry, Prompts(), tmp_path)
    (shards / "test/nshards.txt").write_text("two")
    with pytest.raises(UserError, match=r"nshards\.txt: 'two' is no number"):
        opened(entry, Prompts(), tmp_path)
    assert "CLIP_benchmark's layout" in str(
        opened(replace(entry, split="val"), Prompts(), tmp_path)
    )


def test_a_sample_without_image_is_left_out_and_said(tmp_path, capsys):
    whole = {
        f"s{n}.{kind}": encoded(n) if kind == "png" else b"1"
        for n in range(3)
        for kind in ("png", "cls")
    }
    tar(tmp_path / "0.tar", whole | {"s9.cls": b"1"})
    with pytest.raises(
        UserError, match=r"1 of 4 samples are unusable(.|\n)*s9: no image, only cls"
    ):
        ShardIndex([tmp_path / "0.tar"])
    index = ShardIndex([tmp_path / "0.tar"], error_budget=0.5)
    assert len(index) == 3 and index.lost == 1
    said = capsys.readouterr().err
    assert "s9: no image, only cls; the members of a sample must stand side by side" in said


def test_long_names_and_folders_in_a_tar(tmp_path):
    name = "deep/" + "n" * 150
    tar(tmp_path / "0.tar", {f"{name}.png": b"image", f"{name}.cls": b"3", "readme": b""})
    index = ShardIndex([tmp_path / "0.tar"])
    assert len(index) == 1 and index.read(0, "cls") == b"3" and index.image(0) == b"image"
    assert index.name(0).endswith(f"0.tar/{name}") and index.endings(0) == ["png", "cls"]


def test_addresses():
    page = "https://huggingface.co/datasets/clip-benchmark/wds_cars"
    for given, files in (
        (page, "main"),
        (f"{page}/tree/dev/", "dev"),
        (f"{page}/resolve/dev", "dev"),
    ):
        assert address(given, "test/0.tar") == f"{page}/resolve/{files}/test/0.tar"
    assert address("/data/wds_cars/", "a.txt") == "/data/wds_cars/a.txt"


def test_an_address_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.sources.remote.FIRST_WAIT", 0.01)
    with pytest.raises(MissingData, match=r"nowhere://host/test/0\.tar: cannot be fetched"):
        local_copy("nowhere://host", "test/0.tar", tmp_path)
    for url, reason in (
        ("nowhere://host", "nowhere"),
        ("http://127.0.0.1:9/wds_x", "cannot be read|aiohttp"),
    ):
        found = opened(Entry("x", "webdataset", url), Prompts(), tmp_path)
        assert isinstance(found, MissingData) and re.search(reason, str(found))


def test_class_folders(tmp_path):
    for number, name in enumerate(("b_one", "A two")):
        image(tmp_path / f"toys/val/{name}/x.png", number)
    entry = Entry("toys", "imagefolder", str(tmp_path / "toys"), "val")
    data = opened(entry, lists(tmp_path, toys=["b one", "a two"]), tmp_path)
    assert levels(data) == [(1, 0), (0, 1)] and data.classes == ["a two", "b one"]
    with pytest.raises(UserError, match=r"2 class folders.*names 3 classes.*no folder for c"):
        opened(entry, lists(tmp_path, toys=["b_one", "A two", "c"]), tmp_path)
    assert "no folder" in str(
        opened(replace(entry, split="test"), lists(tmp_path, toys=["a"]), tmp_path)
    )


def test_the_folder_of_a_split_itself(tmp_path):
    for number, name in enumerate("ab"):
        image(tmp_path / f"toys/eval/{name}/x.png", number)
    named = CatalogOptions(datasets=[f"imagefolder:{tmp_path}/toys/eval"])
    prompts = lists(tmp_path, eval=["a", "b"])
    (entry,) = wanted_entries(named)
    assert "add --split . if" in str(opened(entry, prompts, tmp_path))
    for split in (".", ""):
        (entry,) = wanted_entries(replace(named, split=split))
        assert levels(opened(entry, prompts, tmp_path)) == [(0, 0), (1, 1)]
    (entry,) = wanted_entries(replace(named, datasets=["retrieval:x"]))
    assert entry.split == "test"


def test_a_flat_folder_with_a_list_of_labels(tmp_path):
    """ImageNet's validation set as it is published, with Caffe's val.txt."""
    for number in (1, 2, 3):
        image(tmp_path / f"val/ILSVRC2012_val_{number}.png", number)
    entry = Entry("pets", "imagefolder", str(tmp_path), split="val")
    prompts = lists(tmp_path, pets=["cat", "dog"])
    with pytest.raises(UserError, match=r"no sub-folder for each class; .*val\.txt"):
        opened(entry, prompts, tmp_path)
    lines = ["ILSVRC2012_val_3.png 1", "ILSVRC2012_val_1.png 0", "ILSVRC2012_val_2.png 1"]
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    data = opened(entry, prompts, tmp_path)
    assert [int(data.images[i]["target"]) for i in range(3)] == [1, 0, 1]
    assert [int(data.images[i]["image"][0, 0, 0]) for i in range(3)] == [3, 1, 2]
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_3.png 2\n")
    with pytest.raises(UserError, match="class 2 occurs"):
        opened(entry, prompts, tmp_path)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_3.png\n")
    with pytest.raises(UserError, match=r"val\.txt, line 1: expected `name label`"):
        opened(entry, prompts, tmp_path)


def test_class_folders_that_name_their_classes(tmp_path):
    image(tmp_path / "cub200/val/001.Black_footed_Albatross/x.png")
    data = opened(
        Entry("cub200", "imagefolder", str(tmp_path / "cub200"), "val"), Prompts(), tmp_path
    )
    assert data.classes == ["Black footed Albatross"] and data.templates == [
        "a photo of a {}, a type of bird."
    ]


def test_lists_of_files(tmp_path):
    for n in range(3):
        image(tmp_path / f"clevr/{n}.png", n)
    np.save(tmp_path / "clevr/val_images.npy", np.array(["0.png", "1.png", "2.png"], dtype=object))
    np.save(tmp_path / "clevr/val_labels.npy", np.array(["count_10", "count_4", "count_3"]))
    entry = Entry("clevr_counts", "filelist", str(tmp_path / "clevr"), "val")
    data = opened(entry, lists(tmp_path, clevr_counts=["10", "3", "4"]), tmp_path)
    assert levels(data) == [(0, 0), (1, 2), (2, 1)] and data.classes == ["10", "3", "4"]
    np.save(tmp_path / "clevr/val_labels.npy", np.array([0, 1, 5]))
    with pytest.raises(UserError, match=r"class 5 occurs.*names 3 classes"):
        opened(entry, lists(tmp_path, clevr_counts=["10", "3", "4"]), tmp_path)
    np.save(tmp_path / "clevr/val_labels.npy", np.array([0, 1]))
    with pytest.raises(UserError, match="3 images and 2 labels"):
        opened(entry, lists(tmp_path, clevr_counts=["10", "3", "4"]), tmp_path)
    (tmp_path / "clevr/val_labels.npy").unlink()
    assert "val_labels.npy" in str(opened(entry, Prompts(), tmp_path))


def test_pascal_voc(tmp_path):
    sets = tmp_path / "voc/VOCdevkit/VOC2007/ImageSets/Main"
    sets.mkdir(parents=True)
    (sets / "cat_test.txt").write_text("000001 -1\n000002  1\n")
    (sets / "dog_test.txt").write_text("000001  0\n000002  1\n")
    (sets / "test.txt").write_text("000001\n000002\n")
    for n in (1, 2):
        image(tmp_path / f"voc/VOCdevkit/VOC2007/JPEGImages/00000{n}.jpg", n)
    entry = Entry("voc2007", "voc", str(tmp_path / "voc"), metric="map11")
    data = opened(entry, lists(tmp_path, voc2007=["dog", "cat"]), tmp_path)
    assert data.classes == ["cat", "dog"] and levels(data) == [(1, [0, -1]), (2, [1, 1])]
    assert "VOCtest_06-Nov-2007.tar" in str(
        opened(replace(entry, path="nowhere"), Prompts(), tmp_path)
    )


def test_torchvision_or_class_folders(tmp_path):
    entry = Entry("rendered_sst2", "either", str(tmp_path / "sst"))
    reason = opened(entry, Prompts(), tmp_path)
    assert isinstance(reason, MissingData) and "--datasets rendered_sst2 --download" in str(reason)
    for level, name in enumerate(("negative", "positive")):
        image(tmp_path / f"sst/rendered-sst2/test/{name}/a.png", level)
    data = opened(entry, Prompts(), tmp_path)
    assert levels(data) == [(0, 0), (1, 1)] and data.classes == ["negative", "positive"]
    with pytest.raises(UserError, match=r"rendered_sst2: the data have 2 classes.*names 3"):
        opened(entry, lists(tmp_path, rendered_sst2=["a", "b", "c"]), tmp_path)
    image(tmp_path / "sst/test/negative/a.png", 5)
    image(tmp_path / "sst/test/positive/a.png", 6)
    assert levels(opened(entry, Prompts(), tmp_path)) == [(5, 0), (6, 1)]
    with pytest.raises(UserError, match="no templates for 'unheard'"):
        opened(replace(entry, name="unheard"), Prompts(), tmp_path)
    with pytest.raises(UserError, match="not asked for a data set of this name"):
        opened(Entry("resisc45", "torchvision", "x"), Prompts(), tmp_path)


def test_karpathys_json_and_albefs(tmp_path):
    image(tmp_path / "pics/a/1.png", 1)
    image(tmp_path / "pics/2.png", 2)
    images = [
        {
            "filepath": "a",
            "filename": "1.png",
            "split": "test",
            "sentences": [{"raw": "one"}, {"raw": "uno"}],
        },
        {"filename": "2.png", "split": "test", "sentences": [{"raw": "two"}]},
        {"filename": "3.png", "split": "train", "sentences": [{"raw": "three"}]},
    ]
    file = tmp_path / "dataset_toys.json"
    file.write_text(json.dumps({"images": images}))
    entry = Entry("toys", "retrieval", str(file), images=str(tmp_path / "pics"))
    data = opened(entry, Prompts(), tmp_path)
    assert data.images.captions == ["one", "uno", "two"] and data.images.text_image.tolist() == [
        0,
        0,
        1,
    ]
    assert [int(data.images[i]["image"][0, 0, 0]) for i in (0, 1)] == [1, 2]
    assert "none of the first images" in str(opened(replace(entry, images=""), Prompts(), tmp_path))
    file.write_text(
        json.dumps(
            [{"image": "2.png", "caption": ["two", "zwei"]}, {"image": "a/1.png", "caption": "one"}]
        )
    )
    assert opened(entry, Prompts(), tmp_path).images.text_image.tolist() == [0, 0, 1]
    file.write_text(json.dumps({"images": [{"filename": "2.png", "sentences": []}]}))
    with pytest.raises(UserError, match=r"dataset_toys\.json, image 0 .*: no 'split'"):
        opened(entry, Prompts(), tmp_path)
    assert isinstance(opened(replace(entry, path="nowhere.json"), Prompts(), tmp_path), MissingData)


@pytest.mark.parametrize("layout", ["flickr", "coco"])
def test_lists_that_clip_benchmark_fetches(tmp_path, layout):
    """flickr30k_test_karpathy.txt, whose captions have commas, and COCO's annotations beside or
    above the folder of its images."""
    image(tmp_path / "val2014/COCO_val2014_7.jpg", 7)
    image(tmp_path / "8.jpg", 8)
    if layout == "flickr":
        file = tmp_path / "flickr30k_test_karpathy.txt"
        file.write_text(
            "image,caption\n8.jpg,A man, in a hat .\nval2014/COCO_val2014_7.jpg,two\n8.jpg,x\n"
        )
    else:
        file = tmp_path / "annotations/coco_test_karpathy.json"
        file.parent.mkdir()
        captions = [(1, "A man, in a hat ."), (7, "two"), (1, "x")]
        rows = [{"image_id": number, "caption": caption} for number, caption in captions]
        names = {1: "../8.jpg", 7: "COCO_val2014_7.jpg"}
        images = [{"id": number, "file_name": name} for number, name in names.items()]
        file.write_text(json.dumps({"images": images, "annotations": rows}))
        (tmp_path / "train2017").mkdir()
    entry = Entry("toys", "retrieval", str(file))
    data = opened(entry, Prompts(), tmp_path).images
    assert data.captions == ["A man, in a hat .", "x", "two"]
    assert data.text_image.tolist() == [0, 0, 1]
    assert [int(data[i]["image"][0, 0, 0]) for i in (0, 1)] == [8, 7]
    file.write_text(file.read_text().replace("two", "").replace(".jpg,", " ").replace('"x"', "1"))
    fault = "line 2: .*is not IMAGE" if layout == "flickr" else "caption of .* is no text"
    with pytest.raises(UserError, match=fault):
        opened(entry, Prompts(), tmp_path)


def test_captions_of_kaggles_file_lose_the_quotes_of_a_csv(tmp_path):
    """captions.txt of Flickr8k and Flickr30k is a CSV by another name; the quotes of the Karpathy
    list are its captions' own."""
    image(tmp_path / "8.jpg", 8)
    file = tmp_path / "captions.txt"
    entry = Entry("toys", "retrieval", str(file))
    csv = ["image,caption", '8.jpg,"A man, in a ""hat"" ."', "8.jpg,two", '8.jpg,"a ""b"""']
    file.write_text("\n".join(csv))
    found = opened(entry, Prompts(), tmp_path).images
    assert found.captions == ['A man, in a "hat" .', "two", 'a "b"']
    file.write_text("\n".join(["image,caption", '8.jpg,"A man" , "a hat"', '8.jpg,"two"']))
    found = opened(entry, Prompts(), tmp_path).images
    assert found.captions == ['"A man" , "a hat"', '"two"']


@pytest.mark.parametrize("layout", ["rows", "karpathy"])
def test_a_row_for_every_caption_counts_the_image_once(tmp_path, layout):
    for number in (1, 2):
        image(tmp_path / f"{number}.png", number)
    rows = [("1.png", "one"), ("2.png", "two"), ("./1.png", "uno")]
    if layout == "rows":
        content = [{"image": name, "caption": caption} for name, caption in rows]
    else:
        entries = (
            {"filename": name, "split": "test", "sentences": [{"raw": caption}]}
            for name, caption in rows
        )
        content = {"images": list(entries)}
    file = tmp_path / "dataset_toys.json"
    file.write_text(json.dumps(content))
    images = opened(Entry("toys", "retrieval", str(file)), Prompts(), tmp_path).images
    assert len(images) == 2 and images.captions == ["one", "uno", "two"]
    assert images.text_image.tolist() == [0, 0, 1]


def test_a_table_is_a_retrieval_set_with_its_images_elsewhere(tmp_path):
    image(tmp_path / "photos/a.png", 5)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/held_out.csv").write_text("filepath,title\na.png,one\n")
    named = [f"retrieval:{tmp_path}/lists/held_out.csv"]
    (entry,) = wanted_entries(CatalogOptions(named, image_root=str(tmp_path / "photos")))
    assert int(opened(entry, Prompts(), tmp_path).images[0]["image"][0, 0, 0]) == 5
    (entry,) = wanted_entries(CatalogOptions(named))
    with pytest.raises(MissingData, match="--image-root"):
        raise opened(entry, Prompts(), tmp_path)


def test_own_class_folders_need_no_lists(tmp_path, capsys):
    for name in ("red_square", "star"):
        image(tmp_path / f"shapes/val/{name}/x.png")
    (entry,) = choose([f"imagefolder:{tmp_path}/shapes"], {})
    with pytest.raises(MissingData, match="split val with --split"):
        raise opened(entry, Prompts(), tmp_path)
    data = opened(replace(entry, split="val"), Prompts(), tmp_path)
    assert data.classes == ["red square", "star"] and data.templates == ["a photo of a {}."]
    assert "'a photo of a {}.'" in capsys.readouterr().out
    given = opened(replace(entry, split="val"), lists(tmp_path, shapes=["a", "b"]), tmp_path)
    assert given.classes == ["a", "b"] and given.templates == ["a {}."]


def test_shards_that_train_are_a_retrieval_set(tmp_path):
    texts = [{"txt": b"one"}, {"json": b'{"captions": ["two", "zwei"]}', "txt": b"two\nzwei"}]
    samples = [{"png": encoded(number), **text} for number, text in enumerate(texts)]
    write_shard(tmp_path / "mine/0.tar", (("ab"[n], samples[n]) for n in range(2)))
    for path, name in ((tmp_path / "mine", "mine"), (tmp_path / "mine/{0..0}.tar", "captions")):
        (entry,) = choose([f"retrieval:{path}"], {})
        data = opened(entry, Prompts(), tmp_path)
        assert entry.name == name and data.images.captions == ["one", "two", "zwei"]
        assert data.images.text_image.tolist() == [0, 1, 1]
        assert [int(data.images[i]["image"][0, 0, 0]) for i in (0, 1)] == [0, 1]
    write_shard(tmp_path / "mine/0.tar", [("a", {"png": samples[0]["png"]})])
    with pytest.raises(UserError, match="no caption"):
        opened(entry, Prompts(), tmp_path)


@pytest.mark.parametrize("kind", ["webdataset", "multilabel", "captions", "training", "classes"])
def test_samples_without_image_follow_the_error_budget(kind, shards, tmp_path):
    """One sample of five, in whichever way an evaluation reads shards."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([1, 0]))
    beside = {"txt": b"a toy", "cls": b"1", "npy": buffer.getvalue()}
    members = {f"s{n}": {"png": encoded(n), **beside} for n in range(4)} | {"s9": beside}
    tar(
        shards / "test/0.tar",
        {f"{s}.{m}": v for s, all_ in members.items() for m, v in all_.items()},
    )
    (shards / "test/1.tar").unlink()
    (shards / "test/nshards.txt").write_text("1\n")
    if kind in ("multilabel", "captions"):
        stated = {"multilabel": "multilabel", "captions": "retrieval"}[kind]
        (shards / "dataset_type.txt").write_text(stated)
    address = f"{shards}/test/{{0..0}}.tar"
    entry = Entry("toys", "webdataset", str(shards))
    if kind == "training":
        (entry,) = choose([f"retrieval:{address}"], {})

    def images(budget: float):
        if kind != "classes":
            found = open_set(entry, Prompts(), tmp_path / "cache", load_plain, error_budget=budget)
            return found.images
        knobs = SimpleNamespace(data_root=tmp_path, download=False, error_budget=budget)
        return shared_split(address, None, Labels(2, LabelOptions(), "toys"), (), knobs)

    assert len(images(0.2)) == 4
    with pytest.raises(UserError, match="1 of 5 samples are unusable"):
        images(0.19)
    tar(shards / "test/0.tar", {f"s9.{m}": v for m, v in beside.items()})
    with pytest.raises(UserError, match=r"no sample is usable, such as .*0\.tar/s9: no image"):
        images(1.0)


def test_images_go_through_the_view(tmp_path):
    image(tmp_path / "toys/test/one/x.png", 9)
    data = opened(
        Entry("toys", "imagefolder", str(tmp_path / "toys")),
        lists(tmp_path, toys=["one"]),
        tmp_path,
    )
    loaded = Viewed(data.images, lambda image: image.float() + 1).load(0)
    assert loaded["image"][0, 0, 0] == 10 and loaded["target"] == torch.tensor(0)
