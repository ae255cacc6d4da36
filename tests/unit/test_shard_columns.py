"""Shards whose members are called otherwise: columns behind the question mark of their address."""

import io
import json
import tarfile

import pytest
import torch

from base.errors import BadSample, UserError
from dataset.sources.shard_columns import plain_name, split_columns
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import check_one_split, find_shards, list_shards
from dataset.sources.shards import read_shard, shard_sources
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.classification import LabelOptions, Labels, is_shards
from dataset.tasks.recognition import names_of
from dataset.tasks.record import captions_of, image_of, weights_of
from tests.helpers.images import of_colour

ALL = "image=webp,gif&caption=json.meta.alt,syn.txt"


def encoded(colour, kind) -> bytes:
    return of_colour(colour, (4, 4), kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards; the JPEG beside each WebP is a red thumbnail."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(3):
                about = {"meta": {"alt": f"alt {number}"}, "labels": [9], "tags": [number, 1]}
                members = {
                    "jpg": encoded("red", "JPEG"),
                    "webp": encoded("blue", "WEBP"),
                    "syn.txt": f"synthetic {number}".encode(),
                    "json": json.dumps(about | {"many": ["a", "b"]}).encode(),
                }
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def first(folder, query) -> dict:
    return next(iter(read_shard(f"{folder}/0.tar?{query}")))


def test_what_a_sample_holds_goes_by_name(folder):
    record = first(folder, ALL)
    assert captions_of(record) == ["alt 0", "synthetic 0"] and weights_of(record, ["", ""]) is None
    assert torch.equal(image_of(record)[:, 0, 0] > 128, torch.tensor([False, False, True]))
    assert record["key"] == f"{folder}/0.tar/0"
    record = first(folder, "caption=json.meta.alt:0.25,syn.txt:0.75")
    assert weights_of(record, captions_of(record)) == [0.25, 0.75]
    assert captions_of(first(folder, "caption=json.many")) == ["a", "b"]
    assert captions_of(first(folder, "caption=json.many,syn.txt")) == ["a", "b", "synthetic 0"]
    record = first(folder, "labels=json.tags")
    assert Labels(5, LabelOptions(), "x")(record) == ([0, 1], [1.0, 1.0]), "not json's labels"
    assert names_of(first(folder, "labels=json.many")) == ["a", "b"]


def shard_of(folder, **members) -> str:
    """A shard of one sample, members by their endings, in which _ stands for a dot."""
    with tarfile.open(folder / "one.tar", "w") as archive:
        for ending, content in ({"png": encoded("blue", "PNG")} | members).items():
            if content is None:
                continue
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"0.{ending.replace('_', '.')}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return f"{folder}/one.tar"


def test_a_json_member_is_what_it_holds(tmp_path):
    for text, read in (('["a", "b"]', ["a", "b"]), ('"a"', "a"), (' ["a"]', ["a"])):
        shard = shard_of(tmp_path, json=text, syn_json=text, txt="c")
        for query in ("caption=json", "caption=syn.json"):
            assert captions_of(next(iter(read_shard(f"{shard}?{query}")))) == read
        several = next(iter(read_shard(f"{shard}?caption=json:0.5,txt:0.5")))
        assert captions_of(several) == [*read, "c"]
        assert len(weights_of(several, captions_of(several))) == len([*read, "c"])
        assert captions_of(next(iter(read_shard(shard)))) == "c"
    assert names_of(next(iter(read_shard(f"{shard}?labels=json")))) == ["a"]
    shard = shard_of(tmp_path, json="[1, 2]", syn_json='{"alt": "a"}')
    assert Labels(3, LabelOptions(), "x")(next(iter(read_shard(f"{shard}?labels=json"))))[0] == [
        1,
        2,
    ]
    assert captions_of(next(iter(read_shard(f"{shard}?caption=syn.json.alt")))) == "a"
    found = next(iter(read_shard(f"{shard}?caption=syn.json")))
    assert isinstance(found, BadSample) and "as in syn.json.alt" in str(found)
    found = next(iter(read_shard(f"{shard_of(tmp_path, json='[broken')}?caption=json")))
    assert isinstance(found, BadSample) and "0.json: not valid JSON" in str(found)


def test_captions_that_an_address_names_are_not_those_that_pack_noted(tmp_path):
    noted = json.dumps({"captions": ["a", "b"], "caption_weights": [1, 3], "many": ["c", "d"]})
    shard = shard_of(tmp_path, json=noted, txt="a\nb", syn_txt="c\nd")
    for query, read, weights in (
        ("", ["a", "b"], [1, 3]),
        ("?caption=syn.txt", "c\nd", None),
        ("?caption=json.many", ["c", "d"], None),
    ):
        record = next(iter(read_shard(shard + query)))
        assert captions_of(record) == read and weights_of(record, read) == weights


def test_training_and_evaluation_read_the_same(folder):
    address = f"{folder}/{{0..1}}.tar?{ALL}"
    assert is_shards(address) and is_shards(f"{folder}?{ALL}")
    names = list_shards(f"{folder}?{ALL}")
    assert names == list_shards(address) == [f"{folder}/{n}.tar?{ALL}" for n in range(2)]
    index = ShardIndex(names, address)
    (source,) = shard_sources([address], captions_of, shuffle_buffer=2)
    assert len(index) == len(source) == 6 and index.name(0) == f"{folder}/0.tar/0"
    records = source.read(0, 0, 1, source.start(0, 0, 1))
    trained = {next(records)[1]["key"]: captions_of(next(records)[1]) for _ in range(2)}
    assert len(trained) == 2
    assert captions_of(index[4]) == ["alt 1", "synthetic 1"] == captions_of(index[1])
    assert index.image(0) == encoded("blue", "WEBP")


@pytest.mark.parametrize(
    "image, caption", [("photo", "title"), ("image/encoded", "captions/text"), ("photo", "a.txt")]
)
def test_features_of_tfrecords(image, caption, tmp_path):
    features = {image: [encoded("blue", "PNG")], caption: [b"one"], "txt": [b"other"]}
    write_records(tmp_path / "0.tfrecord", [encode_example(features)])
    address = f"{tmp_path}/0.tfrecord?image={image}&caption={caption}"
    (record,) = read_shard(address)
    (of_index,) = ShardIndex([address])
    assert captions_of(record) == captions_of(of_index) == "one"
    assert image_of(record).shape == image_of(of_index).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (
            ["i-train.tfrecord-00000-of-00002", "i-validation.tfrecord-00000-of-00001"],
            "'{}/i-train*'",
        ),
        (["cc3m_train/0.tar", "cc3m_valid/0.tar"], "{}/cc3m_train"),
    ],
)
def test_a_folder_of_several_splits_is_not_one(names, example, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for read in (find_shards, lambda folder: ShardIndex(list_shards(folder), folder)):
        with pytest.raises(UserError, match="of several splits, train, vali") as error:
            read(str(tmp_path))
    named = example.format(tmp_path)
    assert str(error.value).endswith(f"; name one: {named}")
    assert list_shards(named.strip("'")) == [f"{tmp_path}/{names[0]}"] and is_shards(
        named.strip("'")
    )
    check_one_split(f"{tmp_path}/*", names)  # whoever names a pattern has chosen


@pytest.mark.parametrize(
    "query, message",
    [
        ("caption=json.alt", r"0\.tar/0: no json\.alt for caption; it has .*json \('meta, labels"),
        ("caption=title", r"no title for caption; it has webp, syn.txt, json"),
        ("image=avif", r"no image \(\.avif\), only jpg, webp"),
    ],
)
def test_a_member_that_is_not_there_is_a_bad_sample(query, message, folder):
    found = first(folder, query)
    assert isinstance(found, BadSample)
    with pytest.raises(BadSample, match=message):
        raise found


@pytest.mark.parametrize(
    "query, message",
    [
        ("caption=", "no member given for caption; write caption=MEMBER"),
        ("caption=a&titel=b", "titel is none of image, caption, labels, label_probs"),
        ("caption=a:0.5,b", "give every column a weight"),
        ("image=a:0.5", "only columns of captions have weights"),
    ],
)
def test_mistakes_are_one_sentence(query, message, folder):
    with pytest.raises(UserError, match=message):
        list_shards(f"{folder}?{query}")


def test_question_marks_of_addresses_stay():
    signed = "https://host/0.tar?X-Signature=a?b"
    assert split_columns(signed) == (signed, "") and plain_name("train-???.tar") == "train-???.tar"
    assert split_columns(f"{signed}?image=webp") == (signed, "image=webp")


def test_numbers_that_img2dataset_lacks_are_null(tmp_path):
    about = b'{"alt": "a dog", "similarity": NaN, "label": 3, "captions": ["a\\nb"]}'
    shard = shard_of(tmp_path, json=about, txt=b"a\nb")
    (record,) = read_shard(f"{shard}?caption=json.alt")
    assert captions_of(record) == "a dog"
    (record,) = read_shard(shard)
    assert captions_of(record) == ["a\nb"]
    assert Labels(5, LabelOptions(), "x")(record)[0] == [3]


def test_a_member_that_is_an_image_by_its_last_ending_is_named(tmp_path):
    image = encoded("red", "JPEG")
    shard = shard_of(tmp_path, png=None, left_jpg=image, right_jpg=image, txt=b"a dog")
    (bad,) = read_shard(shard)
    assert isinstance(bad, BadSample) and "?image=left.jpg behind the shards" in str(bad)
    assert ShardIndex([shard], error_budget=1).bad == [str(bad)]
    (record,) = read_shard(f"{shard}?image=left.jpg")
    assert record["image"] == image
