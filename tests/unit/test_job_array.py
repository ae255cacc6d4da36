"""Work on shards in ranges: processes of a machine, tasks of a Slurm array, and what is missing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base.errors import UserError
from base.processes import in_processes
from runtime import job_array
from runtime.job_array import Sharing, is_whole, need_all, own_range, submit_array
from tests.helpers.stand_in_slurm import lines, stand_in_slurm

ROOT = Path(__file__).resolve().parents[2]


def array_task(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


# ---- ranges
@pytest.mark.parametrize("count, tasks", [(0, 3), (2, 5), (7, 3), (70_000, 64)])
def test_ranges_cover_every_shard_once_and_evenly(count, tasks):
    ranges = [own_range(Sharing(range=f"{n}/{tasks}"), count) for n in range(tasks)]
    assert [number for each in ranges for number in each] == list(range(count))
    sizes = {len(each) for each in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_tasks_of_an_array_take_its_ranges(monkeypatch):
    assert is_whole(Sharing()) and own_range(Sharing(), 5) == range(5)
    array_task(monkeypatch, ID=7, MIN=3, MAX=9, STEP=2, COUNT=4)
    assert own_range(Sharing(), 8) == range(4, 6) and not is_whole(Sharing())
    assert own_range(Sharing(range="0/8"), 8) == range(1), "--range wins"
    assert is_whole(Sharing(merge=True)) and own_range(Sharing(merge=True), 8) == range(0)
    array_task(monkeypatch, MAX=11)
    with pytest.raises(UserError, match="has gaps"):
        own_range(Sharing(), 8)
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    with pytest.raises(UserError, match="COUNT is not set; name the range: --range"):
        own_range(Sharing(), 8)


@pytest.mark.parametrize("text", ["4/4", "x/4", "1", "-1/4", "1/"])
def test_a_wrong_range_is_refused(text):
    with pytest.raises(UserError, match=r"--range .*expected NUMBER/RANGES"):
        own_range(Sharing(range=text), 8)


def test_missing_ranges_are_named():
    need_all([True] * 3, "out", "shards")
    done = [True, False, False, True, False]
    with pytest.raises(UserError, match=r"^out: shards 1-2, 4 of 0-4 are missing"):
        need_all(done, "out", "shards")
    with pytest.raises(UserError, match="18 and 15 more ranges of 0-49"):
        need_all([bool(n % 2) for n in range(50)], "out", "shards")


# ---- processes
def double(number):
    return 2 * number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_processes_keep_the_order_and_a_killed_one_is_one_sentence():
    assert list(in_processes(double, range(9), 3)) == list(map(double, range(9)))
    with pytest.raises(UserError, match=r"a process was killed.*fewer --workers"):
        list(in_processes(die, range(9), 2))


ENDLESS = """
import multiprocessing, os, sys, time
sys.path.insert(0, sys.argv[1])
from base.processes import in_processes

def wait(number):
    open(f"{sys.argv[2]}/{number}", "w").write(f"{os.getpid()} {os.getppid()} ")
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[3])
    list(in_processes(wait, range(2), 2))
