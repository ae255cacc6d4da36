"""700 million samples in 70,000 shards: what start-up reads, what every rank keeps, how an epoch is
dealt out, and what a resumed run reads."""

import pickle
import threading
import tracemalloc
from collections import Counter
from itertools import islice

import pytest

from dataset.sources import shard_list, shards
from dataset.sources.shard_list import Shards, find_shards
from dataset.sources.shards import ShardSource

COUNT, SAMPLES = 70_000, 10_000
SLOTS = 1024 * 8  # loader workers of a thousand ranks


@pytest.fixture(scope="module")
def source():
    names = tuple(f"s3://bucket/{number:05d}.tar" for number in range(COUNT))
    found = Shards("bucket", names, COUNT * SAMPLES, (SAMPLES,) * COUNT)
    return ShardSource(found, dict)


def test_start_up_reads_one_small_file_a_shard_and_sends_little(monkeypatch):
    reads: Counter[str] = Counter()
    lock = threading.Lock()

    def statistics(name, options):
        with lock:
            reads[name] += 1
        return b'{"successes": 10000}'

    monkeypatch.setattr(shard_list, "read_file", statistics)
    found = find_shards("s3://bucket/{00000..69999}.tar")
    assert len(found) == COUNT and found.samples == 700_000_000
    assert len(reads) == COUNT and set(reads.values()) == {1}
    assert len(pickle.dumps(found)) < 4e6, "rank 0 sends this to all others"


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

    def read(shard, options, expected):
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
