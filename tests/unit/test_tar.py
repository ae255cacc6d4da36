"""The one reader of tars: names, keys, damage, limits; the same samples however a shard is read."""

import gzip
import io
import random
import struct
import tarfile
import time

import pytest

from base.errors import BadSample, UserError
from dataset.sources import tar as tars
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import count_of, find_shards, list_shards
from dataset.sources.shards import read_shard
from dataset.sources.tar import Damage, TarWalk, read_samples, split_key

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def write(path, members, kind="ustar", mode="w"):
    with tarfile.open(path, mode, format=FORMATS[kind]) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def samples(count, folder="", size=700):
    for number in range(count):
        yield f"{folder}{number:04d}.jpg", bytes([number]) * (size + 37 * number)
        yield f"{folder}{number:04d}.txt", b"%d" % number
        yield f"{folder}{number:04d}.json", b"{}"


def keys_by_every_way(path):
    """Keys of the good samples as training reads them, from a stream, and as evaluation does."""
    trained = [each for each in read_shard(str(path)) if not isinstance(each, BadSample)]
    streamed = read_samples(TarWalk(io.BytesIO(path.read_bytes())))
    index = ShardIndex([path], error_budget=1.0)
    ways = [
        [record["key"] for record in trained],
        [f"{path}/{s.key}" for s in streamed if not s.fault and "jpg" in s.members],
        [index.name(i) for i in range(len(index))],
    ]
    assert ways[0] == ways[1] == ways[2]
    assert [record["image"] for record in trained] == [index.image(i) for i in range(len(index))]
    assert trained == [index[i] for i in range(len(index))]
    return [key.removeprefix(f"{path}/") for key in ways[0]]


@pytest.mark.parametrize("name", ["./00.jpg", "././00.JPG", "00.jpg", "/00.jpg"])
def test_names_that_are_one_key(name):
    assert split_key(name) == ("00", "jpg")


def test_accents_are_one_letter_or_two():
    """As macOS writes names (NFD), and other systems (NFC)."""
    assert split_key("caf\u00e9/\u00e9.jpg") == split_key("cafe\u0301/e\u0301.jpg")
    lone = b"\xff.jpg".decode("utf-8", "surrogateescape")
    assert split_key(lone) == (lone[0], "jpg")


@pytest.mark.parametrize("name", ["a [1].tar", "{0..3}.tar", "50%#?*.tar", "\u00e9 \u65e5.tar"])
def test_any_name_of_a_shard_that_is_there(name, tmp_path):
    path = write(tmp_path / name, samples(3))
    assert list_shards(str(path)) == [str(path)]
    assert find_shards(str(path)).counts == (3,)
    assert list_shards(str(tmp_path)) == [str(path)]


def test_a_wildcard_names_shards_alone(tmp_path):
    paths = [str(write(tmp_path / f"{number}.tar", samples(3))) for number in range(2)]
    (tmp_path / "0_stats.json").write_text("{}")
    assert list_shards(f"{tmp_path}/*") == paths


def test_keys():
    assert split_key("./v1.0/a.b/7.seg.png") == ("v1.0/a.b/7", "seg.png")
    assert split_key(".hidden.jpg") is split_key("README") is split_key("a/.b/._1.jpg") is None
    for folder in ("__MACOSX", ".ipynb_checkpoints", "./a/@eaDir", "/.b/c"):
        assert split_key(f"{folder}/1.jpg") is None
    assert split_key("../a/1.jpg") == ("../a/1", "jpg")
    assert split_key("deep/1.") is None


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_samples_in_training_and_evaluation(kind, tmp_path):
    long = "d" * 90 + "/" + "f" * (90 if kind == "ustar" else 190)
    members = [
        ("./1.jpg", b"1"),
        ("./1.txt", b"one"),
        ("2.JPG", b"2"),
        ("v1.0/3.jpg", b"3"),
        ("v1.0/._3.jpg", b"apple"),
        (f"{long}.jpg", b"4"),
        (f"{long}.txt", b"four"),
        ("README", b""),
        ("5.jpg", b"5"),
        ("5.jpg", b"again"),
    ]
    path = write(tmp_path / "a.tar", members, kind)
    assert keys_by_every_way(path) == ["1", "2", "v1.0/3", long, "5", "5"]
    assert count_of(str(path)) == 6
    whole = write(tmp_path / "b.tar", [(n, d) for n, d in members if n != "README"], kind)
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(tmp_path, "folder", recursive=False)
    joined = tmp_path / "joined.tar"  # as `cat a.tar b.tar` makes it
    joined.write_bytes((tmp_path / "c.tar").read_bytes() + path.read_bytes() + whole.read_bytes())
    assert len(keys_by_every_way(joined)) == 12


