"""Files as other programs write them: hidden files beside the data, byte order
marks, other line ends and compressions, published files in the place of lists, odd numbers."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.arrays import map_array
from base.caches import states_digest
from base.errors import BadSample, UserError
from base.names import matching_files
from base.reading import parse_json
from base.text import as_list, id_text, lines_in, whole_number
from base.zip_member import image_source, read_member
from dataset.health.samples import FATAL, Examiner
from dataset.health.survey import open_list
from dataset.images.decode import ORIENTATION, check_image_root, decode_image, image_ending
from dataset.sources import json_entries
from dataset.sources.class_folder import ClassFolder
from dataset.sources.class_folder import class_folders as class_folders_in
from dataset.sources.flat_folder import flat_folder
from dataset.sources.left_out import LeftOut
from dataset.sources.records import Records
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import find_shards, list_shards
from dataset.sources.shards import ShardSource, read_shard
from dataset.sources.tables import rows_of
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.caption_lists import retrieval_list
from dataset.tasks.captions import caption_records, metadata_rows
from dataset.tasks.catalog import Entry, Prompts, choose, read_catalog
from dataset.tasks.classification import (
    FolderRecords,
    LabelOptions,
    Labels,
    class_names,
    identity,
    is_list,
    is_shards,
    read_class_names,
)
from dataset.tasks.grounding import read_boxes, targets
from dataset.tasks.pretrain import codes_key, write_codes
from dataset.tasks.recognition import ImageSet, names_of
from dataset.tasks.record import captions_of
from dataset.tasks.retrieval import RetrievalSet
from dataset.tasks.ve_nlvr import SNLI_VE, Statements
from dataset.tasks.vqa import read_official_answers
from dataset.tasks.zeroshot import CaptionedImages, ShardImages, class_folders, voc
from runtime.checkpoint import find_damage
from runtime.config.yaml import read_yaml
from runtime.safe_pickle import load_plain
from scripts.data import (
    convert_expressions,
    convert_prompts,
    pack,
    pack_coco,
    pack_karpathy,
    train_vocabulary,
)
from tests.helpers.images import of_colour

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff"  # how a `._` file begins
MARK = b"\xef\xbb\xbf"


def encoded(kind: str = "JPEG", **options) -> bytes:
    return of_colour((200, 30, 30), (16, 12), kind, **options)


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def images_in(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded())


def benchmark(folder: Path, members: list[tuple[str, bytes]], **texts: str | bytes) -> Entry:
    """A data set in CLIP_benchmark's layout. texts: of classnames.txt and the like."""
    tar(folder / "test/0.tar", members)
    (folder / "test/nshards.txt").write_text("1\n")
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.txt").write_bytes(content)
    return Entry("x", "webdataset", str(folder))


# ---- hidden files
def test_hidden_files_are_no_images_lists_shards_and_weights(tmp_path):
    images_in(tmp_path / "val", ["0.JPEG", "1.JPEG"])
    (tmp_path / "val/._0.JPEG").write_bytes(APPLE_DOUBLE)
    (tmp_path / "val/.ipynb_checkpoints").mkdir()
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("b\na\n")
    assert flat_folder(tmp_path / "val").labels.tolist() == [1, 0]
    found = class_folders(Entry("x", "imagefolder", str(tmp_path), "val"))
    assert found.labels.tolist() == [1, 0]

    lists = tmp_path / "VOC2007/ImageSets/Main"
    lists.mkdir(parents=True)
    for name in ("cat", "dog"):
        (lists / f"{name}_test.txt").write_text("000001  1\n000002 -1\n")
    (lists / "._cat_test.txt").write_bytes(APPLE_DOUBLE)
    assert voc(Entry("voc2007", "voc", str(tmp_path))).classes == ["cat", "dog"]

    for name in ("s/0.tar", "s/._0.tar", "s/.tmp/1.tar", "s/__MACOSX/2.tar", "s/a/.b/3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for place in (f"{tmp_path}/s", f"{tmp_path}/s/**/*.tar", f"{tmp_path}/s/**/[0-9].tar"):
        assert list_shards(place) == [f"{tmp_path}/s/0.tar"]
        assert list_shards(f"file://{place}") == [f"file://{tmp_path}/s/0.tar"]
    assert list_shards(f"{tmp_path}/s/.tmp/*.tar") == [f"{tmp_path}/s/.tmp/1.tar"]
    for name in ("x.safetensors", "._x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in matching_files(tmp_path, "*.safetensors")] == ["x.safetensors"]


def test_a_folder_of_class_folders_holds_no_shards_by_hidden_files(tmp_path):
    images_in(tmp_path / "cat", ["a.jpg"])
    (tmp_path / "._train.tar").write_bytes(APPLE_DOUBLE)
    assert not is_shards(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["part/0.tar", "0.TAR", "0.tbz2", "0.txz", "part/train.tfrecord-00000-of-00001"]
)
def test_shards_in_sub_folders_and_with_capital_endings(tmp_path, name):
    shard = tmp_path / name
    shard.parent.mkdir(exist_ok=True)
    shard.write_bytes(b"")
    assert is_shards(str(tmp_path)) and list_shards(str(tmp_path)) == [str(shard)]


def test_folders_that_systems_make_are_no_classes_and_hold_no_images(tmp_path):
    for name in ("cat", "dog", "__MACOSX/cat", "@eaDir/a.jpg", "cat/@eaDir/a.jpg", "$Recycle.Bin"):
        images_in(tmp_path / name, ["a.jpg"])
    found = ClassFolder(tmp_path, None)
    assert found.folders == ["cat", "dog"] and len(found) == 2
    names = ("a/0.jpg", "a/0.txt", "a/Thumbs.db", "a/Desktop.ini", "__MACOSX/a/0.jpg")
    shard = tar(tmp_path / "0.tar", [(name, encoded()) for name in names])
    assert len(ShardIndex([shard], error_budget=0)) == len(list(read_shard(str(shard)))) == 1


def test_names_of_files_need_not_be_utf_8(tmp_path):
    """Archives of old Windows programs unpack to them."""
    latin_1 = os.fsdecode(b"caf\xe9")
    images_in(tmp_path / "val/cat", ["a.jpg", f"{latin_1}.jpg"])
    records = FolderRecords(tmp_path / "val")
    assert [record["image"].name for record in records] == ["a.jpg", f"{latin_1}.jpg"]
    assert all(decode_image(record["image"]).shape == (3, 12, 16) for record in records)
    members = [(f"{latin_1}.jpg", encoded()), (f"{latin_1}.txt", b"x")]
    source = ShardSource(find_shards(str(tar(tmp_path / "0.tar", members))), dict)
    _, record, _ = next(source.read(0, 0, 1, source.start(0, 0, 1)))
    assert record["key"].endswith(f"0.tar/{latin_1}") and record["caption"] == "x"


# ---- texts and their lines
def test_a_byte_order_mark_is_no_part_of_a_member(tmp_path):
    text = MARK + b"a cat"
    members = [("a.jpg", encoded()), ("a.txt", text), ("a.cls", MARK + b"1\r\n")]
    shard = tar(tmp_path / "0.tar", [*members, ("a.nouns", MARK + b"cat")])
    (record,) = read_shard(str(shard))
    assert record["caption"] == "a cat" and names_of(record) == ["cat"]
    assert Labels(3, LabelOptions(), "x")(record) == ([1], [1.0])
    write_records(tmp_path / "a.tfrecord", [encode_example({"jpg": encoded(), "txt": text})])
    (record,) = read_shard(str(tmp_path / "a.tfrecord"))
    assert record["caption"] == "a cat"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\r\nb\n", ["a", "b"]),
        ("a\rb\rc\r", ["a", "b", "c"]),
        ("a\u2028b\nc\x85d", ["a\u2028b", "c\x85d"]),
        ("\n\nx", ["", "", "x"]),
        ("", []),
    ],
)
def test_lines(text, lines, tmp_path):
    assert lines_in(text) == lines


