"""`--output_dir s3://…` against moto's S3: killed, its machine lost, and resumed from the bucket, a run
ends as the one that was not."""

import json
import shutil
import signal
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch

from runtime.bucket import COMMITTED, EXIT_NOT_WRITTEN, newest_step
from runtime.checkpoint import find_damage
from runtime.sharded import OwnParts, weights_in
from tests.helpers.pretraining import arguments
from tests.helpers.processes import Run, run_script
from tests.helpers.runs import lines

URL = "s3://runs/simla"
STEPS = 24
CASES = {"single": ("single", 1), "sharded, 2 processes": ("sharded", 2)}
pytestmark = pytest.mark.slow


def final(folder, kind) -> dict:
    """Weights, and what each process kept for itself, after the last update."""
    if kind == "single":
        content = torch.load(folder / f"checkpoint_{STEPS:08d}.pt", weights_only=True)
        return {"weights": content["model"], "own": content["per_rank"]}
    path = folder / f"checkpoint_{STEPS:08d}"
    assert find_damage(path) is None
    return {"weights": dict(weights_in(path)), "own": list(OwnParts(sorted(path.glob("rank*"))))}


def committed(files) -> int:
    """Step of the newest checkpoint that counts in the bucket."""
    name = f"runs/simla/{COMMITTED}"
    return newest_step(json.loads(files.cat(name))["files"]) if files.exists(name) else -1


@pytest.mark.parametrize("case", CASES)
def test_a_run_survives_its_machine(case, s3, digitscenes, image_tokenizer, tmp_path):
    import s3fs

    kind, processes = CASES[case]
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if files.exists("runs"):
        files.rm("runs", recursive=True)
    files.mkdir("runs")
    changes = {"save_every": "1 steps", "scheduler.epochs": f"{STEPS} steps", "log_every": 1}
    changes |= {"checkpoint_format": kind, "bucket_seconds": 0.1}
    straight = tmp_path / "straight"
    flags = arguments(digitscenes, image_tokenizer, straight, **changes)
    run_script("Pretrain.py", flags, processes)

    def there(scratch) -> list[str]:
        more = {"scratch": tmp_path / scratch, "output_dir": URL}
        return arguments(digitscenes, image_tokenizer, straight, **changes, **more)

    process = Run("Pretrain.py", there("one"), processes)
    deadline = time.monotonic() + 240
    while committed(files) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.said()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = committed(files)
    shutil.rmtree(tmp_path / "one")
    files.pipe_file("runs/simla/checkpoint_00000004.part/rank0", b"")  # no checkpoint's name
    files.pipe_file("runs/simla/checkpoint_00000000/rank0", b"brought, and not committed")
    said = run_script("Pretrain.py", there("two"), processes)
    folder = tmp_path / "two/s3/runs/simla"
    assert f"resuming {folder} at step {before}" in said and "DAMAGED" not in said
    assert lines(folder) == lines(straight)
    for part, expected in final(straight, kind).items():
        assert same(final(folder, kind)[part], expected), part
    assert committed(files) == STEPS
    assert files.cat("runs/simla/log.jsonl") == (folder / "log.jsonl").read_bytes()
    assert not files.exists("runs/simla/.lease.json")
    counted = json.loads(files.cat(f"runs/simla/{COMMITTED}"))["files"]
    others = {
        name.removeprefix("runs/simla/") for name in files.find("runs/simla")
    } - counted.keys()
    assert others == {COMMITTED, "checkpoint_00000004.part/rank0"}


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[k], expected[k]) for k in expected
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


