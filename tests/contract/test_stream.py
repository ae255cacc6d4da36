"""The data stream: deterministic, disjoint and complete over ranks and workers, exactly resumable,
with a budget."""

import gc
import multiprocessing
import os
import random
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.distributed import ALONE, World
from base.errors import BadSample, UserError
from dataset.images.decode import decode_image
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.tasks.loaders import eval_loader
from runtime.interrupt import EXIT_REQUEUE, Interrupt
from tests.contract.stream_cases import Build, collate, records, shards, stream, world
from tests.helpers.images import of_colour
from tests.helpers.processes import Run, start_processes


def take(loader, count):
    return list(islice(loader, count))


def same(left, right):
    return len(left) == len(right) and all(
        all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def numbers(batches):
    return [number for batch in batches for number in batch["number"].tolist()]


def case(kind, folder):
    """Each kind of stream, with bad samples in between."""
    if kind == "records":
        return stream(records(53, bad=(3, 17)))
    if kind == "shards":
        return stream(shards(folder, (9, 11, 8, 10, 12), bad=(4, 30)))
    return stream(
        records(40, bad=(7,), name="pairs"),
        shards(folder, (9, 6, 12), bad=(105,), first=100),
        weights=(2, 1),
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["records", "shards", "mixture"])
def test_resumes_exactly_anywhere(tmp_path, kind, workers):
    options = {"batch_size": 4, "workers": workers, "seed": 5, "error_budget": 0.5}
    straight = StreamLoader(case(kind, tmp_path), **options)
    batches, states, errors = [], [], []
    for _ in range(31):
        states.append(straight.state_dict())
        errors.append(straight.errors)
        batches.append(next(straight))
    straight.close()
    for stop in (0, 1, 5, 14, 27) if workers == 0 else (5, 14):
        resumed = StreamLoader(case(kind, tmp_path), state=states[stop], **options)
        assert resumed.errors == errors[stop]
        assert same(take(resumed, len(batches[stop:])), batches[stop:])
        assert resumed.state_dict() == straight.state_dict()
        resumed.close()


def test_more_workers_than_cores_are_no_news(monkeypatch):
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    loader = StreamLoader(stream(records(16)), 2, workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(loader)
    loader.close()


def test_the_state_is_small_and_plain():
    import json

    loader = StreamLoader(
        stream(records(1000, bad=range(0, 1000, 300)), records(500, first=1000)), 8, workers=0
    )
    take(loader, 50)
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()
    assert len(json.dumps(loader.state_dict())) < 1000


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_an_epoch_is_disjoint_and_complete(tmp_path, kind, ranks, workers):
    source = records(96) if kind == "records" else shards(tmp_path, (8,) * 12)
    seen = Counter()
    for rank in range(ranks):
        loader = StreamLoader(stream(source), 2, workers, world(rank, ranks), seed=1)
        assert loader.steps_per_epoch == 96 // (2 * ranks)
        seen.update(numbers(take(loader, loader.steps_per_epoch)))
        loader.close()
    assert seen == Counter(range(96))


def test_epochs_differ_and_seeds_decide():
    def epochs(seed):
        loader = StreamLoader(stream(records(64)), 8, workers=0, seed=seed)
        return [numbers(take(loader, 8)) for _ in range(3)]

    first = epochs(1)
    assert all(sorted(epoch) == list(range(64)) for epoch in first)
    assert first[0] != first[1] != first[2] and first[0] != list(range(64))
    assert epochs(1) == first and epochs(2) != first


def test_a_sample_is_drawn_alike_by_any_worker():
    """The random choices made for a sample depend on seed, epoch and sample, not on the number of
    workers."""

    def epoch(workers, batch_size):
        loader = StreamLoader(stream(records(48)), batch_size, workers, seed=3)
        batches = take(loader, 48 // batch_size)
        loader.close()
        return {
            n: noise
            for b in batches
            for n, noise in zip(b["number"].tolist(), b["noise"].tolist(), strict=True)
        }

    assert epoch(0, 4) == epoch(2, 4) == epoch(3, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_share_the_decoder_that_is_imported_before_they_start(workers, monkeypatch):
    """Each alone would import torchvision, and torch's compilers with it, for seconds."""
    imported = []
    monkeypatch.setattr("dataset.loading.stream.load_decoder", lambda: imported.append("stream"))
    monkeypatch.setattr("dataset.loading.eval.load_decoder", lambda: imported.append("eval"))
    loader = StreamLoader(stream(records(8)), 4, workers)
    take(loader, 1)
    loader.close()
    EvalLoader(dict, range(4), 2, list, workers=workers)
    assert imported == ["stream", "eval"] * workers


def test_the_global_generators_are_left_alone():
    def states() -> list:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]

    before = states()
    for workers in (0, 1):
        loader = StreamLoader(stream(records(20)), 4, workers)
        take(loader, 3)
        loader.close()
    assert states() == before


def test_mixtures_keep_their_weights(tmp_path):
    loader = StreamLoader(
        stream(records(40), records(1000, first=100), weights=(3, 1)), 8, workers=0
    )
    drawn = numbers(take(loader, 50))
    assert sum(number < 100 for number in drawn) == 300
    by_size = StreamLoader(stream(records(100), records(300, first=100)), 8, workers=0)
    drawn = numbers(take(by_size, 50))
    assert sorted(drawn) == list(range(400))
    with pytest.raises(UserError, match="one positive weight"):
        stream(records(3), weights=(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_dropped_counted_and_not_replaced(workers):
    bad = {5, 50, 77}
    loader = StreamLoader(stream(records(99, bad=bad, name="pairs")), 4, workers, error_budget=0.05)
    batches = take(loader, 24)
    assert all(len(batch["number"]) == 4 for batch in batches)
    counts = Counter(numbers(batches))
    assert not bad & set(counts) and len(counts) >= 92
    assert loader.errors == {"pairs": 3}
    loader.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_the_budget_ends_the_run_with_a_list(workers):
    loader = StreamLoader(stream(records(200, bad=range(0, 200, 20), name="pairs")), 4, workers)
    with pytest.raises(UserError) as caught:
        take(loader, 500)
    message = str(caught.value)
    assert (
        "pairs: entry 20: sample 20 is bad" in message
        and "error budget" in message
        and "per source: pairs" in message
    )
    assert "Traceback" not in message
    loader.close()
    loader = StreamLoader(stream(records(200, bad=range(0, 200, 20))), 4, workers, error_budget=0.2)
    take(loader, 100)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_samples_ends_too(workers):
    loader = StreamLoader(stream(records(30, bad=range(30))), 4, workers, error_budget=1.0)
    with pytest.raises(UserError, match="30 of 30 samples are unusable"):
        next(loader)
    loader.close()


def test_as_many_bad_samples_as_the_budget_says_are_none_too_many():
    """Two of twenty, all of which this batch has seen."""
    loader = StreamLoader(
        stream(records(20, bad=(3, 11), name="pairs")), 18, workers=0, error_budget=0.1
    )
    next(loader)
    assert loader.errors == {"pairs": 2}


@pytest.mark.parametrize(("seed", "workers", "batch_size"), [(1, 0, 16), (2, 0, 7), (3, 2, 16)])
def test_a_list_with_as_many_bad_entries_as_the_budget_says_is_read_again(
    seed, workers, batch_size
):
    """An epoch may begin with them: after half of it there are more than the budget of what is drawn."""
    source = records(60, bad=(3, 11, 40), name="pairs")
    loader = StreamLoader(stream(source), batch_size, workers, seed=seed, error_budget=0.05)
    fractions = []
    while loader.drawn < 300:
        next(loader)
        fractions.append(sum(loader.errors.values()) / loader.drawn)
    assert max(fractions[60 // batch_size :]) > 0.05
    loader.close()


def test_a_long_list_may_have_more_bad_entries_by_chance_but_not_twice_the_budget():
    sizes = {"batch_size": 50, "workers": 0, "error_budget": 0.01}
    loader = StreamLoader(stream(records(100_000)), **sizes)
    bounds = {drawn: loader._allowed(drawn, 0) for drawn in (1000, 10_000, 99_000, 100_000)}
    assert bounds[1000] == pytest.approx(10 + 4 * 10**0.5 + 4)
    assert 120 < bounds[10_000] < 150 and bounds[99_000] == bounds[100_000] == 1000
    # a shard that is lost at the beginning counts against the budget of the epoch
    assert loader._allowed(2000, 900) > 900 and loader._allowed(2000, 10_000) == 1000


def test_the_source_of_the_largest_share_begins():
    mixed = stream(records(10), records(90, first=100), weights=(1, 9))
    assert numbers(take(StreamLoader(mixed, 1, workers=0), 1))[0] >= 100


def test_the_list_is_short():
    loader = StreamLoader(stream(records(3000, bad=range(1500))), 4, workers=0)
    with pytest.raises(UserError) as caught:
        take(loader, 1000)
    assert str(caught.value).count("is bad") == 20


class Broken:
    def __call__(self, record):
        raise TypeError("a slip in the code")


@pytest.mark.parametrize("workers", [0, 1])
def test_mistakes_in_code_are_not_bad_samples(workers):
    loader = StreamLoader(stream(RecordSource([{"a": 1}] * 9, Broken())), 2, workers)
    with pytest.raises(TypeError, match="a slip in the code"):
        next(loader)
    loader.close()


class Dies:
    def __call__(self, record):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_reported():
    loader = StreamLoader(stream(RecordSource([{"a": 1}] * 9, Dies())), 2, workers=1)
    with pytest.raises(UserError, match=r"worker died.*shared memory"):
        next(loader)
    loader.close()


def test_too_few_samples():
    with pytest.raises(
        UserError, match=r"8 on each of 2 ranks needs 16 samples, but there are only 15"
    ):
        StreamLoader(stream(records(15)), 8, world=world(0, 2))
    with pytest.raises(UserError, match="no records"):
        RecordSource([], Build())


@pytest.mark.parametrize("change", [{"seed": 9}, {"more": 4}])
@pytest.mark.parametrize("kind", ["records", "shards"])
def test_resuming_with_other_data_or_seed_goes_on_nearby(tmp_path, kind, change):
    def source(more=0):
        return stream(
            records(480 + more)
            if kind == "records"
            else shards(tmp_path, (8,) * 60 + (more,) * (more > 0))
        )

    before = StreamLoader(source(), 4, workers=0, seed=1)
    take(before, 60)  # half of the epoch
    with pytest.warns(UserWarning, match="data order changed on resuming.*about the same position"):
        after = StreamLoader(
            source(change.get("more", 0)),
            batch_size=4,
            workers=0,
            seed=change.get("seed", 1),
            state=before.state_dict(),
        )
    assert after.state_dict()["samples"] == 240
    assert len(set(numbers(take(after, 60)))) > 200


def loaders(source, ranks, workers, batch_size, state=None):
    """The loaders of all ranks."""
    options = {"batch_size": batch_size, "workers": workers, "seed": 5, "state": state}
    return [
        StreamLoader(source(), world=world(rank, ranks), error_budget=0.5, **options)
        for rank in range(ranks)
    ]


# (ranks, loader workers, batches of each rank) one after the other, with batches of 2
HISTORIES = {
    "a node less": [(2, 0, 7), (1, 0, 9)],
    "a node more": [(1, 0, 7), (2, 0, 9)],
    "less and more": [(3, 0, 5), (1, 0, 3), (2, 0, 5)],
    "other workers": [(1, 2, 7), (1, 3, 9)],
    "again and again": [(2, 0, 1), (3, 0, 1), (2, 0, 2), (1, 0, 1), (4, 0, 2)],
}
EPOCHS = 3


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", ["records", "shards", "mixture"])
def test_other_ranks_and_workers_repeat_and_lose_nothing(tmp_path, kind, history):
    """However often their number changes, each epoch has every sample once; a bad one is counted
    once an epoch, and nobody warns."""

    def source():
        return case(kind, tmp_path)

    seen, group, bad = [], [], 0
    for ranks, workers, batches in HISTORIES[history]:
        state = [loader.state_dict() for loader in group] or None
        samples = group[0].samples if group else 0
        group = loaders(source, ranks, workers, 2, state)
        assert [loader.samples for loader in group] == [samples] * ranks
        assert bad_samples(group) == bad
        for loader in group:
            seen += draws(take(loader, batches))
            loader.close()
        bad = bad_samples(group)
    state = [loader.state_dict() for loader in group]
    [last] = loaders(source, 1, 0, 1, state)
    assert drawn(last) == len(seen) + bad
    whole = EPOCHS * len(last.stream)
    while drawn(last) < whole:
        seen += draws(take(last, 1))
    if drawn(last) > whole:  # the last ones of the epochs were bad
        seen.pop()
    counts = Counter(number for number, _ in seen)
    if kind == "mixture":  # its sources are in different epochs
        counts = {number: count for number, count in counts.items() if number < 100}
        assert len(counts) == 39 and max(counts.values()) - min(counts.values()) <= 1
    else:
        assert set(counts.values()) == {EPOCHS} and len(counts) == len(last.stream) - 2
        assert bad_samples([last]) in (2 * EPOCHS, 2 * EPOCHS + 1)
        assert len(set(seen)) == len(seen)  # no epoch is drawn again


def draws(batches) -> list[tuple[int, float]]:
    """Each sample with a random number that depends on it and on the epoch."""
    pairs = []
    for batch in batches:
        pairs += zip(batch["number"].tolist(), batch["noise"][:, 0].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_positions_of_earlier_versions_continue(tmp_path, kind):
    """They hold a number for records and three for shards."""

    def earlier(loader) -> dict:
        state = loader.state_dict()
        for slot in state["slots"]:
            [[*at]] = slot["at"]
            slot["at"] = [at[1] if kind == "records" else at[:3]]
        return state

    group = loaders(lambda: case(kind, tmp_path), 2, 0, 2)
    for loader in group:
        take(loader, 5)
    for ranks in (2, 1):
        states = [loader.state_dict() for loader in group], [earlier(loader) for loader in group]
        new, old = [loaders(lambda: case(kind, tmp_path), ranks, 0, 2, state) for state in states]
        for ours, theirs in zip(new, old, strict=True):
            assert same(take(ours, 20), take(theirs, 20))


def bad_samples(group) -> int:
    return sum(sum(loader.errors.values()) for loader in group)


def drawn(loader) -> int:
    """Samples that all ranks drew so far."""
    return sum(sum(slot["drawn"]) for slot in loader.state_dict()["slots"])


def test_a_changed_batch_size_resumes_without_notice():
    before = StreamLoader(stream(records(48)), 4, workers=2, seed=1)
    seen = numbers(take(before, 6))
    before.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after = StreamLoader(stream(records(48)), 6, workers=2, seed=1, state=before.state_dict())
    assert sorted(seen + numbers(take(after, 4))) == list(range(48))
    after.close()


SCRIPT = """
    import subprocess, time
    from tests.contract.stream_cases import records, stream
    from dataset.loading.stream import StreamLoader
    loader = StreamLoader(stream(records(100)), 4, workers=2)
    next(loader)
    workers = [worker.pid for worker in loader._batches._workers]
    print(*workers, flush=True)
    {then}
"""


def run_script(folder: Path, then: str) -> tuple[Run, list[int]]:
    """The run of SCRIPT, and its workers."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(SCRIPT).format(then=then))
    run = Run(str(file), [])
    while "\n" not in run.stdout:
        assert run.poll() is None, run.said()
        time.sleep(0.02)
    first, second = map(int, run.stdout.splitlines()[0].split())
    return run, [first, second]


def wait_until_gone(pids, seconds=20):
    for _ in range(10 * seconds):
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not pids:
            return True
        time.sleep(0.1)
    return False


def test_workers_ignore_signals_of_the_scheduler_but_end_with_the_parent(tmp_path):
    send = "[subprocess.run(['kill', f'-{s}', *map(str, workers)]) for s in ('TERM', 'INT', 'USR1')]; time.sleep(0.5)"
    twenty = "print(len([next(loader) for _ in range(20)]))"
    run, pids = run_script(tmp_path, f"{send}; {twenty}; raise SystemError('stop')")
    assert run.wait() == 1 and run.stdout.splitlines()[1:] == ["20"]
    assert wait_until_gone(pids)


def test_signals_that_come_while_workers_start_kill_none():
    """All of the job get the scheduler's signals, also workers that have not come as far as to
    ignore them."""
    start_processes(load_under_early_signals, (), 1)


def load_under_early_signals(rank: int) -> None:
    import dataset.loading.eval as evaluating
    import dataset.loading.stream as streaming

    ready = streaming.worker_init

    def late_init(number):
        for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), signal_number)
        ready(number)

    streaming.worker_init = evaluating.worker_init = late_init
    loader = streaming.StreamLoader(stream(records(100)), 4, workers=2)
    assert len([next(loader) for _ in range(20)]) == 20
    samples = list(range(12)).__getitem__
    assert len(list(evaluating.EvalLoader(samples, range(12), 4, list, workers=2))) == 3


def test_a_signal_while_workers_start_leaves_a_loader_that_can_end_them():
    start_processes(load_interrupted, (), 1)


def load_interrupted(rank: int) -> None:
    """Another thread gets the signal, which the main one holds back."""
    Interrupt(World(0, 1, 0, torch.device("cpu")), lambda: None)
    left, start = [], multiprocessing.Process.start
    begun, sent = threading.Event(), threading.Event()

    def send():
        begun.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        sent.set()

    def start_and_send(process):
        start(process)
        if len(multiprocessing.active_children()) == 2:
            begun.set()
            sent.wait()

    threading.Thread(target=send, daemon=True).start()
    multiprocessing.Process.start = start_and_send
    sys.unraisablehook = left.append
    with pytest.raises(SystemExit) as ended:
        take(StreamLoader(stream(records(100)), 4, workers=2), 20)
        time.sleep(5)
    assert ended.value.code == EXIT_REQUEUE
    del ended
    gc.collect()
    assert left == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_end_when_the_parent_is_killed(tmp_path):
    run, pids = run_script(tmp_path, "time.sleep(100)")
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert wait_until_gone(pids, seconds=4)  # torch's own watch needs five


def test_shares_of_an_evaluation():
    for n, size in ((0, 2), (1, 3), (10, 3), (17, 4), (8, 8)):
        shares = [list(shard_indices(n, rank, size)) for rank in range(size)]
        assert [index for share in shares for index in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def load(index):
    if index == 13:
        raise BadSample("images/13.jpg: truncated")
    return {"number": index, "noise": (0.0,)}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_leaves_nothing_out(workers):
    loader = EvalLoader(load, range(12), 5, collate, workers)
    assert [batch["number"].tolist() for batch in loader] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11],
    ]
    assert len(loader) == 3
    with pytest.raises(UserError, match=r"images/13.jpg: truncated; evaluation needs every sample"):
        list(EvalLoader(load, range(10, 20), 5, collate, workers))
    assert list(EvalLoader(load, range(0), 5, collate, workers)) == []


def jpegs(folder, count, cut=(), broken=()):
    """JPEG files 0.jpg ... of one grey level each; those in `cut` end early."""
    for number in range(count):
        level = 10 * number
        data = of_colour((level, level, level), (64, 64), "JPEG")
        if number in cut:
            data = data[:-20]
        (folder / f"{number}.jpg").write_bytes(b"" if number in broken else data)
    return [{"number": number, "image": str(folder / f"{number}.jpg")} for number in range(count)]


class Decodes:
    def __call__(self, record):
        mean = decode_image(record["image"]).float().mean()
        return {"number": record["number"], "noise": (float(mean), 0.0, 0.0)}


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_images_are_used_counted_and_named_once(workers, tmp_path, capfd):
    entries = jpegs(tmp_path, 20, cut=(3, 7), broken=(5,))
    source = RecordSource(entries, Decodes(), "files")
    loader = StreamLoader(stream(source), 4, workers, error_budget=0.2)
    seen = Counter(numbers(take(loader, 20)))
    loader.close()
    assert {3, 7} < set(seen) and 5 not in seen
    assert loader.truncated == {"files": seen[3] + seen[7]} and seen[3] + seen[7] >= 6
    assert loader.errors["files"] >= 3
    said = capfd.readouterr().err
    for name in ("3.jpg: the image ends early", "7.jpg: the image ends early", "5.jpg: empty file"):
        assert said.count(name) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_scores_damaged_images_within_the_budget(workers, tmp_path, capfd):
    entries = jpegs(tmp_path, 20, cut=(3,), broken=(5, 6))

    def load_image(index):
        return Decodes()(entries[index])

    loader = EvalLoader(load_image, range(20), 5, collate, workers, error_budget=0.1)
    for _ in range(2):
        batches = list(loader)
        assert numbers(batches) == list(range(20))
        means = torch.cat([batch["noise"][:, 0] for batch in batches])
        assert means[5] == means[6] == 128 and means[3] > 30 and abs(means[4] - 40) < 1
        assert len(loader.unreadable) == 2 and loader.truncated == [entries[3]["image"]]
    said = capfd.readouterr().err
    assert "2 images unreadable, scored as grey images" in said and "5.jpg: empty file" in said
    with pytest.raises(UserError, match=r"2 images of 20 .*error budget(.|\n)*5.jpg: empty file"):
        list(EvalLoader(load_image, range(20), 5, collate, workers, error_budget=0.05))


def test_a_checkpoint_of_an_earlier_version_resumes_exactly():
    straight = StreamLoader(stream(records(30, bad=(4,))), 4, 0, seed=2, error_budget=0.5)
    take(straight, 3)
    state = straight.state_dict()
    for slot in state["slots"]:
        del slot["truncated"], slot["missing"]
    resumed = StreamLoader(
        stream(records(30, bad=(4,))), 4, 0, seed=2, error_budget=0.5, state=state
    )
    assert same(take(resumed, 9), take(straight, 9))
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("exif", [False, True])
def test_exif_reaches_the_loaders(exif, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "0.jpg", exif=tags)
    sizes = [[20.0, 40.0], [40.0, 20.0]][exif]

    def build(record):
        height, width = decode_image(tmp_path / "0.jpg").shape[1:]
        return {"number": 0, "noise": (float(height), float(width), 0.0)}

    trained = next(StreamLoader(Stream([RecordSource([{}], build)], collate, exif=exif), 1, 1))
    knobs = SimpleNamespace(workers=0, error_budget=0.125, exif=exif)
    loader = eval_loader(build, range(1), 1, collate, knobs, ALONE)
    assert loader.error_budget == 0.125
    (evaluated,) = loader
    assert trained["noise"][0, :2].tolist() == evaluated["noise"][0, :2].tolist() == sizes