def test_line_ends_of_an_old_mac_in_a_list_of_classes(tmp_path):
    (tmp_path / "classes.txt").write_bytes("cat\rdog\rbird\r\u200b\r \ufeff\r".encode())
    assert read_class_names(tmp_path / "classes.txt") == ["cat", "dog", "bird"]


def test_lines_of_a_published_set(tmp_path):
    members = [("a.jpg", encoded()), ("a.cls", b"1")]
    entry = benchmark(tmp_path, members, classnames="\ufeffcat\u2028s\r\ndog \n\n")
    assert ShardImages(entry, tmp_path, multilabel=False).classes == ["cat\u2028s", "dog"]
    # as in wds_vtab-clevr_closest_object_distance, whose fourth class has no name
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n")
    assert ShardImages(entry, tmp_path, multilabel=False).classes == ["cat", "", "dog"]


def test_captions_of_a_published_set(tmp_path, capsys):
    # the second as Windows's editor saves "Unicode"
    texts = ["\ufeffa cat\u2028sits\n\nit sits".encode(), "café".encode("utf-16"), b"caf\xe9"]
    members = []
    for key, text in zip("abc", texts, strict=True):
        members += [(f"{key}.jpg", encoded()), (f"{key}.txt", text)]
    entry = benchmark(tmp_path, [*members, ("d.jpg", encoded())], dataset_type="retrieval")
    found = CaptionedImages(entry, tmp_path)
    assert found.captions == ["a cat\u2028sits", "it sits", "café", "caf\ufffd"]
    assert found.text_image.tolist() == [0, 0, 1, 2] and len(found) == 4
    assert "1 of 4 images have no captions, such as" in capsys.readouterr().err


def test_captions_beside_images_end_with_their_lines(tmp_path):
    images_in(tmp_path, ["a.jpg"])
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028line\r\ntwo".encode())
    (row,) = rows_of(tmp_path, ("image", "caption"))
    assert row["caption"] == ["one\u2028line", "two"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("a.json", Records), ("a.jsonl", Records), ("a.txt", read_class_names), ("a.yaml", read_yaml)],
)
def test_the_encoding_of_a_text_that_is_not_utf_8_is_named(name, read, encoding, tmp_path):
    row = '{"image": "a.jpg", "caption": "x"}'
    (tmp_path / name).write_bytes((f"[{row}]" if name == "a.json" else row).encode(encoding))
    with pytest.raises(UserError, match=r"a\.\w+.*it looks like UTF-(16|32)"):
        read(tmp_path / name)


# ---- shards
def test_a_compressed_shard_with_more_behind_it_blames_itself_and_not_the_disk(tmp_path):
    shard = tar(tmp_path / "0.tar", [("a.jpg", encoded()), ("a.txt", b"x")])
    shard.write_bytes(gzip.compress(shard.read_bytes()) + b"more")
    with pytest.raises(UserError, match=r"0\.tar: cannot be read \(BadGzipFile"):
        ShardIndex([shard])


@pytest.mark.parametrize(
    ("name", "start", "program"),
    [("1.tar.zst", b"\x28\xb5\x2f\xfd", "zstandard"), ("1.tar.lz4", b"\x04\x22\x4d\x18", "lz4")],
)
def test_shards_of_a_compression_that_is_not_read_are_not_passed_over(
    tmp_path, name, start, program
):
    tar(tmp_path / "0.tar", [("a.jpg", encoded()), ("a.txt", b"x")])
    (tmp_path / name).write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=f"{name}: compressed by {program}, which is not read"):
        find_shards(str(tmp_path))


