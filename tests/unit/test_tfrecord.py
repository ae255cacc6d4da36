"""TFRecord files: what is written is read, and damage costs one record or the rest of a file, never
the run."""

import io
import json
import struct
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import BadSample, UserError
from dataset.loading.stream import Stream, StreamLoader
from dataset.sources.shard_list import find_shards, list_shards, samples_of
from dataset.sources.shards import ShardSource, read_shard
from dataset.sources.tfrecord import (
    count_frames,
    encode_example,
    is_tfrecord,
    masked_crc,
    parse_example,
    read_frames,
    write_records,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(width=32, allow_nan=False)
FEATURE = (
    st.lists(st.binary(), min_size=1) | st.lists(INT64, min_size=1) | st.lists(FLOAT, min_size=1)
)


def write(path, numbers) -> str:
    """A shard with the images and captions of these numbers."""
    write_records(
        path, (encode_example({"jpg": b"image", "txt": str(n), "width": n}) for n in numbers)
    )
    return str(path)


def damaged(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@given(st.dictionaries(st.text(), FEATURE))
def test_examples_come_back(features):
    assert parse_example(encode_example(features)) == features


def test_single_values_and_texts():
    found = parse_example(
        encode_example({"a": "été", "b": 7, "c": -1, "d": 0.5, "e": b"x", "f": []})
    )
    assert found == {"a": ["été".encode()], "b": [7], "c": [-1], "d": [0.5], "e": [b"x"], "f": []}


def test_values_that_are_not_packed():
    """Some writers put every number into a field of its own."""
    numbers = b"\x08\x05\x08\x07"  # field 1, varint, twice
    floats = b"\x0d" + struct.pack("<f", 1.5)
    payload = b""
    for name, kind, content in ((b"n", b"\x1a", numbers), (b"f", b"\x12", floats)):
        feature = kind + bytes([len(content)]) + content
        entry = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(feature)]) + feature
        payload += b"\x0a" + bytes([len(entry)]) + entry
    assert parse_example(b"\x0a" + bytes([len(payload)]) + payload) == {"n": [5, 7], "f": [1.5]}


@given(st.binary(min_size=1, max_size=40))
def test_anything_else_is_a_bad_sample(data):
    try:
        assert isinstance(parse_example(data), dict)
    except BadSample as error:
        assert "tf.train.Example" in str(error)