class Refusing(BaseHTTPRequestHandler):
    """Answers everything with 403, or after `server.stalls` not at all."""

    def log_message(self, *args):
        pass

    def answer(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer


def test_a_bucket_that_refuses_is_one_sentence(
    s3, digitscenes, image_tokenizer, tmp_path, monkeypatch
):
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    flags = arguments(
        digitscenes, image_tokenizer, tmp_path, output_dir=URL, scratch=tmp_path / "s"
    )
    said = run_script("Pretrain.py", flags, expect=2)
    server.shutdown()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and URL in errors[0] and "Forbidden" in errors[0], said
    assert "Traceback" not in said and not list(tmp_path.glob("s/**/*.jsonl"))


def test_a_bucket_that_is_gone_is_reported_at_the_end(
    s3, digitscenes, image_tokenizer, tmp_path, monkeypatch
):
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files.mkdir("gone")
    changes = {"output_dir": "s3://gone/run", "scratch": tmp_path / "s", "save_every": "1 steps"}
    changes |= {"bucket_seconds": 0.1, "bucket_patience": 1, "scheduler.epochs": "12 steps"}
    process = Run("Pretrain.py", arguments(digitscenes, image_tokenizer, tmp_path, **changes))
    while not files.exists("gone/run/.lease.json"):
        assert process.poll() is None, process.said()[-2000:]
        time.sleep(0.05)
    files.rm("gone", recursive=True)
    assert process.wait() == EXIT_NOT_WRITTEN, process.said()[-2000:]
    said = process.said()
    assert "error: not written to s3://gone/run: checkpoint_" in said and "Traceback" not in said
    assert (tmp_path / "s/s3/gone/run/checkpoint_00000012.pt").exists()


def bucket_of(name: str, digitscenes, image_tokenizer, folder, **changes) -> list[str]:
    """Flags of a run into a bucket, which does not end by itself."""
    changes = {"save_every": "1 steps", "scheduler.epochs": "100000 steps", **changes}
    changes |= {"output_dir": f"s3://{name}/run", "scratch": folder / "scratch"}
    return arguments(digitscenes, image_tokenizer, folder, **changes, bucket_seconds=0.1)


def wait_for_commit(files, name: str, process: Run) -> None:
    """Until something counts in the bucket."""
    deadline = time.monotonic() + 240
    while not files.exists(f"{name}/run/{COMMITTED}"):
        assert process.poll() is None and time.monotonic() < deadline, process.said()[-2000:]
        time.sleep(0.05)


def test_two_runs_into_one_bucket(s3, digitscenes, image_tokenizer, tmp_path):
    """The second is one sentence, wherever its scratch folder is; the first one is left alone."""
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files.mkdir("twice")
    first = Run("Pretrain.py", bucket_of("twice", digitscenes, image_tokenizer, tmp_path / "a"))
    wait_for_commit(files, "twice", first)
    flags = bucket_of("twice", digitscenes, image_tokenizer, tmp_path / "b")
    said = run_script("Pretrain.py", flags, expect=2)
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "s3://twice/run: another run writes there" in error and "Traceback" not in said
    assert not list(tmp_path.glob("b/**/*.jsonl"))
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.said()[-2000:]
    assert "not written" not in first.said() and not files.exists("twice/run/.lease.json")


def test_a_bucket_that_stalls_is_one_sentence(digitscenes, image_tokenizer, tmp_path, monkeypatch):
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("QUINTET_REMOTE_SILENCE", "1")
        flags = bucket_of("silent", digitscenes, image_tokenizer, tmp_path)
        said = run_script("Pretrain.py", flags, expect=2)
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "s3://silent/run: cannot be written to" in error and "imeout" in error, error
    assert "Traceback" not in said


def test_a_bucket_that_stalls_later_keeps_nobody_waiting(
    s3, digitscenes, image_tokenizer, tmp_path, monkeypatch
):
    import s3fs

    monkeypatch.setenv("QUINTET_REMOTE_SILENCE", "1")
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files.mkdir("stalls")
    flags = bucket_of("stalls", digitscenes, image_tokenizer, tmp_path, bucket_patience=1)
    process = Run("Pretrain.py", flags)
    wait_for_commit(files, "stalls", process)
    s3.send_signal(signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75, process.said()[-2000:]
    finally:
        s3.send_signal(signal.SIGCONT)
    said = process.said()
    assert "error: not written to s3://stalls/run: " in said and "Traceback" not in said
    assert "start the same command again here, or copy it there" in said