def test_folders_may_have_braces_in_their_names(tmp_path):
    shard = tar(tmp_path / "set {1,2}[a]/0.tar", [("a.jpg", encoded()), ("a.txt", b"x")])
    assert list_shards(str(shard.parent)) == [str(shard)]


def test_compressed_tfrecords_are_counted(tmp_path):
    plain = tmp_path / "a.tfrecord"
    write_records(plain, [encode_example({"jpg": encoded(), "txt": "x"})] * 3)
    packed = tmp_path / "b.tfrecord.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert find_shards(str(packed)).samples == len(ShardIndex([packed])) == 3


def test_a_tfrecord_that_is_cut_off_is_not_whole_in_silence(tmp_path):
    shard = tmp_path / "a.tfrecord"
    write_records(shard, [encode_example({"jpg": encoded(), "txt": "x"})] * 3)
    shard.write_bytes(shard.read_bytes()[:-5])
    found = find_shards(str(shard))
    *good, bad = read_shard(str(shard), found.expected(str(shard)))
    assert found.samples == 3 and len(good) == 2
    assert isinstance(bad, BadSample) and "cut off" in str(bad)


def test_recognition_trains_and_is_scored_on_tfrecords(tmp_path):
    shard = tmp_path / "a.tfrecord"
    names = ["dog,cat", ["dog", "cat"], ""]  # an image that shows nothing stays in evaluation
    write_records(shard, [encode_example({"jpg": encoded(), "nouns": each}) for each in names])
    expected = [["dog", "cat"], ["dog", "cat"], []]
    assert [names_of(record) for record in read_shard(str(shard))] == expected
    found = ImageSet(shard, lambda image: image)
    assert found.references == expected and found.load(2)["image"].shape == (3, 12, 16)
    assert found.names[1] == f"{shard}/1"


@pytest.mark.parametrize(
    ("labels", "names"),
    [(None, []), ([], []), (["dog", None], ["dog"]), ("dog, cat", ["dog", "cat"])],
)
def test_names_that_are_missing(labels, names):
    assert names_of({"image": "a.jpg", "labels": labels}) == names


# ---- numbers
@pytest.mark.parametrize(
    ("given", "number"),
    [("7", 7), (b" 7\r\n", 7), ("-7", -7), ("٣", 3), (7.0, 7), (7, 7), ("7.0", 7), (MARK + b"7", 7)]
    + [(each, None) for each in ("--7", "+-7", "", "1.5", "0x1", "9" * 5000, True, None, [7])]
    + [(each, None) for each in (1.5, float("nan"), float("inf"))],
)
def test_whole_numbers(given, number):
    assert whole_number(given) == number


@pytest.mark.parametrize("label", ["--5", "+-3", "9" * 5000])
def test_labels_that_are_nearly_numbers(label):
    with pytest.raises(UserError, match="is no class number"):
        Labels(5, LabelOptions(), "x")({"label": label, "key": "s/1"})


def test_a_tar_member_with_endless_digits_for_a_size(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        header = tarfile.TarInfo("a.jpg")
        header.size = 5
        header.pax_headers = {"size": "9" * 5000}
        archive.addfile(header, io.BytesIO(b"12345"))
    (bad,) = read_shard(str(tmp_path / "0.tar"))
    assert isinstance(bad, BadSample) and "a size of" in str(bad)


def npy(values: list) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("cls", b"-1", r"0\.tar/b: no readable \.cls"),
        ("cls", b"9" * 30, r"0\.tar/b: no readable \.cls"),
        ("npy", npy([1, 0, 1]), r"0\.tar/b: its \.npy is .* each of 2 classes"),
        ("npy", npy([[1, 0]]), r"0\.tar/b: its \.npy is"),
        ("npy", npy([1, 5]), r"0\.tar/b: its \.npy is"),
        ("npy", npy([1.0, float("nan")]), r"0\.tar/b: its \.npy is"),
        ("npy", b"no array", r"0\.tar/b: no readable \.npy"),
    ],
)
def test_targets_of_a_published_set_are_checked(tmp_path, ending, content, message):
    good = b"1" if ending == "cls" else npy([1, 0])
    members = [("a.jpg", encoded()), (f"a.{ending}", good)]
    entry = benchmark(tmp_path, [*members, ("b.jpg", encoded()), (f"b.{ending}", content)])
    with pytest.raises(UserError, match=message):
        ShardImages(entry, tmp_path, multilabel=ending == "npy")


def test_a_counter_of_endless_digits(tmp_path):
    entry = benchmark(tmp_path, [("a.jpg", encoded())])
    (tmp_path / "test/nshards.txt").write_text("9" * 5000)
    with pytest.raises(UserError, match=r"nshards\.txt: '9+' is no number"):
        ShardImages(entry, tmp_path, multilabel=False)


def test_labels_of_a_flat_folder_behind_a_tab(tmp_path):
    images_in(tmp_path / "val", ["a b.JPEG", "c.JPEG"])
    (tmp_path / "val.txt").write_text("a b.JPEG\t1\nc.JPEG  0 \n")
    found = flat_folder(tmp_path / "val")
    assert [path.name for path in found.files] == ["a b.JPEG", "c.JPEG"]
    assert found.labels.tolist() == [1, 0]
    (tmp_path / "val.txt").write_text("val/a b.JPEG 1\n./c.JPEG 0\n")  # from the folder above
    assert flat_folder(tmp_path / "val").files == found.files
    (tmp_path / "val.txt").write_text(f"a b.JPEG {'9' * 30}\n")
    with pytest.raises(UserError, match="line 1: expected `name label`"):
        flat_folder(tmp_path / "val")


