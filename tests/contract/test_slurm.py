"""On a real Slurm of two nodes: a run that was preempted and timed out ends with the weights of one
that was not."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from tests.contract.test_resume import assert_same_run
from tests.helpers.pretraining import ROOT, arguments, finish

FOUND = all(
    shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin")
    for tool in ("slurmctld", "slurmd", "munged")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOUND, reason="Slurm is not installed (apt-get install slurm-wlm munge)"
    ),
]

# Pretrain.py that waits after the steps of HOLD for the scheduler's signal, so that it is cut at
# known places
HELD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import Pretrain
from runtime.config.cli import run_script
from runtime.run import Run

holds = [int(step) for step in os.environ["HOLD"].split(",")] + [None]
hold, look = holds[min(int(os.environ.get("SLURM_RESTART_COUNT", 0)), len(holds) - 1)], Run.leave_if_interrupted

def look_later(self, step):
    while step == hold and self.interrupt.received is None:
        time.sleep(0.05)
    look(self, step)

Run.leave_if_interrupted = look_later
run_script(Pretrain.main, Pretrain.Config)
"""


@pytest.fixture(scope="module")
def slurm():
    """Environment in which sbatch and squeue speak to a cluster of our own, n1 and n2."""
    folder = tempfile.mkdtemp(
        prefix="slurm-"
    )  # short: it holds a socket, whose path is limited to 108 characters
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] // 3 * 3
    env = os.environ | {
        "LOCAL_SLURM_DIR": folder,
        "LOCAL_SLURM_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", str(ROOT / "scripts/dev/local_slurm.sh")]
    started = subprocess.run([*script, "start"], env=env, capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    yield env | {"SLURM_CONF": f"{folder}/slurm.conf"}
    subprocess.run([*script, "stop"], env=env, check=True, capture_output=True)
    shutil.rmtree(folder)


def submit(env, script, folder, *words, expect=0) -> str:
    """Submit `script` to two nodes, a process each; the job's number, or the message where it is
    refused."""
    launcher = [
        sys.executable,
        str(ROOT / "run_with_submitit.py"),
        str(script),
        "--nodes",
        "2",
        "--ngpus",
        "0",
    ]
    launcher += [
        "--timeout",
        "60",
        "--signal_delay",
        "100",
        "--job_dir",
        str(folder),
        *map(str, words),
    ]
    result = subprocess.run(launcher, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout.split()[1].rstrip(":") if expect == 0 else result.stderr


def state(env, job) -> str:
    command = ["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"]
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()


def logs(folder) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("slurm/*.out"))
    )


def wait_until(condition, folder, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{logs(folder)[-5000:]}"
        time.sleep(0.2)


def wait_for_end(env, job, folder) -> str:
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", ""}
    wait_until(lambda: state(env, job) in over, folder)
    return state(env, job)


def steps(folder) -> list[int]:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def preempt(env, seconds) -> str:
    """Submit a job of higher priority that wants all of both nodes; its number."""
    words = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    command = ["sbatch", *words, f"--wrap=sleep {seconds}"]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def set_time_limit(env, job, minutes):
    subprocess.run(
        ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], env=env, check=True
    )


@pytest.fixture(scope="module")
def flags(digitscenes, image_tokenizer):
    """Command-line flags of eight steps of Pretrain.py that write to a folder."""

    def of(folder, save_every=8):
        changes = {"workers": 1, "save_every": f"{save_every} steps", "scheduler.epochs": "8 steps"}
        return arguments(digitscenes, image_tokenizer, folder, **changes)

    return of


