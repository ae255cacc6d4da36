"""The downstream scripts under torchrun: two processes finish, end with status 0, and answer as one
process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.downstream import ROOT, flags, log_lines, start


def torchrun(task: str, given: list[str]) -> str:
    """The output of the task's script on two processes, as a shell would start it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(ROOT / f"{task}.py"), *given]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (
        f"exit status {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    )
    return done.stdout


def results(out: Path) -> dict:
    metrics = json.loads((out / "result/metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name != "checkpoint"}


@pytest.mark.parametrize("task", ["VQA", "NLVR", "Grounding"])
def test_two_processes_train_evaluate_and_leave(digitscenes, tmp_path, task):
    """With loader workers and TensorBoard, whose threads and processes must not outlive the run."""
    more = ["--scheduler.epochs", "4 steps", "--workers", "1", "--tensorboard", "true"]
    torchrun(task, flags(task, digitscenes, tmp_path / "two", *more))
    assert [line["step"] for line in log_lines(tmp_path / "two") if "loss" in line] == [2, 4]
    assert (tmp_path / "two/result/report.html").exists()
    again = start(
        task, digitscenes, tmp_path / "one", "--evaluate", "--checkpoint", tmp_path / "two"
    )
    again.pop("checkpoint")
    assert again == results(tmp_path / "two")