# ---- lists
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classes_are_in_one_order_however_their_accents_are_written(tmp_path, form):
    """Else a checkpoint would be scored with other classes on a copy of the same folders."""
    for name in ("zebra", "éclair", "äpfel", "ant"):
        images_in(tmp_path / unicodedata.normalize(form, name), ["a.jpg"])
    found = [unicodedata.normalize("NFC", name) for name in class_folders_in(tmp_path)]
    assert found == ["ant", "zebra", "äpfel", "éclair"]


def test_a_table_of_labels_names_no_classes(tmp_path):
    images_in(tmp_path, ["a.jpg"])
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,0\n")
    assert class_names([f"{tmp_path / 'labels.csv'}?image=path"], None, tmp_path) == []


def test_a_table_of_labels_has_an_identity(tmp_path):
    """By which eval_knn.py keeps features; the columns that were named are part of it."""
    images_in(tmp_path, ["a.jpg"])
    (tmp_path / "labels.csv").write_text("path,other,label\na.jpg,b.jpg,0\n")
    found = set()
    for column in ("path", "other"):
        data = f"{tmp_path / 'labels.csv'}?image={column}"
        found.add(identity(Records(data, ("image", "label")), data, tmp_path))
    (tmp_path / "a.jpg").write_bytes(encoded("PNG"))
    found.add(identity(Records(data, ("image", "label")), data, tmp_path))
    assert len(found) == 2  # b.jpg is not there, whatever a.jpg has become


@pytest.mark.parametrize("name", ["LABELS.JSONL", "Labels.Json"])
def test_endings_in_capitals(tmp_path, name):
    images_in(tmp_path, ["a.jpg"])
    row = {"image": "a.jpg", "labels": ["dog"], "caption": "x"}
    (tmp_path / name).write_text(json.dumps(row) + "\n")
    assert ImageSet(tmp_path / name, None, tmp_path).references == [["dog"]]
    assert is_list(str(tmp_path / name))
    assert len(caption_records("pairs", tmp_path / name, load_plain)) == 1


PUBLISHED = {
    "dataset_coco": ({"images": [{"filename": "a", "sentences": []}]}, "pack_karpathy"),
    "questions": ({"questions": [{"question": "?", "image_id": 1}]}, "vqa_train"),
    "answers": ({"annotations": [{"answers": [], "question_id": 1}]}, "test_answers"),
    "instances": ({"annotations": [{"bbox": [0, 0, 1, 1]}]}, r"captions_\*\.json"),
    "captions": ({"annotations": [{"caption": "x"}]}, "--dataset coco"),
    "region_descriptions": ({"id": 1, "regions": [{"phrase": "x"}]}, r"vg\.json"),
    "sbu-captions-all": ({"captions": ["x"], "image_urls": ["http://x/1.jpg"]}, "img2dataset"),
    "finetune_refcoco_val": (
        {"images": [{"caption": "x"}], "annotations": [{"bbox": [0, 0, 1, 1]}]},
        "convert_expressions",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_in_the_place_of_a_list(tmp_path, name):
    content, remedy = PUBLISHED[name]
    (tmp_path / f"{name}.json").write_text(json.dumps({"info": {}, **content}))
    with pytest.raises(UserError, match=remedy):
        Records(tmp_path / f"{name}.json")


def test_lists_of_sbu_above_the_size_of_an_entry(tmp_path, monkeypatch):
    """As the published file is, of a million URLs and captions in one object."""
    monkeypatch.setattr(json_entries, "ENTRY_BYTES", 200)
    monkeypatch.setattr(json_entries, "CHUNK", 64)
    file = tmp_path / "sbu-captions-all.json"
    file.write_text(
        json.dumps({"captions": ["a man"] * 100, "image_urls": ["http://x/1.jpg"] * 100})
    )
    with pytest.raises(UserError, match=r"SBU's own lists.*img2dataset"):
        Records(file)


@pytest.mark.parametrize("head", ["image,caption", "filename\tcaption", '"image_name","caption"'])
def test_a_table_of_another_ending_is_told_apart(head, tmp_path):
    (tmp_path / "captions.txt").write_text(f"{head}\n1.jpg,a man\n")
    with pytest.raises(UserError, match=r"this is a table by its first line: .*\.csv"):
        Records(tmp_path / "captions.txt")


@pytest.mark.parametrize("ending", ["token", "json", "jsonl", "txt"])
def test_captions_by_image_say_how_they_are_taken(ending, tmp_path):
    lists = "1.jpg#0\ta cat, red\n1.jpg#1\ta dog\n", json.dumps({"1.jpg": "a", "2.jpg": ["b"]})
    for text, remedy in zip(lists, (r"as \.tsv", r'write {"image": "1\.jpg"'), strict=True):
        file = tmp_path / f"list.{ending}"
        file.write_text(text)
        for read in (Records, lambda file: retrieval_list(Entry("x", "retrieval", str(file)))):
            with pytest.raises(UserError, match=remedy):
                read(file)
    file = tmp_path / "list.tsv"
    file.write_text("image\tcaption\n" + lists[0].replace("#0", "").replace("#1", ""))
    assert [entry["caption"] for entry in Records(file)] == ["a cat, red", "a dog"], "as is said"


def test_ids_of_coco_are_the_same_as_numbers_and_as_texts(tmp_path):
    file = tmp_path / "captions_val.json"
    annotations = [{"image_id": "9", "caption": "a dog"}, {"image_id": 9.0, "caption": "a puppy"}]
    content = {"images": [{"id": 9, "file_name": "dog.jpg"}], "annotations": annotations}
    file.write_text(json.dumps(content))
    (row,) = metadata_rows("coco", file, load_plain)
    assert row == {"image": "val/dog.jpg", "caption": ["a dog", "a puppy"]}


@pytest.mark.parametrize(
    ("given", "text"),
    [(5, "5"), (5.0, "5"), ("5", "5"), ("5.0", "5"), ("05", "05"), ("a.0", "a.0")],
)
def test_an_id_is_the_same_however_it_is_written(given, text):
    assert id_text(given) == text and id_text(np.array([given])[0]) == text


@pytest.mark.parametrize("given", [None, True, 5.5, float("nan"), float("inf"), [5], {}])
def test_what_is_no_id(given):
    with pytest.raises(TypeError, match="is no id"):
        id_text(given)


def test_images_without_a_name_are_counted(tmp_path):
    row = {"subreddit": "a", "image_id": "b", "caption": "c"}
    rows = [*[row] * 400, row | {"image_id": 5.0}, row | {"subreddit": None}]
    (tmp_path / "all.json").write_bytes(MARK + b"\r\n" * 100 + json.dumps(rows[:1]).encode())
    assert len(list(metadata_rows("redcaps", tmp_path / "all.json", load_plain))) == 1
    (tmp_path / "a.json").write_text(json.dumps({"annotations": rows}))
    left_out = LeftOut("a.json")
    found = list(metadata_rows("redcaps", tmp_path / "a.json", load_plain, left_out))
    assert len(found) == 401 and found[-1]["image"] == "a/5.jpg"
    assert left_out.count == 1 and "entry 401" in left_out.first[0]


KARPATHY = {
    "filename": "a.jpg",
    "split": "test",
    "imgid": 3,
    "sentences": [{"raw": "x", "sentid": 0}],
}


@pytest.mark.parametrize("form", ["tfrecord", "webdataset"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"imgid": None, "filepath": None, "sentences": [{"raw": "x"}]}, None),
        ({"imgid": 10**30}, None),
        ({"filename": None}, "image 0 .*filename must be a text"),
        ({"filename": "a\0"}, "no path of a file; set --images"),
        ({"filename": "."}, "is a directory; set --images"),
        ({"sentences": "x"}, "image 0 .*sentences a list"),
        ({"sentences": [{"raw": None}]}, "raw of .* is no text"),
        ({"sentences": [{"sent": "x"}]}, "no 'raw'"),
    ],
)
def test_images_of_karpathys_file(tmp_path, form, change, said, capsys):
    images_in(tmp_path, ["a.jpg"])
    (tmp_path / "d.json").write_text(json.dumps({"images": [KARPATHY | change]}))
    out = tmp_path / ("out.tfrecord" if form == "tfrecord" else "out")
    words = [tmp_path / "d.json", "--images", tmp_path, "--out", out, "--format", form]
    status = pack_karpathy.main(list(map(str, words)))
    assert status == (2 if said else 0)
    if said:
        assert re.search(f"d.json|{tmp_path}", (text := capsys.readouterr().err))
        assert re.search(said, text)
    else:
        shard = out if form == "tfrecord" else out / "test/0.tar"
        (record,) = read_shard(str(shard))
        assert as_list(captions_of(record)) == ["x"]
        given = change.get("imgid", 3)
        given = str(given) if given == 10**30 else given
        if form == "webdataset":
            assert parse_json(record["json"], "x")["imgid"] == given
        elif given is None:
            assert not {"image/id", "captions/id"} & {*record}
        else:
            assert record["image/id"] == [given if given == 3 else given.encode()]