@pytest.mark.parametrize("kind", ["pax", "gnu"])
@pytest.mark.parametrize("seed", range(2))
def test_no_damage_loses_samples_silently(kind, seed, tmp_path):
    """Good samples and lost ones are all there were, whatever is done to the shard."""
    total = 24
    path = write(tmp_path / "a.tar", samples(total, "x" * 120 + "/"), kind)
    whole = path.read_bytes()
    random_numbers = random.Random(seed)
    worse = 0
    for _ in range(30):
        data = bytearray(whole)
        at = random_numbers.randrange(len(data) - 10240)
        block = at - at % 512
        damage = random_numbers.choice(["flip", "zero", "zeros", "cut", "noise", "more", "less"])
        if damage == "flip":
            data[at] ^= 1 << random_numbers.randrange(8)
        elif damage in ("zero", "zeros"):
            length = 512 if damage == "zero" else 2048
            data[block : block + length] = bytes(length)
        elif damage == "cut":
            del data[at:]
        elif damage == "noise":
            data[at : at + 300] = b"\xff" * 300
        elif damage == "more":
            data[block:block] = random_numbers.randbytes(512)
        else:
            del data[block : block + 512]
        path.write_bytes(data)
        records = list(read_shard(str(path), total))
        bad = [each for each in records if isinstance(each, BadSample)]
        good = [each for each in records if not isinstance(each, BadSample)]
        incomplete = sum("caption" not in record for record in good)  # bad when it is built
        lost = sum(each.lost for each in bad) + incomplete
        assert total <= len(good) - incomplete + lost <= total + 1, damage
        worse += len(good) - incomplete < total
        if good:
            assert keys_by_every_way(path)
    assert worse > 5


def test_a_zeroed_header_costs_one_sample(tmp_path):
    path = write(tmp_path / "a.tar", samples(24))
    with tarfile.open(path) as archive:
        place = archive.getmember("0006.jpg").offset
    data = bytearray(path.read_bytes())
    data[place : place + 512] = bytes(512)
    path.write_bytes(data)
    records = list(read_shard(str(path)))
    (bad,) = [each for each in records if isinstance(each, BadSample)]
    assert len(records) == 24 and bad.lost == 1
    assert f"a.tar/0006: zeros in place of a header at byte {place}" in str(bad)
    assert count_of(str(path)) == 24


def test_a_damage_that_took_whole_samples_is_one_bad_sample(tmp_path):
    path = write(tmp_path / "a.tar", samples(8))
    with tarfile.open(path) as archive:
        first, last = (archive.getmember(name).offset for name in ("0003.jpg", "0005.jpg"))
    data = bytearray(path.read_bytes())
    data[first:last] = b"\xff" * (last - first)
    path.write_bytes(data)
    records = list(read_shard(str(path)))
    kinds = [isinstance(each, BadSample) for each in records]
    assert kinds == [False] * 3 + [True] + [False] * 3


