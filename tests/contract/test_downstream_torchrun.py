"""The downstream scripts under torchrun: two processes finish, end with status 0, and answer as one
process does."""

import json
from pathlib import Path

import pytest

from tests.helpers.downstream import flags, start
from tests.helpers.processes import run_script
from tests.helpers.runs import log_lines


def results(out: Path) -> dict:
    metrics = json.loads((out / "result/metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name != "checkpoint"}


@pytest.mark.parametrize("task", ["VQA", pytest.param("NLVR", marks=pytest.mark.slow), "Grounding"])
def test_two_processes_train_evaluate_and_leave(digitscenes, tmp_path, task):
    """With loader workers and TensorBoard, whose threads and processes must not outlive the run."""
    more = ["--scheduler.epochs", "4 steps", "--workers", "1", "--tensorboard", "true"]
    said = run_script(f"{task}.py", flags(task, digitscenes, tmp_path / "two", *more), 2)
    assert "Warning" not in said, said  # ours, torch's or another library's
    assert [line["step"] for line in log_lines(tmp_path / "two") if "loss" in line] == [2, 4]
    assert (tmp_path / "two/result/report.html").exists()
    again = start(
        task, digitscenes, tmp_path / "one", "--evaluate", "--checkpoint", tmp_path / "two"
    )
    again.pop("checkpoint")
    assert again == results(tmp_path / "two")
