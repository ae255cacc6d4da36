"""A run that is killed between any two file operations ends, started again, with the very files of
the run that was not: newest and best checkpoint, log, exported weights, metrics, page."""

import json

import pytest

from tests.helpers import classification_runs, downstream
from tests.helpers.processes import Run

FEW = 29  # of the points, in the everyday suite
LIMIT = 1800  # seconds for all points

CASES = {
    # the best checkpoint is not the newest, and a numbered one is pruned
    "VE": ["--epochs", "3 steps", "--eval_every", "2 steps", "--save_every", "1 steps"],
    # every checkpoint may be the best, and only the newest is kept beside it
    "Classification": ["--epochs", "2 steps", "--eval_every", "1 steps", "--keep", "1"],
}


def command_line(script: str, data, folder) -> list[str]:
    if script == "VE":
        return downstream.flags("VE", data, folder, *CASES[script])
    return [*classification_runs.flags(data, folder), *CASES[script]]


def crash(script: str, every: int, folder, *flags: str) -> dict:
    run = Run("tests/helpers/crash_points.py", [script, every, folder, *flags])
    assert run.wait(LIMIT) == 0, run.said()[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", CASES)
@pytest.mark.parametrize("every", [FEW, pytest.param(1, marks=pytest.mark.slow)])
def test_every_crash_point_ends_as_the_run_that_was_not_killed(
    script, every, digitscenes, tmp_path
):
    folder = tmp_path / "run"
    found = crash(script, every, folder, *command_line(script, digitscenes, folder))
    assert found["failures"] == []
    assert found["points"] > 50 and found["tried"] >= found["points"] // every
    assert any("checkpoint_best" in name for name in found["names"])


@pytest.mark.slow
def test_every_crash_point_of_a_save_beside_the_training(tmp_path):
    found = crash("beside", 1, tmp_path / "run")
    assert found["failures"] == []
    assert found["tried"] == found["points"] > 40
    for name in ("rank_00000.pt", "index.pt", "checkpoint_00000004", "checkpoint_best", "rmtree"):
        assert any(name in point for point in found["names"]), name
    print(found["points"], "points")