def test_prompts_of_a_folder_that_is_no_clone_of_clip(tmp_path, capsys):
    assert convert_prompts.main(tmp_path) == 2
    assert f"{tmp_path}/notebooks/Prompt_Engineering" in capsys.readouterr().err


def test_expressions_become_a_list_a_split(tmp_path, capsys):
    def mdetr(name, *texts):
        images = [{"id": n, "file_name": "a.jpg", "caption": text} for n, text in enumerate(texts)]
        boxes = [{"image_id": n, "bbox": [0, 0, 4, 4]} for n in range(len(texts))]
        content = {"images": images, "annotations": boxes}
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    def run(output, *sources):
        convert_expressions.main(convert_expressions.Config(list(sources), tmp_path / output))
        return capsys.readouterr().out

    files = [mdetr("x_train.json", "a", "b"), mdetr("y_train.json", "c"), mdetr("x_val.json", "d")]
    said = f"{tmp_path}/out/train.json: 3 expressions\n{tmp_path}/out/val.json: 1 expressions\n"
    assert run("out", *files) == said
    made = json.loads((tmp_path / "out/train.json").read_text())
    assert [row["text"] for row in made] == ["a", "b", "c"]
    assert made[0] == {"image": "a.jpg", "text": "a", "bbox": [0, 0, 4, 4], "split": "train"}
    own = mdetr("train.json", "e")
    before = own.read_text()
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (".", "link"):
        with pytest.raises(UserError, match=r"holds .*/train\.json itself; write to another"):
            run(output, files[2], own)
    assert own.read_text() == before and not (tmp_path / "val.json").exists()
    with pytest.raises(UserError, match=r"x_a b\.json: split 'a b' is no word"):
        run("out", mdetr("x_a b.json", "f"))


def test_captions_that_are_null_are_left_out_and_counted(tmp_path):
    file = tmp_path / "captions_val.json"
    annotations = [{"image_id": number, "caption": None} for number in (1, 2)]
    annotations.append({"image_id": 2, "caption": "a dog"})
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    with pytest.warns(UserWarning, match="1 of 2 entries have no caption"):
        (row,) = metadata_rows("coco", file, load_plain)
    assert row == {"image": "val/000000000002.jpg", "caption": ["a dog"]}


LISTS = {
    "pairs.json": json.dumps(
        [{"image": "a.jpg", "caption": ["x", None]}, {"image": "./a.jpg", "caption": "y"}]
    ),
    "pairs.jsonl": '{"image": "a.jpg", "caption": ["x", null]}\n{"image": "a.jpg", "caption": "y"}\n',
    "pairs.csv": "image,caption\na.jpg,x\na.jpg,y\n",
}
LISTS["lines/pairs.json"] = LISTS["pairs.jsonl"]  # what Hugging Face calls lines