def test_checksum():
    crc = 0xE3069283  # of Castagnoli's polynomial for these bytes
    assert masked_crc(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_frames(tmp_path):
    records = [b"", b"one", b"two" * 1000]
    assert write_records(tmp_path / "a.tfrecord", iter(records)) == 3
    with (tmp_path / "a.tfrecord").open("rb") as file:
        assert list(read_frames(file, "a")) == records
    assert count_frames(tmp_path / "a.tfrecord") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.tfrecord"]


@pytest.mark.parametrize("cut", [0, 5, 12, 20])
def test_a_cut_file_ends_with_one_bad_sample(tmp_path, cut):
    path = tmp_path / "a.tfrecord"
    write(path, range(3))
    whole = path.read_bytes()
    first = 16 + struct.unpack("<Q", whole[:8])[0]
    path.write_bytes(whole[: first + cut])
    *good, last = read_shard(str(path)) if cut else [*read_shard(str(path)), None]
    assert [record["caption"] for record in good] == ["0"]
    assert last is None or (isinstance(last, BadSample) and "cut off" in str(last))
    assert count_frames(path) == (2 if cut else 1)  # the loss counts: training reports it


def test_a_wrong_checksum_costs_one_record(tmp_path):
    path = tmp_path / "a.tfrecord"
    write(path, range(3))
    damaged(path, 20)  # inside the first payload
    bad, *good = read_shard(str(path))
    assert (
        isinstance(bad, BadSample) and "a.tfrecord, record 0" in str(bad) and "checksum" in str(bad)
    )
    assert [record["caption"] for record in good] == ["1", "2"] and count_frames(path) == 3


def test_a_wrong_length_costs_the_rest(tmp_path):
    path = tmp_path / "a.tfrecord"
    write(path, range(3))
    damaged(path, 16 + struct.unpack("<Q", path.read_bytes()[:8])[0] + 1)
    good, bad = read_shard(str(path))
    assert good["caption"] == "0" and "what follows in this shard is lost" in str(bad)
    assert list(read_frames(io.BytesIO(b""), "empty")) == []


def test_records_without_image_and_files_without_records(tmp_path):
    write_records(tmp_path / "a.tfrecord", [encode_example({"txt": "words"}), b"\xff\xff"])
    (tmp_path / "b.tfrecord").write_bytes(b"")
    one, two = read_shard(str(tmp_path / "a.tfrecord"))
    assert "no image" in str(one) and "tf.train.Example" in str(two)
    (empty,) = read_shard(str(tmp_path / "b.tfrecord"))
    (missing,) = read_shard(str(tmp_path / "c.tfrecord"))
    assert "holds no samples" in str(empty) and "c.tfrecord" in str(missing)


def test_other_features_are_lists(tmp_path):
    (record,) = read_shard(write(tmp_path / "a.tfrecord", [7]))
    assert record == {
        "key": f"{tmp_path}/a.tfrecord/0",
        "image": b"image",
        "caption": "7",
        "txt": [b"7"],
        "width": [7],
    }


def test_names(tmp_path):
    assert is_tfrecord("s3://b/train.tfrecord-00000-of-00128") and not is_tfrecord(
        "x.tfrecord/00000.tar"
    )
    (tmp_path / "x").mkdir()
    for name in ("00000.tfrecord", "1.tfrec", "00000.tfrecord.idx", "00000.tfrecord_stats.json"):
        write(tmp_path / "x" / name, [1])
    expected = [f"{tmp_path}/x/00000.tfrecord", f"{tmp_path}/x/1.tfrec"]
    assert list_shards(str(tmp_path)) == expected
    (tmp_path / "00000.tar").write_bytes(b"")
    assert list_shards(str(tmp_path)) == [f"{tmp_path}/00000.tar"]


def test_counts(tmp_path):
    first, second = (write(tmp_path / f"{n}.tfrecord", range(n)) for n in (3, 4))
    assert samples_of([first, second]) == [3, 4]
    (tmp_path / "3_stats.json").write_text(json.dumps({"successes": 2}))
    assert samples_of([first, second]) == [2, 4]
    with pytest.raises(UserError, match=r"nowhere.tfrecord"):
        samples_of([str(tmp_path / "nowhere.tfrecord")])


def build(record: dict) -> dict:
    return {"number": int(record["caption"])}


def collate(samples: list[dict]) -> dict:
    return {"number": [sample["number"] for sample in samples]}


def loader(url, state=None, budget=0.01) -> StreamLoader:
    source = ShardSource(find_shards(url), build, shuffle_buffer=4)
    return StreamLoader(Stream([source], collate), 4, 0, seed=3, state=state, error_budget=budget)


def test_as_a_source_it_resumes_exactly(tmp_path):
    for n in range(4):
        write(tmp_path / f"{n}.tfrecord", range(6 * n, 6 * n + 6))
    whole = [batch["number"] for batch in islice(loader(str(tmp_path)), 12)]
    assert (
        sorted(n for batch in whole[:6] for n in batch) == list(range(24))
        and whole[:6] != whole[6:]
    )
    first = loader(str(tmp_path))
    head = [batch["number"] for batch in islice(first, 5)]
    tail = [batch["number"] for batch in islice(loader(str(tmp_path), first.state_dict()), 7)]
    assert head + tail == whole


def test_damage_counts_against_the_error_budget(tmp_path):
    for n in range(4):
        write(tmp_path / f"{n}.tfrecord", range(6 * n, 6 * n + 6))
    damaged(tmp_path / "2.tfrecord", 20)
    patient = loader(str(tmp_path), budget=0.2)
    seen = [n for batch in islice(patient, 12) for n in batch["number"]]
    assert 12 not in seen and {*range(24)} - {12} == {*seen} and patient.errors[str(tmp_path)] >= 2
    with pytest.raises(UserError, match=r"2.tfrecord, record 0.*checksum is wrong"):
        list(islice(loader(str(tmp_path)), 12))


def test_remote_files(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/0.tfrecord", open(write(tmp_path / "0.tfrecord", range(8)), "rb").read())
    assert list_shards("memory://bucket/*.tfrecord") == ["memory:///bucket/0.tfrecord"]
    assert find_shards("memory://bucket/0.tfrecord").samples == 8
    seen = [
        number
        for batch in islice(loader("memory://bucket/*.tfrecord"), 2)
        for number in batch["number"]
    ]
    assert sorted(seen) == list(range(8))
