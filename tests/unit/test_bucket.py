"""Runs in buckets, with fsspec's file system in memory: what is committed, fetched, refused, and what
happens where a bucket fails or stalls."""

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from base.errors import UserError
from runtime import bucket
from runtime.bucket import (
    COMMITTED,
    LEASE,
    Bucket,
    Lease,
    bucket_url,
    fetch_run,
    files_in,
    output_in_bucket,
)

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """The objects of an empty bucket."""
    monkeypatch.setattr(bucket, "SCHEMES", ["memory"])
    monkeypatch.setattr(bucket, "PULSE", 0.2)
    files = fsspec.filesystem("memory")
    files.store.clear()
    before = set(threading.enumerate())
    yield files.store
    for thread in set(threading.enumerate()) - before:  # none writes to the next test's bucket
        thread.join(10)
        assert not thread.is_alive(), thread.name
    files.store.clear()


def options(tmp_path: Path, **changes) -> SimpleNamespace:
    values = {"output_dir": Path(URL), "scratch": tmp_path, "bucket_seconds": 0.1}
    return SimpleNamespace(**{**values, "bucket_patience": 5.0, **changes})


def names(store) -> set[str]:
    return {name.removeprefix("/bucket/run/") for name in store}


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_which_folders_are_buckets(monkeypatch):
    monkeypatch.undo()
    assert bucket_url(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert bucket_url(Path("gs://bucket/run/")) == "gs://bucket/run"
    assert bucket_url(Path("output/s3")) is None and bucket_url(Path("/s3:/x")) is None
    assert bucket_url(Path("https://host/run")) is None


def test_a_run_is_brought_and_fetched_on_a_fresh_machine(tmp_path, store):
    config = options(tmp_path / "one")
    with output_in_bucket(config, "0"):
        folder = config.output_dir
        assert folder == tmp_path / "one/memory/bucket/run"
        write(folder, log__jsonl="1", checkpoint_00000001__pt="first", _lock="")
        write(folder, checkpoint_00000002_in_index__pt="i", checkpoint_00000002_in_rank__pt="r")
        (folder / ".checkpoint_00000003.writing").mkdir()
        (folder / ".checkpoint_00000003.writing/rank.pt").write_text("half")
        (folder / "checkpoint_best").symlink_to("checkpoint_00000002")
        until(lambda: f"/bucket/run/{COMMITTED}" in store)
        assert LEASE in names(store)
        (folder / "checkpoint_00000001.pt").unlink()  # pruned
        write(folder, log__jsonl="1 2")
    kept = {"log.jsonl", "checkpoint_00000002/index.pt", "checkpoint_00000002/rank.pt", "_lock"}
    assert names(store) == {*kept, COMMITTED}  # the lease is given back
    store["/bucket/run/checkpoint_00000009.pt"] = store["/bucket/run/log.jsonl"]  # not committed
    fresh = options(tmp_path / "two")
    with output_in_bucket(fresh, "0"):
        found = fresh.output_dir
        assert set(files_in(found)) == kept
        assert (found / "log.jsonl").read_text() == "1 2"
        assert os.readlink(found / "checkpoint_best") == "checkpoint_00000002"


def test_checkpoints_are_brought_before_the_log_and_the_list_last(tmp_path, monkeypatch):
    made = []
    put, pipe = Bucket("memory://x").files.put_file, Bucket.write
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(
        memory, "put_file", lambda _, a, b, **more: made.append(b) or put(a, b, **more)
    )
    monkeypatch.setattr(Bucket, "write", lambda *a: made.append(a[1]) or pipe(*a))
    config = options(tmp_path)
    with output_in_bucket(config, "0"):
        write(config.output_dir, config__yaml="c", log__jsonl="l", checkpoint_00000001__pt="p")
    found = [name.rpartition("/")[2] for name in made if name != LEASE]
    assert found == ["checkpoint_00000001.pt", "config.yaml", "log.jsonl", COMMITTED]


def test_checkpoints_that_are_in_the_bucket_are_not_brought_again(tmp_path, monkeypatch):
    first = options(tmp_path / "one")
    with output_in_bucket(first, "0"):
        write(first.output_dir, checkpoint_00000001__pt="p", log__jsonl="1")
    made = []
    memory = type(fsspec.filesystem("memory"))
    put = memory.put_file
    monkeypatch.setattr(
        memory, "put_file", lambda self, a, b, **more: made.append(b) or put(self, a, b, **more)
    )
    for place in ("one", "two"):  # where it was made, and a fresh machine
        config = options(tmp_path / place)
        with output_in_bucket(config, "0"):
            write(config.output_dir, log__jsonl=place)
    assert {name.rpartition("/")[2] for name in made} == {"log.jsonl"}


@pytest.mark.parametrize("listing", ["allowed", "forbidden", "fails once"])
def test_a_resumed_run_removes_checkpoints_that_do_not_count(tmp_path, store, listing, monkeypatch):
    """Of a run that was killed before it could commit them; nothing else, and no later ones."""
    first = options(tmp_path / "one")
    with output_in_bucket(first, "0"):
        write(first.output_dir, checkpoint_00000002__pt="p", log__jsonl="1")
    killed = ["checkpoint_00000003/rank0", "checkpoint_00000004/rank0", "checkpoint_00000009.pt"]
    others = ["notes.txt", "second/checkpoint_00000001.pt", "second/.lease.json", "checkpoints.md"]
    for name in [*killed, "checkpoint_00000004.pt", *others]:
        fsspec.filesystem("memory").pipe_file(f"/bucket/run/{name}", b"x")
    fsspec.filesystem("memory").pipe_file("/bucket/run2/checkpoint_00000001.pt", b"x")
    if listing == "forbidden":
        monkeypatch.setattr(type(Bucket(URL).files), "find", lambda *_: 1 / 0)
        monkeypatch.setattr(bucket, "is_forbidden", lambda error: True)
    if listing == "fails once":
        kind = type(Bucket(URL).files)
        answers = iter([lambda *_: 1 / 0])
        find = kind.find
        monkeypatch.setattr(kind, "find", lambda *given: next(answers, find)(*given))
    config = options(tmp_path / "two")
    with output_in_bucket(config, "0"):
        write(config.output_dir, log__jsonl="12", checkpoint_00000003__pt="three")
        until(lambda: Bucket(URL).read(COMMITTED)["files"].get("checkpoint_00000003.pt"))
        write(config.output_dir, log__jsonl="124", checkpoint_00000004__pt="four")
    own = {"checkpoint_00000002.pt", "checkpoint_00000003.pt", "checkpoint_00000004.pt"}
    left = set(killed) if listing == "forbidden" else {"checkpoint_00000009.pt"}
    expected = own | {"log.jsonl", COMMITTED} | set(others) | left
    assert names(store) == expected | {"/bucket/run2/checkpoint_00000001.pt"}
    assert store["/bucket/run/checkpoint_00000004.pt"].getvalue() == b"four"


def test_checkpoints_where_no_run_has_committed_stay(tmp_path, store):
    """They were put there by hand, or by something else."""
    fsspec.filesystem("memory").pipe_file("/bucket/run/checkpoint_00000001.pt", b"x")
    config = options(tmp_path)
    with output_in_bucket(config, "0"):
        write(config.output_dir, checkpoint_00000002__pt="two")
    assert names(store) == {"checkpoint_00000001.pt", "checkpoint_00000002.pt", COMMITTED}


def test_what_another_run_brings_is_not_removed(tmp_path, store):
    """It has taken the lease since this one looked last."""
    own = Bucket(URL)
    lease = Lease(own)
    own.write(LEASE, lease_of())
    own.files.pipe_file(own.path("checkpoint_00000001.pt"), b"x")
    uploader = SimpleNamespace(
        bucket=own, lease=lease, strays=None, _doing=lambda _: contextlib.nullcontext()
    )
    with pytest.raises(UserError, match="another run writes there"):
        bucket.Uploader._remove_strays(uploader, {"checkpoint_00000002.pt": 1})
    assert "checkpoint_00000001.pt" in names(store)


@pytest.mark.parametrize(("here", "fetches"), [(None, True), (1, True), (2, False), (3, False)])
def test_the_side_that_is_ahead_counts(tmp_path, here, fetches):
    there = options(tmp_path / "there")
    with output_in_bucket(there, "0"):
        write(there.output_dir, checkpoint_00000002__pt="bucket")
    folder = tmp_path / "run"
    if here:
        write(folder, **{f"checkpoint_0000000{here}__pt": "here"})
    fetch_run(Bucket(URL), folder)
    texts = {path.read_text() for path in folder.glob("*.pt")}
    assert texts == ({"bucket"} if fetches else {"here"})
    aside = list(tmp_path.glob("run.superseded-*/checkpoint_00000001.pt"))
    assert len(aside) == (here == 1)


@pytest.mark.parametrize("here", [1, None])
def test_a_bucket_that_vanishes_while_it_is_read_costs_nothing_here(tmp_path, store, here, capsys):
    """What the folder has is used; where it has nothing, the training does not begin from scratch."""
    there = options(tmp_path / "there")
    with output_in_bucket(there, "0"):
        write(there.output_dir, checkpoint_00000002__pt="bucket", log__jsonl="2")
    for name in ("checkpoint_00000002.pt", "log.jsonl"):
        del store[f"/bucket/run/{name}"]
    folder = tmp_path / "run"
    if here:
        write(folder, checkpoint_00000001__pt="here", log__jsonl="1")
        fetch_run(Bucket(URL), folder)
        assert (folder / "checkpoint_00000001.pt").read_text() == "here"
    else:
        with pytest.raises(UserError, match="no checkpoint is there of those"):
            fetch_run(Bucket(URL), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"] * bool(here) + ["there"]
    assert "lacks checkpoint_00000002.pt" in capsys.readouterr().err


def test_a_name_outside_of_the_run_is_refused(tmp_path):
    Bucket(URL).write(COMMITTED, {"files": {"checkpoint_1/../../../x": 1}, "links": {}})
    with pytest.raises(UserError, match=r"\.committed\.json names"):
        fetch_run(Bucket(URL), tmp_path / "a/run")
    assert not (tmp_path / "x").exists()


def lease_of(**changes) -> dict:
    own = {"id": "other", "host": socket.gethostname(), "pid": os.getpid(), "beats": 1}
    return {**own, "started": bucket.started(os.getpid()), **changes}


@pytest.mark.parametrize("case", ["this machine", "another machine"])
def test_a_second_run_is_refused(tmp_path, case):
    changes = {"host": "elsewhere"} if case == "another machine" else {}
    other, beats = Bucket(URL), iter(range(2, 1000))
    other.write(LEASE, lease_of(**changes))
    ended = threading.Event()

    def alive() -> None:
        while not ended.wait(0.05):
            other.write(LEASE, lease_of(beats=next(beats), **changes))

    thread = threading.Thread(target=alive)
    thread.start()
    try:
        with pytest.raises(UserError) as error, output_in_bucket(options(tmp_path), "0"):
            raise AssertionError("trained")
    finally:
        ended.set()
        thread.join()
    message = str(error.value)
    assert "another run writes there" in message and "--output_dir" in message
    assert "\n" not in message and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("changes", [{"started": "1"}, {"pid": 2**22 + 1}, {"host": "elsewhere"}])
def test_the_lease_of_a_dead_run_is_taken_over(tmp_path, changes, store):
    Bucket(URL).write(LEASE, lease_of(**changes))
    with output_in_bucket(options(tmp_path), "0"):
        assert Bucket(URL).read(LEASE)["id"] != "other"
    assert LEASE not in names(store)


def test_a_run_whose_lease_was_taken_writes_no_more(tmp_path, store, capsys):
    config = options(tmp_path, bucket_patience=0.5)
    with pytest.raises(SystemExit) as ended, output_in_bucket(config, "0"):
        Bucket(URL).write(LEASE, lease_of())
        time.sleep(0.6)
        write(config.output_dir, log__jsonl="mine")
    assert ended.value.code == bucket.EXIT_NOT_WRITTEN
    assert names(store) <= {LEASE, COMMITTED}
    assert "another run has taken the bucket" in capsys.readouterr().err


def test_a_dead_run_is_watched_where_no_process_tells_when_it_began(monkeypatch):
    """On macOS every lease that was not given back refused all later runs."""
    monkeypatch.setattr(bucket, "started", lambda _: None)
    Bucket(URL).write(LEASE, lease_of(pid=2**22 + 1))
    Lease(Bucket(URL)).take()


def test_a_lease_that_another_run_took_stays_its_own():
    lease = Lease(Bucket(URL))
    lease.take()
    Bucket(URL).write(LEASE, lease_of())
    with pytest.raises(UserError, match="another run writes there"):
        lease.give_back()
    assert Bucket(URL).read(LEASE)["id"] == "other"


def test_a_lease_that_was_given_back_is_not_written_again():
    lease = Lease(Bucket(URL))
    lease.take()
    lease.give_back()
    lease.renew()  # of a thread that has waited meanwhile
    assert Bucket(URL).read(LEASE) is None


REFUSED = PermissionError("Forbidden: s3:PutObject is not allowed")


def test_a_bucket_that_refuses_is_one_sentence_before_anything(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise REFUSED

    monkeypatch.setattr(type(Bucket(URL).files), "pipe_file", refuse)
    with pytest.raises(UserError) as error, output_in_bucket(options(tmp_path), "0"):
        raise AssertionError("trained")
    assert str(error.value).startswith(f"{URL}: cannot be written to (PermissionError: Forbidden")
    assert "--output_dir" in str(error.value) and "\n" not in str(error.value)


def test_a_bucket_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(bucket, "ANSWER", 0.2)
    monkeypatch.setattr(bucket, "PULSE", 0.1)
    monkeypatch.setattr(type(Bucket(URL).files), "cat_file", lambda *a, **k: answer.wait())
    with (
        pytest.raises(UserError, match="no answer for 0") as error,
        output_in_bucket(options(tmp_path), "0"),
    ):
        raise AssertionError("trained")
    assert "--output_dir" in str(error.value) and "\n" not in str(error.value)
    answer.set()


@pytest.mark.parametrize("trouble", ["stalls", "refuses"])
def test_a_bucket_in_trouble_is_reported_and_costs_the_training_nothing(
    tmp_path, monkeypatch, capsys, store, trouble
):
    answer, threads = threading.Event(), threading.active_count()
    really = Bucket(URL).files.put_file

    def put(_, *args, **more):
        if trouble == "refuses":
            raise REFUSED
        answer.wait()
        really(*args, **more)

    monkeypatch.setattr(bucket, "REPORT", 0.2)
    monkeypatch.setattr(type(Bucket(URL).files), "put_file", put)
    config = options(tmp_path, bucket_patience=0.5)
    with pytest.raises(SystemExit) as ended, output_in_bucket(config, "0"):
        begin = time.monotonic()
        write(config.output_dir, log__jsonl="1", checkpoint_00000001__pt="p")
        assert time.monotonic() - begin < 0.5
        until(lambda: "warning" in capsys.readouterr().err)
    answer.set()
    said = capsys.readouterr().err
    assert ended.value.code == bucket.EXIT_NOT_WRITTEN
    assert "not written to memory://bucket/run: checkpoint_00000001.pt, log.jsonl" in said
    assert str(config.output_dir) in said and (config.output_dir / "log.jsonl").exists()
    until(lambda: threading.active_count() == threads)
    begun = {"checkpoint_00000001.pt"} if trouble == "stalls" else set()
    assert names(store) == {LEASE} | begun  # after the message nothing more is written


def test_trouble_that_passes_loses_nothing(tmp_path, monkeypatch, store):
    put, left = Bucket(URL).files.put_file, [3]

    def flaky(_, *args, **more):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("reset")
        put(*args, **more)

    monkeypatch.setattr(type(Bucket(URL).files), "put_file", flaky)
    config = options(tmp_path, bucket_patience=60.0)
    with output_in_bucket(config, "0"):
        write(config.output_dir, log__jsonl="1")
    assert names(store) == {"log.jsonl", COMMITTED}


def test_the_status_of_a_run_that_asks_for_a_requeue_stays(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_options):
        raise REFUSED

    monkeypatch.setattr(type(Bucket(URL).files), "put_file", refuse)
    config = options(tmp_path, bucket_patience=0.2)
    with pytest.raises(SystemExit) as ended, output_in_bucket(config, "0"):
        write(config.output_dir, log__jsonl="1")
        raise SystemExit(75)
    assert ended.value.code == 75 and "not written to" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "SCHEMES", ["gs"])
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    config = options(tmp_path, output_dir=Path("gs://bucket/run"))
    needs = "needs the package gcsfs; pip install gcsfs"
    with pytest.raises(UserError, match=needs), output_in_bucket(config, "0"):
        raise AssertionError("trained")
