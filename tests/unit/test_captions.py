"""Image-caption collections: metadata of every kind, images in zip files, samples and batches."""

import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from base import zip_member
from base.errors import BadSample, UserError
from base.writing import write_json_lines
from base.zip_member import read_member
from dataset.images.clip import ImageViews, ViewOptions
from dataset.sources.shard_list import samples_of
from dataset.sources.shards import read_shard
from dataset.tasks.captions import (
    CaptionCollate,
    ImageTextPair,
    caption_records,
    check_images,
    collections_of,
    metadata_rows,
)
from dataset.tasks.record import captions_of, image_of
from dataset.text.augment import TextOptions, TextViews
from dataset.text.bpe import ClipTokenizer
from runtime.safe_pickle import load_plain
from scripts.data import pack_karpathy
from scripts.data.pack_coco import Config as PackConfig
from scripts.data.pack_coco import main as pack_main
from scripts.data.pack_coco import pack, sample_key


def test_every_collection_of_digitscenes_reads_the_same_images(digitscenes):
    scenes = json.loads((digitscenes / "pretrain_train.json").read_text())
    by_name = {scene["image"]: scene["caption"] for scene in scenes}
    for kind, file, root in (
        ("cc3m", "cc3m.npy", ""),
        ("coco", "coco/captions_train2017.json", "images"),
    ):
        records = caption_records(kind, digitscenes / file, load_plain)
        assert len(records) == len(scenes)
        for record in records:
            name = f"{root}/{record['image']}".lstrip("/")
            assert sorted(record["caption"]) == sorted(by_name[name])
        check_images(digitscenes / root, records)
    for kind, file, root in (
        ("cc12m", "cc12m.npy", ""),
        ("yfcc15m", "yfcc15m/yfcc15m.pkl", "yfcc15m"),
        ("redcaps", "redcaps/redcaps.json", "redcaps"),
    ):
        records = caption_records(kind, digitscenes / file, load_plain)
        assert all(record["caption"] and all(record["caption"]) for record in records)
        check_images(digitscenes / root, records)


def test_absolute_paths_of_images_need_no_root(digitscenes, tmp_path):
    image = next((digitscenes / "images/test2017").iterdir())
    check_images(tmp_path / "nowhere", [{"image": str(image.absolute())}])
    with pytest.raises(UserError, match=r"nowhere: no such folder; set --root"):
        check_images(tmp_path / "nowhere", [{"image": image.name}])


def test_yfcc_takes_title_and_description_that_are_there(tmp_path):
    rows = [(12345678, "title", "words"), (1, "", "words"), (2, "title", ""), (3, "", "")]
    (tmp_path / "yfcc.pkl").write_bytes(pickle.dumps(rows))
    records = list(caption_records("yfcc15m", tmp_path / "yfcc.pkl", load_plain))
    assert records[0] == {"image": "images/12/345.zip/678.jpg", "caption": ["title", "words"]}
    assert [record["caption"] for record in records[1:]] == [["words"], ["title"], [""]]


def test_conversion_happens_once_and_follows_the_file(tmp_path):
    path = tmp_path / "cc3m.npy"
    np.save(
        path, np.array([{"image_id": "a.jpg", "captions": ["é"]}], dtype=object), allow_pickle=True
    )
    calls = []

    def read(file):
        calls.append(file)
        return load_plain(file)

    assert caption_records("cc3m", path, read)[0] == {"image": "a.jpg", "caption": ["é"]}
    assert len(caption_records("cc3m", path, read)) == 1 and len(calls) == 1
    rows = [{"image_id": f"{i}.jpg", "captions": ["b"]} for i in range(3)]
    np.save(path, np.array(rows, dtype=object), allow_pickle=True)
    assert len(caption_records("cc3m", path, read)) == 3 and len(calls) == 2