@pytest.mark.parametrize("name", LISTS)
def test_retrieval_is_scored_on_every_list_that_trains(tmp_path, name):
    images_in((tmp_path / name).parent, ["a.jpg"])
    (tmp_path / name).write_text(LISTS[name])
    assert len(Records(tmp_path / name)) == 2
    (entry,) = choose([f"retrieval:{tmp_path / name}"], {})
    found = CaptionedImages(entry, tmp_path)
    assert entry.name == "pairs" and found.captions == ["x", "y"] and len(found) == 1


def test_an_accent_is_one_letter_or_two():
    rows = [{"image": "caf\u00e9.jpg", "caption": "a"}, {"image": "cafe\u0301.jpg", "caption": "b"}]
    found = RetrievalSet(rows, ".", None)
    assert found.images == ["caf\u00e9.jpg"] and found.txt2img == [0, 0]


# ---- images
@pytest.mark.parametrize(
    ("kind", "options", "ending"),
    [
        ("JPEG2000", {}, "jp2"),
        ("JPEG2000", {"no_jp2": True}, "jp2"),
        ("PPM", {}, "ppm"),
        ("TIFF", {"big_tiff": True}, "tif"),
        ("WEBP", {}, "webp"),
        ("GIF", {}, "gif"),
        ("BMP", {}, "bmp"),
        ("PNG", {}, "png"),
        ("JPEG", {}, "jpg"),
    ],
)
def test_every_format_that_is_read_can_be_packed(kind, options, ending):
    content = encoded(kind, **options)
    assert decode_image(content).shape == (3, 12, 16)
    assert image_ending(content, "x") == ending


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"<HTML>404"])
def test_what_is_no_image_has_no_ending(content):
    with pytest.raises(BadSample):
        image_ending(content, "x")


def test_images_in_zip_files_are_evaluated_as_they_are_trained(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as bundle:
        bundle.writestr("part/a.jpg", encoded())
    check_image_root(tmp_path, ["all.zip/part/a.jpg"])
    row = {"image": "all.zip/part/a.jpg", "caption": "x", "sentence": "x", "label": "neutral"}
    assert RetrievalSet([row], tmp_path, tuple).load(0)[0].shape == (12, 16)
    (tmp_path / "a.json").write_text(json.dumps([row | {"labels": ["dog"]}]))
    images = ImageSet(tmp_path / "a.json", torch.clone, tmp_path)
    assert images.load(0)["image"].shape == (3, 12, 16)
    statements = Statements(tmp_path / "a.json", SNLI_VE, tmp_path, torch.clone)
    assert statements.load(0)["image"].shape == (3, 12, 16)
    (tmp_path / "all.zip").rename(tmp_path / "all.ZIP")
    assert decode_image(image_source(tmp_path, "all.ZIP/part/a.jpg")).shape == (3, 12, 16)
    (tmp_path / "all.ZIP").rename(tmp_path / "all.zip")
    with pytest.raises(BadSample, match=r"all\.zip: no member b\.jpg"):
        decode_image(tmp_path / "all.zip/b.jpg")


def test_an_image_in_a_zip_file_changes_with_it(tmp_path):
    """By which features and visual codes are kept."""
    before = states_digest([tmp_path / "all.zip/a.jpg"])
    (tmp_path / "all.zip").write_bytes(b"1")
    first = states_digest([tmp_path / "all.zip/a.jpg"])
    (tmp_path / "all.zip").write_bytes(b"22")
    assert len({before, first, states_digest([tmp_path / "all.zip/a.jpg"])}) == 3


@pytest.mark.parametrize("image", ["caf\u00e9.jpg", "cafe\u0301/b.jpg", "caf\u00e9.zip/c.jpg"])
@pytest.mark.parametrize("form", ["NFC", "NFD", "Windows"])
def test_an_image_under_another_spelling_changes_with_its_file(image, form, tmp_path):
    """By which an evaluation is continued, and features and visual codes are kept."""
    transform = SimpleNamespace(resolution=32, token_resolution=16)
    build = SimpleNamespace(image_root=tmp_path, transform=transform)
    windows = image.replace("/", "\\")
    row = {"image": windows if form == "Windows" else unicodedata.normalize(form, image)}
    file = tmp_path / image.partition("/")[0] if ".zip" in image else tmp_path / image
    file.parent.mkdir(exist_ok=True)
    states, keys = set(), set()
    for content in (None, b"1", b"22"):
        if content:
            file.write_bytes(content)
        states.add(states_digest([tmp_path / row["image"]]))
        keys.add(codes_key([row], build, torch.nn.Identity()))
    assert len(states) == len(keys) == 3
    build.image_root = shutil.copytree(tmp_path, tmp_path / "copied")
    assert codes_key([row], build, torch.nn.Identity()) in keys  # a copy has the same codes


def test_a_path_that_no_system_knows_is_a_bad_sample(tmp_path):
    for name in ("a\0b.jpg", "a\0b.zip/c.jpg"):
        with pytest.raises(BadSample, match="no path of a file"):
            decode_image(image_source(tmp_path, name))
    images_in(tmp_path, ["a.jpg"])
    check_image_root(tmp_path, ["x" * 5000, "a\0", "x" * 5000 + ".zip/a", "a.jpg"])
    rows = [{"image": name, "caption": "x"} for name in ("x" * 300, "a\0", ".", "a.jpg")]
    assert len(pack_list(tmp_path, rows)) == 1
    assert states_digest(row["image"] for row in rows)
    facts = [Examiner(tmp_path, len, 77)(0, row) for row in rows]
    assert [sorted(FATAL.intersection(each.problems)) for each in facts] == [["missing"]] * 3 + [[]]


# ---- what would wait for ever
def open_codes(path: Path) -> None:
    write_codes(path, [{"image": "a.jpg"}], None, None)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.jpg", decode_image),
        ("a.zip", lambda path: read_member(path, "a.jpg")),
        ("a.npy", lambda path: map_array(path, "make it again")),
        ("a.pkl", load_plain),
        ("a.npy", open_codes),
        ("a.json", Records),
        ("a.csv", Records),
        ("a.tar", lambda path: find_shards(str(path))),
    ],
)
def test_a_fifo_is_no_file(tmp_path, name, read):
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserError, BadSample), match=r"regular file|no such"):
        read(tmp_path / name)


