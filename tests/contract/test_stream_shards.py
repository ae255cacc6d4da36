"""Tar shards as a source: layouts, damage, too few shards, counts, and object storage."""

import json
import tarfile
from collections import Counter
from itertools import islice

import pytest

from base.errors import BadSample, UserError
from dataset.loading.stream import StreamLoader
from dataset.sources.shard_list import expand_braces, find_shards, list_shards, samples_of
from dataset.sources.shards import ShardSource, read_shard
from tests.contract.stream_cases import Build, shards, stream, world, write_shard, write_shards


def numbers(loader, count):
    return [number for batch in islice(loader, count) for number in batch["number"].tolist()]


def test_names():
    assert expand_braces("a{08..11}b{x,yz}") == [
        f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in ("x", "yz")
    ]
    assert expand_braces("s3://bucket/plain.tar") == ["s3://bucket/plain.tar"]
    assert expand_braces("{3..1}{8..10}")[:4] == ["38", "39", "310", "28"]
    assert expand_braces("{1..010..4}") == ["001", "005", "009"]
    assert expand_braces("{a..c}x{}") == ["a..cx"]
    for endless in ("{0..9999999}", "{0..9999}" * 9):
        with pytest.raises(UserError, match="more than 1,000,000 shards"):
            expand_braces(endless)


def test_lists_globs_braces_folders(tmp_path):
    braces = write_shards(tmp_path / "x", (2, 2, 2))
    write_shard(tmp_path / "y.tar", [7])
    three = [str(tmp_path / "x" / f"0000{n}.tar") for n in range(3)]
    assert list_shards(braces) == list_shards(f"{tmp_path}/x/*.tar") == three
    assert list_shards(str(tmp_path)) == [*three, str(tmp_path / "y.tar")]
    for missing in (f"{tmp_path}/x/{{00000..00003}}.tar", f"{tmp_path}/z*.tar"):
        with pytest.raises(UserError, match="no such shard"):
            list_shards(missing)
    (tmp_path / "images").mkdir()
    with pytest.raises(
        UserError, match=r"no shards \(.tar, .tfrecord\) in it; .* as metadata or train"
    ):
        list_shards(f"{tmp_path}/images")


def test_counts(tmp_path):
    source = shards(tmp_path, (3, 4))
    assert len(source) == 7 and sum(samples_of(source.shards)) == 7
    (tmp_path / "00000_stats.json").write_text('{"successes": 30}')
    for stated, samples in ((None, 34), (99, 99)):
        assert len(ShardSource(find_shards(str(tmp_path), stated), Build())) == samples


def test_members_of_a_sample(tmp_path):
    write_shard(tmp_path / "a.tar", [3, 4])
    first, second = read_shard(str(tmp_path / "a.tar"))
    assert first["key"] == f"{tmp_path}/a.tar/000000003"
    assert (
        first["image"] == b"image" * 100
        and first["caption"] == "3"
        and json.loads(second["json"]) == {"n": 4}
    )
    write_shard(tmp_path / "b.tar", [5], members=("txt", "json"))
    (bad,) = read_shard(str(tmp_path / "b.tar"))
    assert isinstance(bad, BadSample) and "no image" in str(bad)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        for name in ("one/k.jpg", "one/k.txt", "two/k.JPG", "two/k.seg.png", "README"):
            file = tmp_path / name.replace("/", "_")
            file.write_bytes(name.encode())
            tar.add(file, name)
    one, two = read_shard(str(tmp_path / "c.tar.gz"))
    assert one["key"].endswith("c.tar.gz/one/k") and one["caption"] == "one/k.txt"
    assert two["image"] == b"two/k.JPG" and two["seg.png"] == b"two/k.seg.png"