def test_a_converted_file_needs_no_pickle(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["one"]}, {"image": "b.jpg", "caption": ["two", "three"]}]
    assert write_json_lines(tmp_path / "rows.jsonl", rows) == 2
    assert list(caption_records("cc3m", tmp_path / "rows.jsonl", None)) == rows
    assert list(metadata_rows("pairs", tmp_path / "rows.jsonl", None)) == rows


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_hostile_metadata_is_refused(tmp_path, capsys):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([(1, Evil(), "")]))
    with pytest.raises(UserError, match=r"evil\.pkl.*print"):
        caption_records("yfcc15m", tmp_path / "evil.pkl", load_plain)
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"evil\.npy.*print"):
        caption_records("cc3m", tmp_path / "evil.npy", load_plain)
    assert "run" not in capsys.readouterr().out


def test_mistakes_name_file_and_entry(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([(1, "t", "d"), "nonsense"]))
    with pytest.raises(UserError, match=r"a\.pkl, entry 1 .*yfcc15m"):
        caption_records("yfcc15m", tmp_path / "a.pkl", load_plain)
    with pytest.raises(UserError, match="no such file"):
        caption_records("yfcc15m", tmp_path / "b.pkl", load_plain)
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UserError, match="images and annotations"):
        caption_records("coco", tmp_path / "c.json", load_plain)
    with pytest.raises(UserError, match="joined by ---"):
        collections_of("merged_opendata", "a---b", "c---d")
    assert len(collections_of("merged_opendata", "a---b---c", "d---e---f")) == 3


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("comment", [b"", b"a comment"])
def test_members_of_any_zip_file(method, comment, tmp_path):
    names = {
        "007.jpg": b"seven" * 50,
        "07.jpg": b"shorter",
        "1007.jpg": b"longer",
        "008.jpg": b"",
        "ä.jpg": b"u",
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as bundle:
        for name, content in sorted(names.items(), reverse=True):
            bundle.writestr(name, content)
        bundle.comment = comment
    for name, content in names.items():
        assert read_member(tmp_path / "a.zip", name) == content
    with pytest.raises(BadSample, match=r"a\.zip: no member 7\.jpg"):
        read_member(tmp_path / "a.zip", "7.jpg")


def test_damaged_zip_files_are_bad_samples(tmp_path):
    with pytest.raises(BadSample, match=r"none\.zip: No such file"):
        read_member(tmp_path / "none.zip", "a.jpg")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("000.jpg", bytes(range(256)) * 20)
    data = (tmp_path / "a.zip").read_bytes()
    for number, broken in enumerate(
        (b"", data[: len(data) // 2], data[:40] + b"\0" * 40 + data[80:], b"text" * 20)
    ):
        (tmp_path / f"{number}.zip").write_bytes(broken)
        with pytest.raises(BadSample, match=f"{number}.zip"):
            read_member(tmp_path / f"{number}.zip", "000.jpg")


def test_batch(digitscenes):
    tokenizer = ClipTokenizer(digitscenes / "bpe/bpe_merges.txt.gz", context_length=20)
    records = caption_records("yfcc15m", digitscenes / "yfcc15m/yfcc15m.pkl", load_plain)
    build = ImageTextPair(
        ImageViews(24, ViewOptions()), TextViews(TextOptions(), local=2), digitscenes / "yfcc15m"
    )
    batch = CaptionCollate(tokenizer)([build({**records[i], "index": i}) for i in range(5)])
    assert batch["image"].shape == (5, 3, 24, 24) and batch["image_local"].shape == (
        5,
        2,
        3,
        24,
        24,
    )
    assert batch["image"].dtype == batch["image_local"].dtype == torch.uint8
    ids = batch["text_ids"]
    assert ids.shape[:2] == (5, 3) and ids.shape[2] in (8, 16, 20) and ids.dtype == torch.int64
    assert (ids[..., 0] == tokenizer.start_id).all() and (
        (ids == tokenizer.end_id).sum(-1) == 1
    ).all()
    assert CaptionCollate(tokenizer, [20])([build(records[0])])["text_ids"].shape == (1, 3, 20)
    with pytest.raises(BadSample, match=r"999\.zip"):
        build({"image": "images/00/999.zip/000.jpg", "caption": "a"})


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]},
        {"images": [{"id": 1}], "annotations": [{"caption": "x"}]},
        {"images": [5], "annotations": []},
        {"images": [], "annotations": ["text"]},
        {"images": {}, "annotations": []},
        {"images": []},
        {"images": [], "annotations": []},
        [1],
    ],
    ids=str,
)
def test_another_file_of_coco_is_one_sentence(tmp_path, content):
    file = tmp_path / "instances_val2017.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val2017\.json: ") as error:
        list(metadata_rows("coco", file, None))
    assert "\n" not in str(error.value)