@pytest.fixture(scope="module")
def straight(slurm, flags, tmp_path_factory):
    """The folder of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("slurm") / "straight"
    job = submit(slurm, "Pretrain.py", folder, "--", *flags(folder))
    assert wait_for_end(slurm, job, folder) == "COMPLETED", logs(folder)
    assert "2 processes" in logs(folder), "the two tasks did not find each other"
    return folder


def test_preempted_and_timed_out_gives_the_weights_of_the_undisturbed_run(
    slurm, flags, straight, tmp_path
):
    cut, torchrun = tmp_path / "cut", tmp_path / "torchrun"
    (tmp_path / "held.py").write_text(HELD)
    job = submit(slurm | {"HOLD": "3,6"}, tmp_path / "held.py", cut, "--", *flags(cut))
    wait_until(lambda: 3 in steps(cut), cut)
    began = time.monotonic()
    preempt(slurm, 1)
    wait_until(lambda: 6 in steps(cut), cut)
    assert not (cut / "requeues.log").exists(), "a preempted job is requeued by Slurm, not by us"
    set_time_limit(slurm, job, int((time.monotonic() - began) / 60) + 2)
    wait_until((cut / "requeues.log").exists, cut)
    set_time_limit(slurm, job, 60)
    assert wait_for_end(slurm, job, cut) == "COMPLETED", logs(cut)
    said = logs(cut)
    assert (
        "DUE TO PREEMPTION" in said and "SIGTERM received" in said and "saved at step 3" in said
    ), said
    assert "SIGUSR1 received" in said and "saved at step 6" in said, said
    assert len((cut / "requeues.log").read_text().splitlines()) == 1
    finish(2, flags(torchrun))
    assert_same_run(cut, straight)
    assert_same_run(torchrun, straight)


def node(env, what, name):
    """Let a node fail, or repair it."""
    command = ["bash", str(ROOT / "scripts/dev/local_slurm.sh"), what, name]
    subprocess.run(command, env=env, check=True, capture_output=True)


def test_a_job_that_loses_a_node_resumes_to_the_weights_of_the_undisturbed_run(
    slurm, flags, straight, tmp_path
):
    cut = tmp_path / "cut"
    (tmp_path / "held.py").write_text(HELD)
    words = flags(cut, save_every=2)
    job = submit(slurm | {"HOLD": "3"}, tmp_path / "held.py", cut, "--", *words)
    wait_until(lambda: 3 in steps(cut), cut)
    node(slurm, "fail", "n2")
    try:
        wait_until(lambda: state(slurm, job) == "PENDING", cut)
    finally:
        node(slurm, "repair", "n2")
    assert wait_for_end(slurm, job, cut) == "COMPLETED", logs(cut)
    said = logs(cut)
    assert "from 2" in said and "saved at step 3" not in said, said
    assert not (cut / "requeues.log").exists(), "a job that lost a node is requeued by Slurm"
    assert_same_run(cut, straight)


# scripts/data/pack.py that waits at shard 4 when it runs first, and is killed at shard 1
HELD_PACK = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from runtime.config.cli import run_script
from scripts.data import pack

write = pack.pack_shard

def held(shard, config, state):
    if shard == 4 and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(600)
    if shard == 1 and os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(shard, config, state)

pack.pack_shard = held
run_script(pack.main, pack.Config)
"""


def submit_pack(env, folder, target) -> tuple[str, str]:
    """Submit seven shards in two tasks; the numbers of the array and of the merge."""
    words = ["--data", "pairs.json", "--target", target, "--samples_per_shard", "1"]
    words += ["--workers", "1", "--slurm", "2", "--cpus", "1", "--minutes", "60"]
    command = [sys.executable, "held.py", *words]
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    jobs = (folder / target / "slurm/job").read_text().strip().split(",")
    return jobs[0], jobs[1]


