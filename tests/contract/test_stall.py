"""A process that stalls or stops ends the run within a set time, and one line names it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from base.distributed import World, all_reduce
from runtime.watchdog import EXIT_STALLED, Watchdog, stall_message
from tests.helpers.processes import spawn

SECONDS = 1.5
CASES = {
    "in data loading": "rank 1 stalls waiting for data (last update 3, at test_stall.py:",
    "in the update": "rank 1 stalls in an update (last update 3, at test_stall.py:",
    "stopped": "rank 1 does not answer",
}


def loop(rank: int, case: str, messages: Path) -> None:
    """Ten updates, in the fourth of which rank 1 stalls. Validations and saves may take longer."""
    sys.stderr = messages.open("a")
    watchdog = Watchdog(World(rank, 2, rank, torch.device("cpu")), minutes=SECONDS / 60)
    time.sleep(2 * SECONDS)  # the first update may compile
    for step in range(10):
        watchdog.mark("waiting for data")
        if (case, rank, step) == ("in data loading", 1, 3):
            time.sleep(600)
        watchdog.mark("in an update")
        if (case, rank, step) == ("in the update", 1, 3):
            time.sleep(600)
        if (case, rank, step) == ("stopped", 1, 3):
            os.kill(os.getpid(), signal.SIGSTOP)
        all_reduce(torch.ones(1))
        watchdog.update(step + 1)
        if case == "a long validation" and step == 2:
            watchdog.pause()
            time.sleep(2 * SECONDS)
    watchdog.stop()


@pytest.mark.parametrize("case", CASES)
def test_the_rank_that_stalls_is_named(case, tmp_path):
    with pytest.raises(mp.ProcessExitedException) as ended:
        spawn(loop, 2, case, tmp_path / "stderr")
    assert ended.value.exit_code == EXIT_STALLED
    [line] = (tmp_path / "stderr").read_text().splitlines()
    assert f"after update 3: {CASES[case]}" in line and "rank 0" not in line


def test_long_validations_are_no_stall(tmp_path):
    spawn(loop, 2, "a long validation", tmp_path / "stderr")
    assert (tmp_path / "stderr").read_text() == ""


def test_who_is_behind_stalls():
    def answer(marks: int, waits: bool = True) -> dict:
        about = {"marks": marks, "step": marks // 3, "doing": "in an update", "place": "VE.py:7"}
        return {**about, "waits": waits}

    behind = stall_message({0: answer(12), 1: answer(11), 2: answer(12)}, 3, 60)
    assert "after update 4: rank 1 stalls in an update (last update 3, at VE.py:7)." in behind
    silent = stall_message({0: answer(12), 2: answer(11)}, 3, 60)
    assert "update 4: rank 1 does not answer." in silent
    busy = stall_message({0: answer(12, waits=False), 1: answer(12)}, 2, 60)
    assert "update 4: rank 0 stalls" in busy and "rank 1" not in busy