def test_coco_with_an_image_without_id_and_ids_of_text(tmp_path):
    images = [{"file_name": "lost.jpg"}, {"id": "b-2", "file_name": "two.jpg"}]
    annotations = [{"image_id": each, "caption": f"of {each}"} for each in (7, "b-2", "c")]
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert [row["image"] for row in metadata_rows("coco", file, None)] == [
        "val2017/000000000007.jpg",
        "val2017/two.jpg",
        "val2017/00000000000c.jpg",
    ]


def test_names_with_dots_are_packed_and_read_back(tmp_path):
    names = ("IMG_2021.05.13.jpg", "IMG_2021.06.01.jpg", "IMG_2021_06_01.jpg", "plain.png")
    taken: set[str] = set()
    keys = [sample_key(name, taken) for name in names]
    assert keys == ["IMG_2021_05_13", "IMG_2021_06_01", "IMG_2021_06_01_2", "plain"]
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    listed = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    annotations = [{"image_id": n, "caption": name} for n, name in enumerate(names)]
    (tmp_path / "captions_x.JSON").write_text(
        json.dumps({"images": listed, "annotations": annotations})
    )
    target = tmp_path / "out"
    target.mkdir()
    config = PackConfig(tmp_path / "captions_x.JSON", tmp_path / "images", target)
    assert pack(config)["images"] == 4
    found = [record["caption"] for record in read_shard(str(target / "00000.tar"))]
    assert found == list(names)


