"""A process that stalls or stops ends the run within a set time, and one line names it."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import default_collate

from base.distributed import World, all_reduce, gather
from base.flight_recorder import FOLDER
from dataset.loading.eval import EvalLoader
from runtime.config.cli import run_script
from runtime.hashed import _HashingFile
from runtime.options import RunConfig
from runtime.watchdog import EXIT_STALLED, Watchdog, compiling, stall_message
from tests.helpers.processes import spawn

SECONDS = 1.5
CASES = {
    "in data loading": "rank 1 stalls waiting for data (last update 3, at test_stall.py:",
    "in the update": "rank 1 stalls in an update (last update 3, at test_stall.py:",
    "stopped": "rank 1 does not answer",
    "in validation": "rank 1 stalls in validation (last update 3, at test_stall.py:",
    "saving": "rank 1 stalls saving a checkpoint (last update 3, at test_stall.py:",
}
SLOW = ("stopped", "in the update", "saving", "a long compilation", "a long save")


def marked(cases):
    return [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in cases]


def loop(rank: int, case: str, messages: Path) -> None:
    """Ten updates of two collectives each, in or after the fourth of which rank 1 stalls."""
    sys.stderr = messages.open("a")
    watchdog = Watchdog(
        World(rank, 2, rank, torch.device("cpu")), minutes=SECONDS / 60, folder=messages.parent
    )
    if case.startswith("a long"):
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
        if (case, rank, step) == ("a long compilation", 1, 3):
            compile_slowly()
        gather(torch.ones(1))
        if (case, rank, step) == ("in the middle of the update", 1, 3):
            time.sleep(600)
        all_reduce(torch.ones(1))
        watchdog.update(step + 1)
        if step == 2:
            watchdog.mark("in validation")
            validate(rank, case)
            watchdog.mark("saving a checkpoint")
            save(rank, case)
            all_reduce(torch.ones(1))
    watchdog.stop()


def validate(rank: int, case: str) -> None:
    """Six batches of rank 1, one of rank 0, which then waits for the other."""

    def load(i: int) -> int:
        if (case, rank, i) == ("in validation", 1, 4):
            time.sleep(600)
        if case == "a long validation" and rank == 1:
            time.sleep(SECONDS / 2)
        return i

    for _ in EvalLoader(load, range(1 + 5 * rank), 1, default_collate, workers=0):
        pass


def compile_slowly() -> None:
    """Takes twice the limit, as for a batch of another shape."""

    def backend(graph: torch.fx.GraphModule, inputs: list):
        assert compiling()
        time.sleep(2 * SECONDS)
        return graph.forward

    torch.compile(torch.sin, backend=backend)(torch.ones(1))
    assert not compiling()


class SlowFile:
    """A disk that needs twice the limit for a checkpoint, or never gets done."""

    def __init__(self, case: str):
        self.case = case

    def write(self, data) -> int:
        time.sleep(600 if self.case == "saving" else SECONDS / 2)
        return len(data)


def save(rank: int, case: str) -> None:
    """Rank 1 writes and the other waits for it."""
    if rank == 1 and case in ("saving", "a long save"):
        file = _HashingFile(SlowFile(case))
        for _ in range(5):
            file.write(b"0")


@pytest.mark.parametrize("case", marked(CASES))
def test_the_rank_that_stalls_is_named(case, tmp_path):
    with pytest.raises(mp.ProcessExitedException) as ended:
        spawn(loop, 2, case, tmp_path / "stderr")
    assert ended.value.exit_code == EXIT_STALLED
    [line] = (tmp_path / "stderr").read_text().splitlines()
    assert f"after update 3: {CASES[case]}" in line and "rank 0" not in line


MIDDLE = r"at test_stall\.py:\d+, after all_gather \d+\); the others wait in all_reduce \d+\. Start"


@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_collectives_are_named(recorded, tmp_path, monkeypatch):
    """By torch's flight recorder, or without it by our own record."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000" if recorded else "0")
    with pytest.raises(mp.ProcessExitedException):
        spawn(loop, 2, "in the middle of the update", tmp_path / "stderr")
    [line] = (tmp_path / "stderr").read_text().splitlines()
    assert re.search(MIDDLE, line), line
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"rank_0", "rank_1"}


@pytest.mark.parametrize("case", marked(["a long validation", "a long compilation", "a long save"]))
def test_long_work_that_gets_on_is_no_stall(case, tmp_path):
    spawn(loop, 2, case, tmp_path / "stderr")
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize(("torch_version", "old_names"), [("2.7.1", True), ("2.14.0+cu130", False)])
def test_the_recorder_is_on_before_a_script_begins(monkeypatch, tmp_path, torch_version, old_names):
    """What the user has set stays; the old names are for versions that do not warn of them."""
    monkeypatch.setattr("base.flight_recorder.version", lambda _: torch_version)
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    names += ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    seen = []

    def main(config):
        seen.extend(os.environ.get(name) for name in names)

    run_script(main, RunConfig, argv=["--output_dir", str(tmp_path)])
    prefix = str(tmp_path / FOLDER / "rank_")
    old = ["7", prefix] if old_names else [None, None]
    assert seen == ["7", prefix, *old, "1"]


def test_who_is_behind_stalls():
    def answer(marks: int, waits: bool = True, entered: int = 5) -> dict:
        about = {"marks": marks, "step": marks // 3, "doing": "in an update", "place": "VE.py:7"}
        about |= {"entered": entered, "inside": waits, "collective": f"all_reduce {entered}"}
        return {**about, "beats": marks, "waits": waits}

    behind = stall_message({0: answer(12), 1: answer(11), 2: answer(12)}, 3, 60)
    assert (
        "after update 4: rank 1 stalls in an update (last update 3, at VE.py:7, in all_reduce 5)"
        in behind
    )
    silent = stall_message({0: answer(12), 2: answer(11)}, 3, 60)
    assert "update 4: rank 1 does not answer; the others wait in all_reduce 5." in silent
    busy = stall_message({0: answer(12, waits=False), 1: answer(12)}, 2, 60)
    assert "update 4: rank 0 stalls" in busy and "rank 1" not in busy
    # on a GPU all of them wait for the device, at one place
    early = stall_message({0: answer(12), 1: answer(12, entered=4)}, 2, 60)
    where = "rank 1 stalls in an update (last update 4, at VE.py:7, in all_reduce 4)"
    assert f"{where}; the others wait in all_reduce 5." in early
    # the loop counts before the collectives: what a rank makes ready for the others may take some
    ahead = stall_message({0: answer(12, entered=4), 1: answer(11)}, 2, 60)
    assert "rank 1 stalls" in ahead and "rank 0 stalls" not in ahead
    both = {rank: answer(12) for rank in (0, 1)}
    both = {rank: {**each, "doing": "in validation"} for rank, each in both.items()}
    both[1]["beats"] = 11  # batches
    assert "rank 1 stalls in validation" in (said := stall_message(both, 2, 60))
    assert "rank 0" not in said