def test_a_fifo_is_no_statistics_and_no_checkpoint(tmp_path):
    shard = tar(tmp_path / "0.tar", [("a.jpg", encoded()), ("a.txt", b"x")])
    os.mkfifo(tmp_path / "0_stats.json")
    assert find_shards(str(shard)).samples == 1
    os.mkfifo(tmp_path / "checkpoint_00000004.pt")
    assert find_damage(tmp_path / "checkpoint_00000004.pt") == "not a regular file"


def test_statistics_without_end_are_not_read(tmp_path):
    shard = tar(tmp_path / "0.tar", [("a.jpg", encoded()), ("a.txt", b"x")])
    with (tmp_path / "0_stats.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert find_shards(str(shard)).samples == 1


@pytest.mark.parametrize("kind", ["folder", "too large"])
def test_why_a_file_is_no_image_is_not_lost(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(BadSample, match=r"a\.jpg: (is a directory|\d+ bytes, the limit is)"):
        decode_image(path)


# ---- annotations
@pytest.mark.parametrize("field", ["question_id", "ref_id"])
def test_true_is_no_id(tmp_path, field):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", field: True}]))
    with pytest.raises(UserError, match=f"field '{field}' must be str or int, not bool"):
        Records(tmp_path / "a.json", ("image", field))


def test_captions_that_are_no_texts_are_counted_and_said(tmp_path):
    mixed = [["x", 5, None, ["y"]], ["x", {"raw": "y"}], ["z", None, float("nan")]]
    rows = [{"image": "a.jpg", "caption": caption} for caption in mixed]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="2 of 3 entries have items among their texts"):
        found = Records(tmp_path / "a.json")
    assert [row["caption"] for row in found] == [["x", "5"], ["x"], ["z"]]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", "caption": [{"raw": "x"}]}]))
    with pytest.raises(UserError, match=r"'caption' must be texts, not dict \({'raw': 'x'}\)"):
        Records(tmp_path / "a.json")
    rows = [{"image": "a.jpg", "caption": caption} for caption in ("x", float("nan"))]  # of pandas
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="1 of 2 entries have no caption"):
        assert Records(tmp_path / "a.json")[1]["caption"] == []


@pytest.mark.parametrize("given", [4705552913, 4705552913.0, "4705552913"])
def test_an_image_called_by_a_number(tmp_path, given):
    (tmp_path / "a.json").write_text(json.dumps([{"image": given, "caption": "x"}]))
    assert Records(tmp_path / "a.json")[0]["image"] == "4705552913"


def test_entailment_in_any_case_and_images_of_any_ending(tmp_path):
    images_in(tmp_path, ["5.jpg", "6.JPG"])
    rows = [(5, "Entailment"), ("6.JPG", " neutral ")]
    entries = [{"image": image, "sentence": "x", "label": label} for image, label in rows]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = Statements(tmp_path / "a.json", SNLI_VE, tmp_path, None)
    assert found.labels.tolist() == [2, 1]
    assert [found.files(record)[0].name for record in found.records] == ["5.jpg", "6.JPG"]


def test_entries_that_have_no_label_of_snlis_annotators_do_not_count(tmp_path, capsys):
    images_in(tmp_path, ["0.jpg"])
    labels = ["-", *["neutral"] * 150, "-", "nuetral", "entailment"]
    entries = [{"image": "0", "sentence": str(i), "label": e} for i, e in enumerate(labels)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = Statements(tmp_path / "a.json", SNLI_VE, tmp_path, torch.clone)
    said = capsys.readouterr().out
    assert "2 of 154 entries have no label" in said and "1 entries left out" in said
    assert len(found) == 151 and found.labels.tolist() == [1] * 150 + [2]
    assert found.load(0)["text"] == "1" and found.load(150)["text"] == "153"
    assert len(found.source()) == 151
    with pytest.raises(
        UserError, match=r"entry 152 .*'nuetral' .*; an evaluation needs every entry"
    ):
        found.complete()
    del entries[152]
    (tmp_path / "b.json").write_text(json.dumps(entries))
    assert len(Statements(tmp_path / "b.json", SNLI_VE, tmp_path, None).complete()) == 151
    (tmp_path / "c.json").write_text(json.dumps(entries[:1]))
    with pytest.raises(UserError, match="the label of every entry is '-'"):
        Statements(tmp_path / "c.json", SNLI_VE, tmp_path, None)


BOX = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "given",
    [[BOX], [[*BOX, 0.9]], [{"bbox": BOX, "score": 0.9}], {"boxes": [BOX]}],
)
def test_boxes_of_any_detector(given):
    assert read_boxes(given, "det_file") == [BOX]
    assert read_boxes([[1, 2, 0, 0]], "det_file") == [[1.0, 2.0, 0.0, 0.0]]  # rounded to nothing


@pytest.mark.parametrize(
    ("box", "height"), [([1, 2, 3], 5), ("abcd", 5), ([1, 2, 3, None], 5), (BOX, None), (BOX, "x")]
)
def test_annotated_boxes_and_sizes_are_checked_at_the_start(box, height):
    instances = {
        "annotations": [{"id": 1, "bbox": box}],
        "images": [{"id": 1, "height": height, "width": 5}],
    }
    with pytest.raises(UserError, match=r"instances\.json"):
        targets([{"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val"}], instances)