def test_narratives_are_packed(tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("a", "3.0", "7"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"val/{name}.jpg")
    rows = [("a", "one. "), ("3.0", "a"), ("a", "two. "), ("a", None), (7, "b"), ("lost", "c")]
    lines = [json.dumps({"image_id": name, "caption": text}) for name, text in rows]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    config = PackConfig(tmp_path / "n.jsonl", tmp_path / "val", tmp_path / "out")
    config.samples_per_shard = 2
    assert pack(config) == {"shards": 2, "images": 3, "missing_images": 1, "without_caption": 0}
    shards = [str(tmp_path / f"out/0000{number}.tar") for number in range(2)]
    assert samples_of(shards) == [2, 1]
    assert json.loads((tmp_path / "out/00001_stats.json").read_text()) == {"successes": 1}
    notes = [json.loads(record["json"]) for shard in shards for record in read_shard(shard)]
    assert [(note["path"], note["cap"], note["split"]) for note in notes] == [
        ("a.jpg", "one. two.", "val"), ("3.0.jpg", "a", "val"), ("7.jpg", "b", "val")
    ]  # fmt: skip
    config.split = "train"
    pack(config)
    assert json.loads(next(iter(read_shard(shards[0])))["json"])["split"] == "train"
    config.samples_per_shard = 9
    with pytest.raises(UserError, match=r"00001\.tar: one of 1 shards"):
        pack(config)
    (tmp_path / "n.jsonl").write_text("")
    with pytest.raises(UserError, match=r"n\.jsonl: no captions in it"):
        pack(replace(config, target=tmp_path / "empty"))
    with pytest.raises(UserError, match=r"s3://b/t: .*--target"):
        pack_main(replace(config, target="s3://b/t"))
    with pytest.raises(UserError, match=r"x\.json: no such file of captions"):
        pack_main(replace(config, captions=tmp_path / "x.json"))


def test_karpathys_shards_have_a_caption_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_karpathy, "PER_SHARD", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    sentences = [{"raw": "a dog\nat play", "sentid": 0}, {"raw": "un chien", "sentid": 1}]
    entry = {"filename": "a.jpg", "split": "test", "imgid": 3, "sentences": sentences}
    (tmp_path / "d.json").write_text(json.dumps({"images": [entry] * 3}))
    words = [str(tmp_path / "d.json"), "--images", str(tmp_path), "--out"]
    for _ in range(2):  # again, over what is there
        assert pack_karpathy.main([*words, str(tmp_path / "test.tfrecord")]) == 0
        assert pack_karpathy.main([*words, str(tmp_path / "o"), "--format", "webdataset"]) == 0
    shards = [read_shard(str(tmp_path / f"o/test/{number}.tar")) for number in range(2)]
    records = [record for shard in shards for record in shard]
    assert len({record["key"][-7:] for record in records}) == 3
    assert records[2]["caption"] == "a dog at play\nun chien"
    assert (tmp_path / "o/test/nshards.txt").read_text() == "2\n"
    assert (tmp_path / "o/dataset_type.txt").read_text() == "retrieval\n"
    (tmp_path / "a.jpg").unlink()
    assert pack_karpathy.main([*words, str(tmp_path / "o"), "--format", "webdataset"]) == 2
    assert not (tmp_path / "o/test/nshards.txt").exists(), "of an unfinished packing"


def test_karpathys_records_train(tmp_path):
    """What pack_karpathy.py writes is read by the readers of training."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    sentences = [{"raw": "a dog", "sentid": 0}, {"raw": "un chien", "sentid": 1}]
    entry = {"filename": "a.jpg", "split": "test", "imgid": 3, "sentences": sentences}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [entry]}))
    rows = pack_karpathy.rows_of(tmp_path / "dataset.json", tmp_path, "test")
    assert pack_karpathy.write_tfrecord(rows, tmp_path / "out/test.tfrecord") == 1
    (record,) = read_shard(str(tmp_path / "out/test.tfrecord"))
    assert captions_of(record) == ["a dog", "un chien"] and image_of(record).shape == (3, 8, 8)
    sample = ImageTextPair(lambda image: (image, None), TextViews(TextOptions()))(record)
    assert sample["texts"][0] in ("a dog", "un chien")


@pytest.mark.parametrize("comment", [b"", b"read by zipfile"])
def test_a_zip_member_that_unpacks_without_measure_is_a_bad_sample(comment, tmp_path, monkeypatch):
    monkeypatch.setattr(zip_member, "MEMBER_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", bytes(4 << 20))
        archive.writestr("1.jpg", b"small")
        archive.comment = comment
    with pytest.raises(BadSample, match=r"member 0.jpg: more than"):
        zip_member.read_member(tmp_path / "a.zip", "0.jpg")
    assert zip_member.read_member(tmp_path / "a.zip", "1.jpg") == b"small"


@pytest.mark.parametrize(
    "kind, content",
    [
        ("cc3m", 5),
        ("cc3m", {"image_id": "a", "captions": ["x"]}),
        ("cc3m", "text"),
        ("cc3m", [["a", "x"]]),
        ("cc3m", [{"image_id": "a", "captions": 5}]),
        ("cc3m", [{"image_id": "a", "captions": [5]}]),
        ("cc12m", [{"image_name": "a", "captions": None}]),
        ("cc12m", [None]),
        ("yfcc15m", [5]),
        ("yfcc15m", [(None, "t", "d")]),
        ("yfcc15m", [(1, 5, "d")]),
        ("yfcc15m", []),
        ("cc3m", [{"image_id": "a", "captions": []}]),
    ],
    ids=str,
)
def test_metadata_of_another_type_is_one_sentence(tmp_path, kind, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=rf"a\.pkl.*{kind}"):
        list(metadata_rows(kind, tmp_path / "a.pkl", load_plain))


def test_one_caption_as_a_text_is_one_caption(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"image_id": "a.jpg", "captions": "a cat"}]))
    (row,) = metadata_rows("cc3m", tmp_path / "a.pkl", load_plain)
    assert row["caption"] == ["a cat"]
