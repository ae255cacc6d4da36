"""700 million samples in 70,000 shards: what start-up reads, what every rank keeps, how an epoch is
dealt out, and what a resumed run reads."""

import pickle
import threading
import tracemalloc
from collections import Counter
from itertools import islice

import pytest

from dataset.sources import shard_list, shard_states, shards
from dataset.sources.shard_list import Shards, find_shards
from dataset.sources.shards import ShardSource

COUNT, SAMPLES = 70_000, 10_000
SLOTS = 1024 * 8  # loader workers of a thousand ranks


@pytest.fixture(scope="module")
def source():
    names = tuple(f"s3://bucket/{number:05d}.tar" for number in range(COUNT))
    found = Shards("bucket", names, COUNT * SAMPLES, (SAMPLES,) * COUNT)
    return ShardSource(found, dict)


class Store:
    """A bucket of shards and their statistics; counts what it is asked for."""

    def __init__(self, shards: int):
        self.files = {}
        for number in range(shards):
            self.files[f"bucket/{number:05d}.tar"] = {"size": 1000, "ETag": f"a{number}"}
            self.files[f"bucket/{number:05d}_stats.json"] = {"size": 20, "ETag": f"b{number}"}
        self.listings = 0
        self.reads: Counter[str] = Counter()
        self.lock = threading.Lock()

    def ls(self, path, detail):
        self.listings += 1
        folder = {"name": "bucket/older", "size": 0, "type": "directory"}
        return [folder, *({"name": name, **about} for name, about in self.files.items())]

    def statistics(self, name):
        with self.lock:
            self.reads[name] += 1
        return b'{"successes": 10000}'

    def asked(self) -> tuple[int, int]:
        """Listings and files since the last time."""
        asked = self.listings, self.reads.total()
        self.listings = 0
        self.reads.clear()
        return asked


@pytest.fixture
def store(monkeypatch, request):
    store = Store(request.param)
    monkeypatch.setattr(shard_states, "file_system", lambda url: (store, url))
    monkeypatch.setattr(shard_list, "read_file", store.statistics)
    return store


@pytest.mark.parametrize("store", [7_000], indirect=True)
def test_start_up_reads_one_small_file_a_shard_once_and_sends_little(store):
    """Of a tenth of the shards: all of it is in proportion."""
    found = find_shards("s3://bucket/{00000..06999}.tar")
    assert len(found) == 7_000 and found.samples == 70_000_000
    assert len(store.reads) == 7_000 and store.asked() == (1, 7_000)
    assert len(pickle.dumps(found)) < 4e5, "rank 0 sends this to all others"
    assert find_shards("s3://bucket/{00000..06999}.tar") == found and store.asked() == (1, 0)


def replaced(store, cache):
    store.files["bucket/00007_stats.json"]["ETag"] = "new"


def added(store, cache):
    del store.files["bucket/00007_stats.json"]


def damaged(store, cache):
    (file,) = cache.glob("counts/all-*.json")
    file.write_bytes(file.read_bytes()[:-9])


def forbidden(store, cache):
    store.ls = None


def without_etags(store, cache):
    for about in store.files.values():
        about["ETag"] = None


@pytest.mark.parametrize("store", [1000], indirect=True)
@pytest.mark.parametrize("change", [replaced, added, damaged, forbidden, without_etags])
def test_counts_are_kept_no_longer_than_they_are_known_to_be_right(store, change, cache):
    url = "s3://bucket/{00000..00999}.tar"
    found = find_shards(url)
    assert store.asked() == (1, 1000)
    change(store, cache)
    assert find_shards(url) == found and store.asked()[1] == 1000
    assert find_shards("s3://bucket/{00000..00998}.tar").samples == 9_990_000


def test_counts_of_a_folder_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_list, "INDEXED", 3)
    for name in ("0", "1", "2"):
        (tmp_path / f"{name}.tar").write_bytes(bytes(10240))
        (tmp_path / f"{name}_stats.json").write_text('{"successes": 5}')
    assert find_shards(str(tmp_path)).counts == (5, 5, 5)
    with monkeypatch.context() as patch:
        patch.setattr(shard_list, "samples_of", None)  # is not called
        assert find_shards(str(tmp_path)).counts == (5, 5, 5)
    (tmp_path / "1_stats.json").write_text('{"successes": 7}')
    assert find_shards(str(tmp_path)).counts == (5, 7, 5)


def test_an_epoch_is_dealt_to_all_workers_once_and_in_another_order(source):
    dealt = [source._groups(7, 0, slot, SLOTS) for slot in range(SLOTS)]
    sizes = {sum(map(len, groups)) for groups in dealt}
    assert sizes == {COUNT // SLOTS, COUNT // SLOTS + 1}
    order = [piece[0] for groups in dealt for group in groups for piece in group]
    assert len(order) == COUNT and set(order) == set(source.shards)
    later = [source._groups(7, 1, slot, SLOTS) for slot in range(100)]
    same = [one for one, other in zip(dealt, later, strict=False) if one == other]
    assert len(later) == 100 and not same


def test_the_order_of_an_epoch_takes_little_memory_and_work_in_proportion(source, monkeypatch):
    calls = Counter()
    permuted = shards.permuted

    def counted(*arguments):
        calls["permuted"] += 1
        return permuted(*arguments)

    monkeypatch.setattr(shards, "permuted", counted)
    tracemalloc.start()
    source._groups(7, 0, 3, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert calls["permuted"] == -(-COUNT // 64)
    assert peak < 1e6, "a worker keeps its own shards alone"


def test_half_way_through_an_epoch_a_resumed_worker_opens_one_group(source, monkeypatch):
    opened: list[str] = []

    def read(shard, expected):
        opened.append(shard)
        assert expected == SAMPLES
        for number in range(40):
            yield {"key": f"{shard}/{number}"}

    monkeypatch.setattr(shards, "read_shard", read)
    start = source.start(COUNT * SAMPLES // 2, 3, 64)
    assert start[0] == 0 and abs(start[1] - COUNT // 64 // source.group // 2) <= 1
    straight = list(islice(source.read(7, 3, 64, start), 30))
    group = [shard for shard, _, _ in source._groups(7, 0, 3, 64)[start[1]]]
    assert opened == group, "it begins in the middle"
    opened.clear()
    resumed = list(islice(source.read(7, 3, 64, straight[19][2]), 10))
    assert resumed == straight[20:]
    assert opened == group, "and no other shard is read again"
