"""Meters, FLOP counts and the log file."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from base.bars import progress_bar
from base.distributed import World
from base.errors import UserError
from base.processes import peak_resident_bytes
from runtime.flops import peak_flops, training_flops
from runtime.log import Meters, RunLog, Stopwatch, keep_before

WORLD = World(0, 1, 0, torch.device("cpu"))


def test_meters_are_means_since_the_last_reading():
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add(loss=torch.tensor(value), norm=torch.tensor(value * 2))
    assert meters.read() == {"loss": 3.0, "norm": 6.0}
    assert meters.read() == {}
    for value in (8.0, 10.0):
        meters.add(loss=torch.tensor(value))
    assert meters.read() == {"loss": 9.0}


def test_meters_survive_a_restart_between_log_points():
    first, second = Meters(), Meters()
    for value in (1.0, 2.0):
        first.add(loss=torch.tensor(value))
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    second.add(loss=torch.tensor(6.0))
    assert second.read() == {"loss": 3.0}


def test_log_is_json_lines_and_resuming_drops_what_will_be_written_again(tmp_path):
    log = RunLog(tmp_path, WORLD, {}, tensorboard=False)
    for step in (10, 20, 30):
        log.write(step, loss=1.0 / step, bad=float("nan"))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": "10"}\n')  # of an editor
        file.write('{"step": 40, "lo')  # a kill in mid-line
    keep_before(tmp_path / "log.jsonl", 30)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["bad"] == "nan"


def test_a_log_whose_folder_was_removed_goes_on_in_a_new_file(tmp_path, capsys):
    log = RunLog(tmp_path / "run", WORLD, {}, tensorboard=False)
    log.write(1, loss=2.0)
    shutil.rmtree(tmp_path / "run")
    log.sync()
    log.write(2, loss=1.0)
    log.close()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
    assert "log.jsonl was removed" in capsys.readouterr().out


def test_a_bar_is_drawn_seldom_where_it_goes_to_a_file(monkeypatch):
    """A job's log file would grow by ten lines a second."""
    for on_terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_one=on_terminal: is_one)
        with progress_bar(total=3) as bar:
            pauses = (bar.mininterval, bar.maxinterval)
        assert pauses == ((1, 10) if on_terminal else (30, 30))


def test_a_run_from_scratch_is_a_new_run_to_wandb(tmp_path, monkeypatch):
    """It took no step that the run before had made."""
    ids = []
    fake = SimpleNamespace(init=lambda id, **_: ids.append(id) or SimpleNamespace(finish=int))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in ("auto", "auto", "no", "auto"):
        RunLog(tmp_path, WORLD, {"resume": resume}, tensorboard=False, wandb="online").close()
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_what_wandb_refuses_is_one_sentence(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError("No API key configured.\nMore of it")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Error=OSError))
    with pytest.raises(
        UserError, match=r"--wandb online: No API key configured.; run `wandb login`"
    ):
        RunLog(tmp_path, WORLD, {}, tensorboard=False, wandb="online")


def test_tensorboard_events_are_written(tmp_path):
    log = RunLog(tmp_path, WORLD, {})
    log.write(1, loss=0.5)
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return {"loss_a": self.dense(x).sum()}


def test_flops_of_a_step_are_counted_without_computing():
    # forward 2*5*8*4; backward the same for the weight; the input needs no gradient
    assert training_flops(Net(), {"x": torch.randn(5, 8)}) == 2 * (2 * 5 * 8 * 4)


def test_counting_flops_leaves_a_module_of_two_names_as_it_was():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return {"loss": self.first(x).sum() + self.second(x).sum()}

    net, before = Shared(), dict(Shared().named_buffers())
    own = dict(net.named_parameters())
    assert training_flops(net, {"x": torch.randn(5, 8)}) > 0
    assert all(net.get_parameter(name) is value for name, value in own.items())
    assert all(torch.equal(net.get_buffer(name), value) for name, value in before.items())
    net.to("cpu")


def test_the_stopwatch_counts_waiting(monkeypatch):
    clock = iter([10.0, 10.0, 10.125, 10.5, 11.0])  # start, waiting from and to, reading, again
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(WORLD, samples_per_step=4, flops_per_step=6.0, peak_flops=48.0)
    assert watch.waiting(iter([7])) == 7
    watch.steps = 2
    figures = watch.read()
    assert figures.pop("memory_gb") > 0
    assert figures == {"images_per_s": 16.0, "data_wait": 0.25, "step_s": 0.25, "mfu": 0.5}
    assert watch.steps == 0 and watch.waited == 0 and watch.start == 11.0


def test_the_peak_of_memory_is_this_process_alone():
    """getrusage's begins at that of the process that launched it, such as torchrun."""
    code = "from base.processes import *; b'x' * 2**25; print(peak_resident_bytes())"
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert 2**25 < int(child.stdout) < peak_resident_bytes() / 4


def test_peak_is_zero_where_unknown_and_as_given_otherwise():
    assert peak_flops(torch.device("cpu"), "bf16") == 0
    assert peak_flops(torch.device("cpu"), "bf16", tflops=2.0) == 2e12