@pytest.mark.parametrize("cut", [0, 300, 512, 700, 1024, 5000, 6144, -1024 * 9])
def test_a_cut_shard_is_one_bad_sample(tmp_path, cut):
    write_shard(tmp_path / "a.tar", range(8))
    whole = list(read_shard(str(tmp_path / "a.tar")))
    assert len(whole) == 8 and not any(isinstance(record, BadSample) for record in whole)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:cut])
    *good, bad = read_shard(str(tmp_path / "a.tar"))
    assert good == whole[: len(good)] and isinstance(bad, BadSample) and "a.tar" in str(bad)


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", bytes(2048)])
def test_a_file_that_is_no_tar_is_named_where_samples_are_too_few(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    source = ShardSource(find_shards(str(tmp_path)), Build())
    with pytest.raises(UserError, match=r"only 1, and 1 of them cannot be read \(.*0\.tar: \w"):
        StreamLoader(stream(source), 2, workers=0)


def test_damage_in_the_middle_is_noticed(tmp_path):
    write_shard(tmp_path / "a.tar", range(8))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = 512 * 5 * 4  # jpg 1 + 2, txt 1 + 1 and json 1 + 1 blocks: seven per sample
    data[header : header + 3000] = b"\xff" * 3000
    (tmp_path / "a.tar").write_bytes(data)
    records = list(read_shard(str(tmp_path / "a.tar")))
    captions = [None if isinstance(each, BadSample) else each["caption"] for each in records]
    assert captions == ["0", "1", "2", None, None, "5", "6", "7"]
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"\0" * 10240)
    for name in ("b.tar", "c.tar", "missing.tar"):
        (bad,) = read_shard(str(tmp_path / name))
        assert isinstance(bad, BadSample) and name in str(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_with_the_next_shard(tmp_path, workers):
    source = shards(tmp_path, (10,) * 6)
    for name in ("00002.tar", "00004.tar"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:8000])
    loader = StreamLoader(stream(source), 4, workers, error_budget=0.5)
    seen = Counter(numbers(loader, 24))
    loader.close()
    assert set(range(10)) | set(range(30, 40)) < set(seen) and 29 not in seen
    assert loader.errors[source.name] >= 16  # all that is missing of both, though read as one each
    loader = StreamLoader(stream(source), 4, workers)
    with pytest.raises(UserError, match=r"0000[24].tar.* is lost"):
        numbers(loader, 100)
    loader.close()


def test_fewer_shards_than_workers_share_them(tmp_path):
    seen = Counter()
    for rank in range(2):
        loader = StreamLoader(stream(shards(tmp_path, (20, 20))), 2, 2, world(rank, 2), seed=4)
        seen.update(numbers(loader, 10))
        loader.close()
    assert len(seen) == 40 and max(seen.values()) == 1


def test_every_epoch_has_its_shards_in_another_order(tmp_path):
    source = shards(tmp_path, (1,) * 8, group=1, shuffle_buffer=1)  # nothing else is shuffled
    order = numbers(StreamLoader(stream(source), 8, 0, seed=2), 4)
    epochs = [tuple(order[start : start + 8]) for start in range(0, 32, 8)]
    assert len({*epochs}) == 4 and {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(8))}


def test_shuffling_mixes_shards_and_reads_all(tmp_path):
    source = shards(tmp_path, (50,) * 8, group=4, shuffle_buffer=100)
    order = numbers(StreamLoader(stream(source), 10, 0, seed=2), 80)
    assert sorted(order[:400]) == sorted(order[400:]) == list(range(400))
    assert order[:400] != order[400:]
    assert len({number // 50 for number in order[:20]}) >= 3
    plain = StreamLoader(
        stream(shards(tmp_path, (50,) * 8, group=1, shuffle_buffer=1)), 10, 0, seed=2
    )
    assert all(len({n // 50 for n in batch["number"].tolist()}) == 1 for batch in islice(plain, 40))


def test_object_storage(tmp_path, s3, monkeypatch):
    import s3fs

    monkeypatch.setattr("dataset.sources.remote.FIRST_WAIT", 0.01)
    local = shards(tmp_path, (9, 6, 8))
    files = s3fs.S3FileSystem()
    files.mkdir("pairs")
    files.put(f"{tmp_path}/*", "pairs/web/")
    assert list_shards("s3://pairs/web/*.tar") == [f"s3://pairs/web/0000{n}.tar" for n in range(3)]
    remote = find_shards("s3://pairs/web/{00000..00002}.tar")
    remote = ShardSource(remote, Build(), group=2, shuffle_buffer=7)
    assert len(remote) == len(local) == 23
    for workers in (0, 2):
        ours = StreamLoader(stream(remote), 4, workers, seed=3)
        theirs = StreamLoader(stream(local), 4, workers, seed=3)
        assert numbers(ours, 12) == numbers(theirs, 12)
        ours.close(), theirs.close()
    with pytest.raises(UserError, match="no such shard"):
        list_shards("s3://pairs/none*.tar")
    files.pipe("pairs/web/00001.tar", files.cat("pairs/web/00001.tar")[:4000])
    loader = StreamLoader(stream(remote), 4, 0, seed=3, error_budget=0.5)
    numbers(loader, 12)
    assert loader.errors["s3://pairs/web/{00000..00002}.tar"] >= 1