@pytest.mark.parametrize("size", [(0, 5), (5, -5), (10**12, 5)])
def test_an_image_has_a_size(size):
    image = {"id": 1, "height": size[0], "width": size[1]}
    instances = {"annotations": [{"id": 1, "bbox": BOX}], "images": [image]}
    with pytest.raises(UserError, match=r"instances\.json, image 1: .* is no size of an image"):
        targets([{"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val"}], instances)


def test_answers_that_are_null_are_none(tmp_path):
    annotators = [{"answer": None}, {"answer": "red"}]
    annotations = [
        {"question_id": 1, "answers": annotators},
        {"question_id": 2, "answers": annotators[:1]},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    assert read_official_answers(tmp_path / "a.json") == {"1": {"answers": ["red"]}}


@pytest.mark.parametrize("key", ["path", "test", "images"])
@pytest.mark.parametrize("value", [5, None, ["a"]])
def test_an_own_catalogue_has_texts(tmp_path, key, value):
    entry = {"path": "a", "type": "imagefolder", "test": "val", key: value}
    (tmp_path / "catalog.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(UserError, match=f"{key} of entry 'x' must be a text"):
        read_catalog(tmp_path / "catalog.json")


@pytest.mark.parametrize("names", [["cat", ""], ["cat", [" "]], ["cat", ["dog", ""]]])
def test_a_class_has_a_name(tmp_path, names):
    (tmp_path / "labels.json").write_text(json.dumps({"x": names}))
    with pytest.raises(UserError, match="none of them blank"):
        Prompts(tmp_path / "labels.json")


# ---- packing
def pack_list(folder: Path, rows: list[dict], **options) -> list[dict]:
    """The records of the shard that pack.py makes of a list."""
    (folder / "list.json").write_text(json.dumps(rows))
    made = {"data": str(folder / "list.json"), "image_root": folder, "target": folder / "out"}
    pack.pack(pack.Config(**made, workers=1, **options))
    return list(read_shard(str(folder / "out/00000.tar")))


def test_reduced_images_keep_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=exif)
    (record,) = pack_list(tmp_path, [{"image": "a.jpg", "caption": "x"}], resize=50)
    assert decode_image(record["image"]).shape == (3, 50, 100)
    assert decode_image(record["image"], exif=True).shape == (3, 100, 50)


def test_numbers_that_json_cannot_hold_are_packed_as_null(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"image": [encoded("JPEG2000")], "caption": ["x"], "score": [float("nan")]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    made = {"data": str(tmp_path / "p.parquet"), "image_root": tmp_path, "target": tmp_path / "out"}
    pack.pack(pack.Config(**made, workers=1))
    (record,) = read_shard(str(tmp_path / "out/00000.tar"))
    assert parse_json(record["json"], "x")["score"] is None
    assert decode_image(record["image"]).shape == (3, 12, 16)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    rows = [{"image": "a.png", "caption": "x", "score": float("nan")}]
    (record,) = pack_list(tmp_path, rows)
    assert parse_json(record["json"], "x") == {"score": None, "path": "a.png"}


def test_coco_in_sub_folders_with_captions_that_are_null(tmp_path):
    images_in(tmp_path / "img/sub", ["a.jpg"])
    annotations = [{"image_id": 1, "caption": text} for text in (None, "a dog")]
    annotations += [{"image_id": 2, "caption": text} for text in (None, ["x"])]
    annotations += [{"image_id": number, "caption": "x"} for number in (3, 4, 5)]
    files = {1: "sub/a.jpg", 2: "sub/a.jpg", 3: "a\0.jpg", 4: "a" * 300, 5: "sub"}
    images = [{"id": float(number), "file_name": name} for number, name in files.items()]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "captions_x.json").write_text(json.dumps(content))
    made = {"images": tmp_path / "img", "target": tmp_path / "out"}
    done = pack_coco.pack(pack_coco.Config(captions=tmp_path / "captions_x.json", **made))
    assert done == {"shards": 1, "images": 1, "missing_images": 3, "without_caption": 1}
    (record,) = read_shard(str(tmp_path / "out/00000.tar"))
    assert record["caption"] == "a dog"


@pytest.mark.parametrize("target", ["s3://bucket/tokens", "a.json/tokens"])
def test_a_vocabulary_is_not_written_where_it_cannot_be(tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": "a dog"}]')
    config = train_vocabulary.Config(data=["a.json"], target=Path(target))
    with pytest.raises(UserError, match="name another --target"):
        train_vocabulary.main(config)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["a.json"]


# ---- the doctor
def test_the_doctor_reads_lists_of_labels_and_linked_class_folders(tmp_path):
    images_in(tmp_path, ["a.jpg"])
    (tmp_path / "train.list").write_text("a.jpg : dog,cat\n")
    assert open_list(str(tmp_path / "train.list"))[0]["labels"] == ["dog", "cat"]
    images_in(tmp_path / "real/b", ["1.jpg"])
    images_in(tmp_path / "val/a", ["0.jpg"])
    (tmp_path / "val/b").symlink_to(tmp_path / "real/b")
    (tmp_path / "val/.notes.txt").write_text("x")
    assert [record["label"] for record in open_list(str(tmp_path / "val"))] == [0, 1]


def test_a_pattern_that_follows_links_in_a_circle_names_each_shard_once(tmp_path):
    shard = tmp_path / "s/0.tar"
    shard.parent.mkdir()
    shard.touch()
    (tmp_path / "s/circle").symlink_to(tmp_path / "s")
    assert list_shards(f"{tmp_path}/**/*.tar") == [str(shard)]