def header(name, size, kind=tarfile.REGTYPE):
    """A header block; size: as it stands, also negative or huge."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (
        (size & (1 << 95) - 1 | 1 << 95).to_bytes(12, "big")
        if size < 0
        else b"\x80" + size.to_bytes(11, "big")
    )
    if size < 0:
        block[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def around(block, tmp_path, name="a.tar"):
    """A shard with a hostile member between samples 1 and 2."""
    first = write(tmp_path / "0.tar", samples(2)).read_bytes()
    second = write(tmp_path / "1.tar", list(samples(3))[6:]).read_bytes()
    end = first.rindex(b"{}") // 512 * 512 + 512
    path = tmp_path / name
    path.write_bytes(first[:end] + block + second)
    return path


HOSTILE = {
    "negative size": header("9.jpg", -512),
    "beyond the end": header("9.jpg", 20 << 30),
    "sparse": header("9.jpg", 0, tarfile.GNUTYPE_SPARSE),
    "long name without end": header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "pax header without end": header("x", 1 << 40, tarfile.XHDTYPE),
    "damaged pax header": header("x", 512, tarfile.XHDTYPE) + b"99999 path=x\n".ljust(512, b"\0"),
    "link": header("9.jpg", 0, tarfile.SYMTYPE),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("compressed", [False, True])
def test_hostile_members_are_bad_samples(case, compressed, tmp_path):
    path = around(HOSTILE[case], tmp_path)
    if compressed:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    begin = time.monotonic()
    records = list(read_shard(str(path), 3))
    assert time.monotonic() - begin < 5
    bad = [each for each in records if isinstance(each, BadSample)]
    good = [each["caption"] for each in records if not isinstance(each, BadSample)]
    assert good[:2] == ["0", "1"] and len(bad) == 1
    assert len(good) + bad[0].lost >= 3
    if not compressed:
        assert good == ["0", "1", "2"]


def test_sparse_files_and_bombs_are_not_read(tmp_path, monkeypatch):
    """A member that unpacks to more than the limit: refused, without reading it."""
    monkeypatch.setattr(tars, "MEMBER_BYTES", 1 << 20)
    write(tmp_path / "a.tar", [("0.jpg", bytes(5 << 20)), ("1.jpg", b"1")])
    bad, good = read_shard(str(tmp_path / "a.tar"))
    assert "0: '0.jpg': 5242880 bytes, the limit is 1048576" in str(bad) and good["image"] == b"1"
    members = [("1.jpg", b"1"), ("2.jpg", b"2"), ("0.jpg", bytes(5 << 20))]
    write(tmp_path / "b.tar.gz", members, mode="w:gz")
    *good, bad = read_shard(str(tmp_path / "b.tar.gz"), 9)
    assert len(good) == 2 and "the limit is" in str(bad) and bad.lost == 7
    monkeypatch.setattr(tars, "ZERO_BYTES", 1 << 16)
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    (bad,) = read_shard(str(tmp_path / "c.tar.gz"))
    assert "MiB of zeros" in str(bad)
    with open(tmp_path / "d.tar", "wb") as file:  # 20 GB of nothing
        file.truncate(20 << 30)
    (bad,) = read_shard(str(tmp_path / "d.tar"))
    assert "MiB of zeros" in str(bad)


def test_evaluation_refuses_what_expands_without_measure(tmp_path):
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    with pytest.raises(UserError, match="expands to more than 200 times its size"):
        ShardIndex([tmp_path / "c.tar.gz"])


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_train_and_evaluate(mode, tmp_path):
    path = write(tmp_path / f"a.tar.{mode}", samples(5), mode=f"w:{mode}")
    assert keys_by_every_way_compressed(path) == [f"{n:04d}" for n in range(5)]
    assert find_shards(str(path)).samples == 5
    assert list_shards(str(tmp_path)) == [str(path)]


def keys_by_every_way_compressed(path):
    index = ShardIndex([path])
    trained = list(read_shard(str(path)))
    assert trained == [index[i] for i in range(len(index))]
    return [record["key"].removeprefix(f"{path}/") for record in trained]


def test_counts_are_cached_by_size_and_time(tmp_path, monkeypatch):
    path = write(tmp_path / "00000.tar", samples(5))
    assert find_shards(str(tmp_path)).counts == (5,)
    monkeypatch.setattr("dataset.sources.shard_list._counted", None)  # is not called again
    assert find_shards(str(tmp_path)).counts == (5,)
    monkeypatch.undo()
    write(path, samples(7))
    assert find_shards(str(tmp_path)).counts == (7,)
    (tmp_path / "00000_stats.json").write_text('{"successes": 3}')
    assert find_shards(str(tmp_path)).counts == (3,)
    path.rename(tmp_path / "00000.tar.gz")
    assert find_shards(str(tmp_path / "00000.tar.gz")).counts == (3,)
    (tmp_path / "00000_stats.json").write_text("no JSON")
    assert find_shards(str(tmp_path / "00000.tar.gz")).counts == (7,)


def test_an_index_is_made_again_for_other_shards_and_where_it_is_damaged(tmp_path, cache):
    path = write(tmp_path / "a.tar", samples(3))
    assert len(ShardIndex([path])) == 3
    write(path, samples(4))
    assert len(ShardIndex([path])) == 4
    for index in (cache / "shards").glob("*.npz"):
        index.write_bytes(b"damaged")
    assert len(ShardIndex([path])) == 4


def test_damages_are_found_once(tmp_path):
    path = around(header("9.jpg", -512) * 3, tmp_path)
    walk = TarWalk(io.BytesIO(path.read_bytes()), path.stat().st_size)
    assert sum(isinstance(found, Damage) for found in walk) == 1


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html>" + b" " * 2000, "a web page"),
        (b"shards/00000.tar\nshards/00001.tar\n", "no tar archive"),  # a list of them
    ],
)
def test_what_is_no_tar_at_all_says_what_it_looks_like(tmp_path, content, seen):
    (tmp_path / "0.tar").write_bytes(content)
    (bad,) = read_shard(str(tmp_path / "0.tar"))
    assert isinstance(bad, BadSample) and seen in str(bad)