"""


def has_ended(pid: str) -> bool:
    """Whether a process is gone, or waits for nobody but its new parent to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def blocks(pid: str, number: int) -> bool:
    """Whether a process has a signal blocked."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the default before Python 3.14; since
def test_no_process_outlives_the_one_that_started_it(tmp_path, method):
    program = tmp_path / "endless.py"
    program.write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, program, str(ROOT), str(tmp_path), method])
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.read_text().endswith(" ") for file in files):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    pids, starters = zip(*(file.read_text().split() for file in files), strict=True)
    assert not blocks(str(parent.pid), signal.SIGUSR1)
    if method == "forkserver":
        assert blocks(starters[0], signal.SIGUSR1), "the scheduler's signal would end the server"
    parent.kill()
    parent.wait()
    while not all(has_ended(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- the array
@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/data/pack.py", "--data", "a b.csv", "--slurm", "4"])
    return stand_in_slurm(tmp_path / "bin", monkeypatch)


def test_an_array_and_its_merge_are_submitted(sbatch, tmp_path, capsys, monkeypatch):
    further = ["partition=cpu", "mem=2G", "dependency=afterok:7"]
    sharing = Sharing(slurm=4, cpus=3, minutes=7, sbatch=further)
    submit_array(sharing, 70_000, tmp_path / "out")
    options, command = lines(sbatch / "1.sh")
    assert {"--array=0-3%4", "--partition=cpu", "--mem=2G", "--time=7", "--requeue"} <= options
    assert {"--signal=USR1@60", "--dependency=afterok:7"} <= options
    assert not any(option.startswith(("--error", "--wckey")) for option in options)
    task = '"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"'
    assert f"requeue {task}\n" in (sbatch / "1.sh").read_text()
    assert f"squeue -h -j {task} " in (sbatch / "1.sh").read_text()
    assert 'scontrol requeue "$SLURM_JOB_ID"' in (sbatch / "2.sh").read_text()
    assert "--cpus-per-task=3" in options and "--cpus-per-task=3" in command
    words = [str(Path("scripts/data/pack.py").absolute()), "--data", "a b.csv", "--slurm", "4"]
    assert command[command.index(sys.executable) + 2 :] == [*words, "--slurm", "0"]
    options, command = lines(sbatch / "2.sh")
    assert "--dependency=afterany:101" in options
    assert not any(option.startswith("--array") for option in options)
    assert command[-3:] == ["--slurm", "0", "--merge"]
    said = capsys.readouterr().out
    assert "job 101: pack.py in 4 tasks; job 102 merges them" in said
    (sbatch / "running").write_text("RUNNING\n")
    with pytest.raises(UserError, match="job 101,102 is running"):
        submit_array(sharing, 70_000, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    submit_array(Sharing(slurm=4, sbatch=["array=0-1%1"]), 2, Path("few"))
    logs = f"--output={tmp_path}/few/slurm"
    assert {f"{logs}/%A_%a_0_log.out", "--array=0-1%1"} <= lines(sbatch / "3.sh")[0]
    assert f">> {tmp_path}/few/slurm/requeues.log" in (sbatch / "3.sh").read_text()
    merge = lines(sbatch / "4.sh")[0]
    assert "--dependency=afterany:103" in merge and "--array=0-1%1" not in merge
    for count, tasks in ((2, "--array=0-1%2"), (0, "--array=0-0%1")):
        submit_array(Sharing(slurm=4), count, tmp_path / f"{count}")
        number = len(list(sbatch.glob("*.sh"))) - 1  # the merge is the last
        assert tasks in lines(sbatch / f"{number}.sh")[0], "no task without a shard"


def test_a_refused_job_is_named_once_and_what_is_in_the_queue_is_said(sbatch, tmp_path, capsys):
    refuse = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    real = (sbatch / "sbatch").read_text()
    (sbatch / "sbatch").write_text(f"#!/bin/bash\n{refuse}\n")
    with pytest.raises(UserError, match=r"^sbatch refused the job: .*SubmitJobPerUserLimit$"):
        submit_array(Sharing(slurm=4), 9, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (sbatch / "sbatch").write_text(f"{real}[ $n = 1 ] || {{ {refuse}; }}\n")  # room for one
    with pytest.raises(UserError, match=r"^job 101 is submitted, but not .*Limit; .* with --merge"):
        submit_array(Sharing(slurm=4), 9, tmp_path / "out")
    assert len(list((tmp_path / "out/slurm").glob(".submission_file_*.sh"))) == 1, "of job 101"
    assert capsys.readouterr().err == ""
    (sbatch / "running").write_text("PENDING\n")
    with pytest.raises(UserError, match=r"job 101 is pending and writes there.*another folder"):
        submit_array(Sharing(slurm=4), 9, tmp_path / "out")


def test_where_an_array_cannot_be_submitted_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(job_array, "has_slurm", lambda: False)
    with pytest.raises(UserError, match=r"not on this machine.*--range 0/4 to 3/4"):
        submit_array(Sharing(slurm=4), 9, tmp_path)
    monkeypatch.setattr(job_array, "has_slurm", lambda: True)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="use python instead of torchrun"):
        submit_array(Sharing(slurm=4), 9, tmp_path)
    for other in ({"merge": True}, {"range": "0/4"}):
        with pytest.raises(UserError, match="leave out --range and --merge"):
            submit_array(Sharing(slurm=4, **other), 9, tmp_path)