def test_an_array_resumes_where_a_task_was_cut_and_its_merge_refuses_what_is_missing(
    slurm, tmp_path
):
    from PIL import Image

    (tmp_path / "held.py").write_text(HELD_PACK)
    pairs = [{"image": f"{number}.png", "caption": str(number)} for number in range(7)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    for number in range(7):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    array, merge = submit_pack(slurm | {"KILLED": "yes"}, tmp_path, "out")
    marks = [out / f"{number:05d}_stats.json" for number in range(7)]
    wait_until(lambda: marks[3].exists() and state(slurm, f"{array}_0") == "FAILED", out)
    first = marks[3].stat().st_mtime_ns
    # the warning ahead of the time limit, to the task whose number is also that of the array
    subprocess.run(["scancel", "--signal=USR1", f"{array}_1"], env=slurm, check=True)
    assert wait_for_end(slurm, merge, out) == "FAILED", logs(out)
    said = (out / f"slurm/{merge}_0_log.out").read_text()
    assert "shards 1-2 of 0-6 are missing" in said, logs(out)
    said = (out / f"slurm/{array}_1_0_log.out").read_text()
    assert '"shards": 4, "kept": 1, "samples": 3' in said, logs(out)
    assert len((out / "slurm/requeues.log").read_text().splitlines()) == 1
    assert logs(out).count("Killed") == 1, "the task that failed was started again"
    assert marks[3].stat().st_mtime_ns == first, "a finished shard was made again"

    array, merge = submit_pack(slurm, tmp_path, "out")
    assert wait_for_end(slurm, merge, out) == "COMPLETED", logs(out)
    said = (out / f"slurm/{merge}_0_log.out").read_text()
    assert '{"shards": 7, "samples": 7, "failed": 0}' in said, logs(out)
    assert marks[3].stat().st_mtime_ns == first


def toy(folder, body) -> Path:
    """A script without torch, so that it starts at once."""
    path = folder / "toy.py"
    path.write_text(f"import os, signal, sys, time\n{textwrap.dedent(body)}")
    return path


def test_a_cancelled_job_stays_cancelled_and_a_second_one_is_refused(slurm, tmp_path):
    body = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("listening", flush=True)
    time.sleep(100)
    """
    folder = tmp_path / "run"
    job = submit(slurm, toy(tmp_path, body), folder)
    wait_until(lambda: logs(folder).count("listening") == 2, folder)
    refused = submit(slurm, tmp_path / "toy.py", folder, expect=2)
    assert f"job {job} is running" in refused and str(folder) in refused
    subprocess.run(["scancel", job], env=slurm, check=True)
    assert wait_for_end(slurm, job, folder) == "CANCELLED"
    time.sleep(3)
    assert state(slurm, job) == "CANCELLED" and not (folder / "requeues.log").exists()


def test_a_job_that_never_ends_is_requeued_a_limited_number_of_times(slurm, tmp_path):
    job = submit(slurm, toy(tmp_path, "sys.exit(75)"), tmp_path / "%j", "--max_requeues", 1)
    folder = tmp_path / job
    assert wait_for_end(slurm, job, folder) == "FAILED"
    assert (
        "requeued 1 times" in logs(folder)
        and len((folder / "requeues.log").read_text().splitlines()) == 1
    )


def test_signals_that_come_before_the_script_listens_lose_nothing(slurm, tmp_path):
    body = """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if restarts < 2:
        os.kill(os.getpid(), [signal.SIGUSR1, signal.SIGTERM][restarts])
        time.sleep(100)
    """
    job = submit(slurm, toy(tmp_path, body), tmp_path / "run")
    assert wait_for_end(slurm, job, tmp_path / "run") == "COMPLETED"
    assert len((tmp_path / "run/requeues.log").read_text().splitlines()) == 2


def test_a_queued_experiment_runs_the_commit_it_was_started_from(slurm, tmp_path):
    top = tmp_path / "repository"
    base = [f"base/{file.name}" for file in (ROOT / "base").glob("*.py")]
    for name in ["run.sh", "run_with_submitit.py", "runtime/slurm.py", *base]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, top / name)
    toy(top, "print('version', 1)")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "--all"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=top, check=True)
    env = slurm | {"PYTHON": sys.executable, "EXPERIMENTS": str(tmp_path / "experiments")}
    other = preempt(slurm, 300)  # keeps the nodes busy meanwhile
    words = [
        "run_with_submitit.py",
        "toy.py",
        "--name",
        "X",
        "--nodes",
        "2",
        "--ngpus",
        "0",
        "--timeout",
        "5",
    ]
    started = subprocess.run(
        ["bash", "run.sh", *words], cwd=top, env=env, capture_output=True, text=True
    )
    assert started.returncode == 0, started.stdout + started.stderr
    toy(top, "print('version', 2)")
    folder = tmp_path / "experiments/X/run"
    job = (folder / "slurm/job").read_text().strip()
    assert state(slurm, job) == "PENDING"
    subprocess.run(["scancel", other], env=slurm, check=True)
    assert wait_for_end(slurm, job, folder) == "COMPLETED"
    assert logs(folder).count("version 1") == 2 and "version 2" not in logs(folder)


def test_a_failure_stays_a_failure(slurm, tmp_path):
    job = submit(slurm, toy(tmp_path, "sys.exit(2)"), tmp_path / "run")
    assert wait_for_end(slurm, job, tmp_path / "run") == "FAILED"
    assert not (tmp_path / "run/requeues.log").exists()


def test_what_sbatch_refuses_is_one_clear_message(slurm, tmp_path):
    said = submit(slurm, toy(tmp_path, ""), tmp_path / "run", "--partition", "nowhere", expect=2)
    assert "sbatch refused" in said and "nowhere" in said and "Traceback" not in said
