"""Run: what a training script's loop relies on, with a small network and a real loader."""

import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from base import distributed
from base.distributed import ALONE, World
from base.errors import UserError
from base.writing import write_json
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from runtime import interrupt
from runtime.checkpoint import CheckpointFolder, find_damage, load_checked
from runtime.config.cli import run_script, section
from runtime.hashed import write_hashed
from runtime.interrupt import EXIT_REQUEUE
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig, ValidationConfig
from runtime.resume import ENTRIES, check_same_run
from runtime.run import ATTEMPTS, Run, make_deterministic
from runtime.saving import is_sharded_format, state_bytes
from tests.helpers.bars import close_bars
from tests.helpers.crash_points import plain
from tests.helpers.processes import ROOT, alive, in_fork

TOTAL = 4


@dataclass
class Config(ValidationConfig, RunConfig):
    optimizer: Optimizer = section(Optimizer)
    scheduler: Schedule = section(Schedule, duration=f"{TOTAL} steps", warmup="1 steps")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


class Build:
    def __call__(self, record):
        return torch.tensor([record["number"], 1.0])


def collate(samples):
    return {"x": torch.stack(samples)}


KIND = ["single"]  # of the checkpoints that `train` writes
both_kinds = pytest.mark.parametrize("kind", ["single", "sharded"], indirect=True)


@pytest.fixture
def kind(request, monkeypatch):
    """Checkpoints of one kind: a file, or a folder that is written beside the training."""
    monkeypatch.setattr("tests.unit.test_run.KIND", [request.param])
    return request.param


def saved(folder: Path, step: int | str) -> Path:
    """The checkpoint of a step, or `best`, where it is or would be."""
    name = step if isinstance(step, str) else f"{step:08d}"
    return folder / f"checkpoint_{name}{'.pt' if KIND[0] == 'single' else ''}"


def options(folder: Path, **changes) -> Config:
    values = {"output_dir": folder, "device": "cpu", "log_every": 1, "tensorboard": False}
    values["checkpoint_format"] = KIND[0]
    return Config(**{**values, "save_every": "1 steps", "eval_every": "1 steps", **changes})


def train(config: Config, scores=(), at=None) -> tuple[Run, Path | None]:
    """The scripts' loop; `scores` are those of the validations after each update. at(step) is
    called before anything is saved, first ahead of `begin`. Returns the run and the checkpoint to test."""
    close_bars()  # of a run that was killed
    torch.manual_seed(0)
    run = Run(config, ALONE, metric="accuracy" if scores else None)
    stream = Stream([RecordSource([{"number": i} for i in range(40)], Build(), "train")], collate)
    loader = StreamLoader(stream, batch_size=2, workers=0, state=run.data_state())
    precision = Precision("fp32", ALONE.device)
    if at:
        at(run.step)
    model, optimizer, plan = run.begin("test", Net(), loader, precision)
    if run.validation_due(run.step):
        run.keep_best({"accuracy": scores[run.step - 1]}, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        loss = model(**run.next_batch())["loss"]
        precision.backward(loss)
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, loss=loss.detach(), grad_norm=grad_norm)
        if at:
            at(step + 1)
        if run.validation_due(step + 1):
            run.keep_best({"accuracy": scores[step]}, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run, run.finish()


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def validated(folder: Path) -> list[int]:
    """Steps of the log's validations."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "val_accuracy" in line]


def best_step(folder: Path) -> int:
    assert find_damage(saved(folder, "best")) is None
    return load_checked(saved(folder, "best"))["step"]


def test_the_last_update_is_validated_whatever_the_interval(tmp_path):
    changes = {"scheduler": Schedule(duration="5 steps"), "eval_every": "2 steps"}
    train(options(tmp_path, **changes, save_every="3 steps"), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert validated(tmp_path) == [2, 4, 5] and best_step(tmp_path) == 5


@both_kinds
def test_max_steps_makes_no_further_update_at_restarts(kind, tmp_path, capsys):
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            train(options(tmp_path, max_steps=2))
        assert ended.value.code == 0
    assert steps_of(tmp_path) == [1, 2]
    said = capsys.readouterr().out
    assert "step 2 of --max_steps 2: nothing to do" in said
    assert "same command" not in said  # which does nothing
    assert saved(tmp_path, 2).exists() and not saved(tmp_path, 3).exists()


@pytest.mark.parametrize("limit", [TOTAL, TOTAL + 5])
def test_max_steps_beyond_the_training_lets_it_finish(tmp_path, limit):
    for _ in range(2):
        run, checkpoint = train(options(tmp_path, max_steps=limit))
        assert checkpoint.name == f"checkpoint_{TOTAL:08d}.pt"
    assert run.step == TOTAL and steps_of(tmp_path) == [1, 2, 3, 4]


@both_kinds
def test_a_finished_run_says_that_nothing_is_left(kind, tmp_path, capsys):
    run, _ = train(options(tmp_path), scores=[1, 3, 2, 0])
    assert run.log.bar.n == run.log.bar.total == TOTAL
    assert "nothing left to train" not in capsys.readouterr().out
    run, checkpoint = train(options(tmp_path), scores=[9, 9, 9, 9])
    assert "nothing left to train" in capsys.readouterr().out
    assert run.best == 3 and checkpoint == saved(tmp_path, "best")
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(("warmup", "warns"), [("4 steps", False), ("5 steps", True)])
def test_a_warm_up_that_does_not_fit_is_reported(tmp_path, capsys, warmup, warns):
    config = options(tmp_path, accumulate=2)
    config.scheduler.warmup = warmup
    config.optimizer.lr = 1e-6 if warns else 1e-5  # the schedule's own end
    train(config)
    said = capsys.readouterr().out
    assert ("does not rise to its peak" in said) == warns
    assert ("above its peak of 1e-06: lower scheduler.min_lr" in said) == warns
    assert "4 = 2 x 2 micro-batches x 1 processes" in said
    assert "an epoch is" not in said


def test_an_epoch_without_many_of_the_samples_is_reported(tmp_path, capsys):
    train(options(tmp_path, accumulate=11))
    assert "note: an epoch is 1 updates of 22, 22 of the 40 samples;" in capsys.readouterr().out


def test_validations_are_reported_with_the_best(tmp_path, capsys):
    train(options(tmp_path), scores=[1, 3, 2, 3])
    said = [line for line in capsys.readouterr().out.splitlines() if "validation at" in line]
    assert [line.split(": ", 1)[1] for line in said] == [
        "accuracy 1 (best so far)",
        "accuracy 3 (best so far)",
        "accuracy 2 (best so far: 3)",
        "accuracy 3 (best so far: 3)",
    ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("kind", "renames"),
    [*(("single", n) for n in range(8)), *(("sharded", n) for n in range(13))],
    indirect=["kind"],
)
def test_the_best_checkpoint_survives_a_kill_between_any_two_renames(
    kind, tmp_path, monkeypatch, renames
):
    """The kill comes after so many files were put in their places, of the second validation on."""
    scores = [1, 3, 2, 0]
    left = [renames]

    def replace(source, target, original=os.replace):
        if "checkpoint" in str(target):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            train(options(tmp_path), scores)
        except Killed:
            pass
        except UserError as error:  # of a thread beside the training, seen at a log point
            assert "Killed" in str(error)
    run, checkpoint = train(options(tmp_path), scores)
    assert run.best == 3 and checkpoint == saved(tmp_path, "best") and best_step(tmp_path) == 2
    assert validated(tmp_path) == [1, 2, 3, 4]


def flip_a_bit(file: Path) -> None:
    """Damage the file in place: every hard link to it is damaged, too."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def unlinked(file: Path) -> Path:
    """The file as a copy of its own."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return file


# scores of four validations, which checkpoints are damaged, and the best step and score afterwards;
# the fourth update is made, or after damage made again, by the second command
DAMAGES = {
    "best alone": ([1, 3, 2, 0], 3, ["best"], (2, 3)),
    "best alone, its step no longer kept": ([3, 2, 1, 0], 3, ["best"], (2, 2)),
    "newest alone": ([1, 3, 2, 0], 4, [4], (2, 3)),
    "newest, which is best": ([1, 2, 3, 4], 4, [4], (4, 4)),
    "best, which is newest": ([1, 2, 3, 4], 3, ["best"], (4, 4)),
    "both, apart": ([9, 3, 2, 0], 4, [4, "best"], (3, 2)),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize(
    ("kind", "linked"),
    [("single", True), ("single", False), ("sharded", True)],
    indirect=["kind"],
)
def test_damaged_checkpoints_cost_nothing_that_is_still_there(kind, tmp_path, case, linked):
    scores, steps, damaged, expected = DAMAGES[case]
    if case == "best alone" and linked:
        expected = 3, 2  # that of step 2, the same file, is damaged with it
    limit = {"max_steps": steps} if steps < TOTAL else {}
    try:
        train(options(tmp_path, **limit), scores)
    except SystemExit as ended:
        assert ended.code == 0
    for name in damaged:
        path = saved(tmp_path, name)
        file = path if kind == "single" else path / "rank_00000.pt"
        flip_a_bit(file if linked else unlinked(file))
    with pytest.warns(UserWarning, match="CHECKPOINT DAMAGED"):
        run, checkpoint = train(options(tmp_path), scores)
    assert checkpoint == saved(tmp_path, "best")
    assert (best_step(tmp_path), run.best) == expected
    assert steps_of(tmp_path) == validated(tmp_path) == [1, 2, 3, 4]
    assert find_damage(saved(tmp_path, TOTAL)) is None


@pytest.mark.filterwarnings("ignore:.*is of a later step")
@both_kinds
def test_a_new_run_does_not_take_the_best_checkpoint_of_an_earlier_one(kind, tmp_path, capsys):
    train(options(tmp_path), scores=[1, 3, 2, 0])
    with pytest.warns(UserWarning, match="of an earlier run"):
        _, checkpoint = train(options(tmp_path, resume="no"))
    assert (
        checkpoint == saved(tmp_path, TOTAL)
        and "no checkpoint to resume" not in capsys.readouterr().out
    )
    Run(options(tmp_path / "empty", resume="True"), ALONE)
    assert "/empty holds no checkpoint to resume from" in capsys.readouterr().out
    best = saved(tmp_path, "best")
    aside = best.with_name(f"{best.name}.superseded")
    assert not os.path.lexists(best) and find_damage(aside) is None


@both_kinds
def test_a_signal_saves_once_and_asks_for_a_requeue(kind, tmp_path):
    def at(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path, save_every="100 steps"), at=at)
    assert ended.value.code == EXIT_REQUEUE
    assert list(tmp_path.glob("checkpoint_*")) == [saved(tmp_path, 2)]
    assert find_damage(saved(tmp_path, 2)) is None and not list(tmp_path.glob(".checkpoint*"))
    train(options(tmp_path, save_every="100 steps"))
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def signalled_at(step: int):
    """An `at` of `train` that sends SIGTERM at a step."""
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


@pytest.mark.parametrize("inside", [False, True])
def test_a_signal_before_the_first_update_is_done_ends_the_run(inside, tmp_path, monkeypatch):
    """While data are looked through, or in the update, which may compile for minutes."""
    if inside:
        monkeypatch.setattr(Build, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path), at=None if inside else signalled_at(0))
    assert ended.value.code == EXIT_REQUEUE
    assert not list(tmp_path.glob("checkpoint_*"))


def test_a_signal_before_a_validation_leaves_it_to_the_resumed_run(tmp_path):
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path), scores=[1, 2, 3, 4], at=signalled_at(2))
    assert ended.value.code == EXIT_REQUEUE and steps_of(tmp_path) == [1, 2]
    assert validated(tmp_path) == [1] and best_step(tmp_path) == 1 and saved(tmp_path, 2).exists()
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path, max_steps=2), scores=[1, 2, 3, 4])
    assert ended.value.code == 0
    assert validated(tmp_path) == steps_of(tmp_path) == [1, 2] and best_step(tmp_path) == 2


def die() -> None:
    raise Killed


class KilledIn(list):
    """Scores; the validation at a step is killed when it has drawn random numbers."""

    def __init__(self, scores: list[float], step: int = 0, how=die):
        super().__init__(scores)
        self.step = step
        self.how = how

    def __getitem__(self, number: int) -> float:
        torch.rand(3)
        if number + 1 == self.step:
            self.how()
        return super().__getitem__(number)


@both_kinds
@pytest.mark.parametrize(("step", "behind"), [(2, False), (TOTAL, False), (2, True)])
def test_a_run_killed_in_a_validation_resumes_with_it(kind, step, behind, tmp_path):
    """Killed behind it, in the next update, it does not; random numbers continue alike."""

    def at(now):
        if behind and now == step + 1:
            raise Killed

    scores = [1, 3, 2, 4]
    train(options(tmp_path / "straight"), KilledIn(scores))
    with pytest.raises(Killed):  # with a checkpoint that is no longer under way
        killed_in = KilledIn(scores, 0 if behind else step)
        train(options(tmp_path / "run", async_save=False), killed_in, at=at)
    assert validated(tmp_path / "run") == list(range(1, step + behind))
    made = []
    train(options(tmp_path / "run"), KilledIn(scores), at=made.append)
    assert made == list(range(step, TOTAL + 1))  # no update is made again
    for folder in (tmp_path / "run", tmp_path / "straight"):
        assert validated(folder) == steps_of(folder) == [1, 2, 3, 4] and best_step(folder) == 4
    if kind == "single":
        ours, theirs = (load_checked(saved(tmp_path / n, TOTAL)) for n in ("run", "straight"))
        assert ours["scores"] == theirs["scores"] == {"accuracy": {1: 1.0, 2: 3.0, 3: 2.0}}
        assert plain(ours["per_rank"]) == plain(theirs["per_rank"])
        assert plain(ours["model"]) == plain(theirs["model"])


@both_kinds
def test_a_signal_in_a_validation_ends_it_with_what_was_saved(kind, tmp_path):
    scores = KilledIn([1, 3, 2, 4], step=2, how=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path, save_every="100 steps"), scores)
    assert ended.value.code == EXIT_REQUEUE and validated(tmp_path) == [1]
    assert find_damage(saved(tmp_path, 2)) is None


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
@pytest.mark.parametrize("way", ["no reader", "full disk", "closed"])
@pytest.mark.parametrize("text", ["flushed", "more than a buffer holds " * 1000])
def test_a_run_outlives_who_reads_what_it_says(text, lost, way, tmp_path, monkeypatch):
    """`| head` leaves early; what a file of a full disk does not take is lost."""
    file = open("/dev/full", "w") if way == "full disk" else None
    if way == "no reader":
        read_end, write_end = os.pipe()
        os.close(read_end)
        file = os.fdopen(write_end, "w")
    other = io.StringIO()
    both = {"stdout": other, "stderr": other, lost: file}
    for name, stream in both.items():
        monkeypatch.setattr(sys, name, stream)

    def main(_config):
        for _ in range(3):
            print(text, flush=text == "flushed", file=getattr(sys, lost))
        done.append(True)

    done = []
    run_script(main, RunConfig, argv=["--output_dir", str(tmp_path / "run")])
    reasons = {"no reader": "Broken pipe", "full disk": "No space left on device"}
    said = [line for line in other.getvalue().splitlines() if "cannot be written" in line]
    assert done and len(said) == (way in reasons)
    assert all(reasons[way] in line and "the run continues" in line for line in said)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_before_a_run_opens_asks_for_a_requeue_too(number, status, tmp_path):
    def main(_config):
        os.kill(os.getpid(), number)
        time.sleep(20)

    def alone():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not that of an earlier test
        run_script(main, RunConfig, argv=["--output_dir", str(tmp_path / "run")])

    output = tmp_path / "said"
    assert in_fork(alone, output) == status
    assert ("nothing is left to save" in output.read_text()) == (status == 75)


@pytest.mark.parametrize(("unsaved", "expected"), [(False, ["written", 75]), (True, [])])
def test_a_thread_ends_a_process_that_waits_for_one_that_has_left(unsaved, expected, monkeypatch):
    """In a collective, which Python's handlers of signals do not interrupt."""
    done = []
    monkeypatch.setattr(interrupt, "PATIENCE", 0)
    monkeypatch.setattr("os._exit", done.append)
    waiting = interrupt.Interrupt(World(0, 2, 0, ALONE.device), lambda: done.append("written"))
    waiting.unsaved = unsaved
    # where Python reports signals, whatever the main thread does
    write_end = signal.set_wakeup_fd(-1)
    os.write(write_end, bytes([signal.SIGCHLD, signal.SIGTERM]))
    os.close(write_end)
    waiting.thread.join()
    assert done == expected


LEAVING = """
import os, signal
import torch
from base.distributed import World
from runtime.interrupt import Interrupt

class Last:
    # as the interpreter clears its modules, these names first
    def __del__(self, kill=os.kill, own=os.getpid(), numbers=(signal.SIGTERM, signal.SIGUSR1)):
        for number in numbers:
            kill(own, number)

last = Last()
Interrupt(World(0, 1, 0, torch.device("cpu")), lambda: None)
os.kill(os.getpid(), signal.SIGUSR1)
"""

IN_A_TRACE = """
import os, signal, traceback
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _python_dispatch as modes
from base.distributed import World
from runtime.interrupt import Interrupt

push = modes._push_mode

def signalled(mode):
    push(mode)
    within = [frame.name for frame in traceback.extract_stack()]
    if isinstance(mode, FakeTensorMode) and "__torch_dispatch__" in within:
        modes._push_mode = push
        os.kill(os.getpid(), signal.SIGTERM)  # the mode is set, its `with` not yet entered

Interrupt(World(0, 1, 0, torch.device("cpu")), lambda: None)
modes._push_mode = signalled
network = torch.nn.Conv2d(1, 1, 1)
network.compile(backend="aot_eager")
network(torch.ones(1, 1, 1, 1))
while True:  # longer than a moment
    pass
"""


@pytest.mark.slow
def test_a_signal_does_not_cut_through_a_trace():
    ended = subprocess.run([sys.executable, "-c", IN_A_TRACE], cwd=ROOT, capture_output=True)
    assert ended.returncode == EXIT_REQUEUE, ended.stderr


@pytest.mark.slow
def test_a_second_signal_leaves_the_status_of_the_first():
    ended = subprocess.run([sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True)
    assert ended.returncode == EXIT_REQUEUE, ended.stderr


def test_a_signal_to_a_loader_worker_is_none_to_its_process(monkeypatch):
    done = []
    monkeypatch.setattr(interrupt, "PATIENCE", 0)
    monkeypatch.setattr("os._exit", done.append)
    waiting = interrupt.Interrupt(World(0, 2, 0, ALONE.device), lambda: None)
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(signal.set_wakeup_fd(-1))
    waiting.thread.join()
    assert done == []


def test_a_signal_out_of_which_no_exception_gets_ends_the_process(tmp_path):
    """As one that comes in a callback of the garbage collection, while a network is compiled."""

    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def collecting():
        interrupt.Interrupt(ALONE, lambda: None)
        Collected()
        time.sleep(20)

    output = tmp_path / "said"
    assert in_fork(collecting, output) == EXIT_REQUEUE
    assert "Exception ignored" not in output.read_text()


@pytest.mark.parametrize("unsaved", [True, False])
def test_a_signal_to_the_group_ends_no_compiler(unsaved, tmp_path, monkeypatch):
    """As Slurm and a terminal send it. The run notices it while it waits for the compiler."""
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", SimpleNamespace())

    def compiling():
        os.setpgrp()
        waiting = interrupt.Interrupt(ALONE, lambda: None)
        waiting.spare_children()
        waiting.unsaved = unsaved
        then = "exit 7" if unsaved else "exec sleep 20"
        signals = "kill -s USR1 0; kill -s TERM 0; kill -s INT 0"
        assert subprocess.run(["sh", "-c", f"{signals}; {then}"]).returncode == 7
        while waiting.received is None:
            pass
        waiting.spare_no_more()
        os.kill(os.getpid(), signal.SIGKILL)

    begin = time.monotonic()
    output = tmp_path / "said"
    expected = -signal.SIGKILL if unsaved else EXIT_REQUEUE
    assert in_fork(compiling, output) == expected, output.read_text()
    assert time.monotonic() - begin < interrupt.PATIENCE  # not by its thread


def test_signals_are_hidden_while_a_compiled_network_is_trained(tmp_path, monkeypatch):
    """And the compilers, which no signal of torch's reaches, are ended with the process."""
    at_exit, hidden = [], []
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", SimpleNamespace())

    def look(*_, **__):
        hidden.append({*interrupt.SIGNALS} <= signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(nn.Module, "compile", look)
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    # autograd's threads, which a test before may have started, do not live on in a fork
    monkeypatch.setattr(Precision, "backward", lambda precision, loss: None)
    monkeypatch.setattr(Precision, "step", lambda *_: torch.zeros(()))

    def training():
        train(options(tmp_path / "run", compile=True), at=look)  # looks before it begins, too
        look(TOTAL)
        assert hidden == [False, True, *[True] * TOTAL, False]  # the second where it is compiled
        assert interrupt._end_compilers in [function for function, *_ in at_exit]

    output = tmp_path / "said"
    assert in_fork(training, output) == 0, output.read_text()


def test_what_compiles_ends_with_the_run():
    server = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
    compiler = int(server.stdout.readline())
    gone = SimpleNamespace(process=SimpleNamespace(pid=2**22 + 1))  # no process has such a number
    pools = [SimpleNamespace(), gone, SimpleNamespace(process=server)]
    interrupt._end_compilers(SimpleNamespace(_pool_set=pools))
    server.communicate()
    assert not alive(compiler)


def test_a_validation_that_never_comes_to_its_end_stops_the_run(tmp_path):
    scores = [1, 3, 2, 4]
    for _ in range(ATTEMPTS):
        with pytest.raises(Killed):
            train(options(tmp_path), KilledIn(scores, step=2))
    with pytest.raises(UserError, match="the validation at step 2 was begun 3 times"):
        train(options(tmp_path), scores)
    train(options(tmp_path), scores)  # with more time
    assert validated(tmp_path) == [1, 2, 3, 4] and not (tmp_path / "validation.json").exists()


def test_a_validation_of_another_step_was_not_begun(tmp_path):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=2), [1, 3, 2, 4])
    write_json(tmp_path / "validation.json", {"step": 2, "begun": ATTEMPTS})
    train(options(tmp_path), [1, 3, 2, 4])
    assert validated(tmp_path) == [1, 2, 3, 4]


def test_ctrl_c_behind_another_signal_is_remembered_and_the_second_ends_at_once():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        waiting = interrupt.Interrupt(ALONE, lambda: None)
        waiting.unsaved = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert waiting.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("killed", [3, 4])  # behind a validation, or a checkpoint without one
def test_a_power_failure_leaves_the_log_of_what_was_saved(killed, tmp_path, monkeypatch):
    scores = [1, 3, 2, 0]
    log = tmp_path / "log.jsonl"
    on_disk = {}
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        on_disk[name] = Path(name).read_bytes() if name == str(log) else b""

    def at(step):
        if step == killed:
            raise Killed

    monkeypatch.setattr(os, "fsync", synced)
    with pytest.raises(Killed):
        train(options(tmp_path, eval_every="2 steps"), scores, at=at)
    left = on_disk[str(log)]
    assert left.splitlines() == log.read_bytes().splitlines()[:-1]
    log.write_bytes(left + bytes(100))  # as file systems fill up what was not written
    train(options(tmp_path, eval_every="2 steps"), scores)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert validated(tmp_path) == [2, 4] and best_step(tmp_path) == 2


def test_a_run_without_its_log_keeps_its_best(tmp_path):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=3), scores=[1, 3, 2, 0])
    (tmp_path / "log.jsonl").unlink()
    run, _ = train(options(tmp_path), scores=[1, 3, 2, 0])
    assert best_step(tmp_path) == 2 and run.best == 3
    assert validated(tmp_path) == [3, 4]  # nobody knows that of the newest checkpoint


def test_a_run_of_an_earlier_version_keeps_its_best(tmp_path):
    """Its checkpoints hold their own score; none holds those before."""
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=3), scores=[1, 3, 2, 0])
    (tmp_path / "log.jsonl").unlink()
    for name, score in (("best", 3.0), (2, 3.0), (3, 2.0)):
        content = load_checked(saved(tmp_path, name))
        del content["scores"]
        write_hashed({**content, "accuracy": score}, unlinked(saved(tmp_path, name)))
    run, _ = train(options(tmp_path), scores=[1, 3, 2, 0])
    assert best_step(tmp_path) == 2 and run.best == 3


def test_a_signal_after_the_training_ends_the_process_at_once(tmp_path, monkeypatch):
    train(options(tmp_path / "finished"))
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)  # during the final test
    assert ended.value.code == EXIT_REQUEUE
    os.kill(os.getpid(), signal.SIGTERM)  # what runs on the way out is left alone
    close = Run.close
    monkeypatch.setattr(Run, "close", lambda run: (signalled_at(0)(0), close(run)))
    with pytest.raises(
        SystemExit
    ) as ended:  # behind the last update, as while weights are exported
        train(options(tmp_path / "exporting"))
    assert ended.value.code == EXIT_REQUEUE and saved(tmp_path / "exporting", TOTAL).exists()


@pytest.mark.parametrize(
    ("wanted", "processes", "parallel", "limit", "expected"),
    [
        ("auto", 1, "fsdp", 0, False),
        ("auto", 2, "ddp", 100, False),
        ("auto", 2, "ddp", 10, True),
        ("auto", 2, "fsdp", 100, True),
        ("single", 2, "fsdp", 0, False),
        ("sharded", 1, "ddp", 100, True),
    ],
)
def test_the_kind_of_checkpoint(monkeypatch, wanted, processes, parallel, limit, expected):
    monkeypatch.setattr("runtime.saving.SINGLE_BYTES", limit)  # Net with Adam has 36 bytes
    world = World(0, processes, 0, ALONE.device)
    assert state_bytes(Net()) == 36
    assert is_sharded_format(wanted, Net(), world, parallel) == expected


def test_a_write_beside_the_training_that_fails_ends_the_run_at_the_next_log_point(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("runtime.hashed._HashingFile.finish", full)

    def at(step):
        if step == 3:  # the write of step 2 has failed by then
            until = time.monotonic() + 60
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                assert time.monotonic() < until
                time.sleep(0.01)

    with pytest.raises(UserError, match="disk is full") as error:
        train(options(tmp_path, async_save=True, save_every="2 steps"), at=at)
    assert "start the same command again" in str(error.value)
    assert any(entry.name == "log_step" for entry in error.traceback)
    assert steps_of(tmp_path) in ([1, 2, 3], [1, 2, 3, 4])  # a fast disk has failed by step 3
    assert not list(tmp_path.glob("checkpoint_*"))


# ---- a used folder
def refused(config: Config, scores=()) -> str:
    """The sentence with which a run does not begin; everything in its folder is as before."""
    folder = Path(config.output_dir)
    before = contents(folder)
    with pytest.raises(UserError) as error:
        train(config, scores)
    assert contents(folder) == before
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ANOTHER_RUN = {
    "other weights": {"checkpoint": Path("elsewhere.pt")},
    "other data": {"train_file": ["flickr.json"]},
    "other ratios of the data": {"weights": [3.0, 1.0]},
    "another size": {"image_res": 32},
    "another network": {"text_heads": 4},
}


@dataclass
class Network:
    text_heads: int = 2
    label_smoothing: float = 0.0


@dataclass
class ScriptConfig(Config):
    train_file: list[str] = field(default_factory=lambda: ["coco.json"])
    weights: list[float] = field(default_factory=list)
    image_res: int = 64
    batch_size: int = 4
    network: Network = section(Network)


def script_options(folder: Path, text_heads=2, label_smoothing=0.0, **changes) -> ScriptConfig:
    network = Network(text_heads, label_smoothing)
    return ScriptConfig(**{**vars(options(folder)), "network": network, **changes})


@pytest.mark.parametrize("case", ANOTHER_RUN)
def test_another_run_in_a_used_folder_is_refused_unless_the_user_insists(tmp_path, case, capsys):
    train(script_options(tmp_path))
    message = refused(script_options(tmp_path, **ANOTHER_RUN[case]))
    [name] = ANOTHER_RUN[case]
    assert f"{name}: " in message and "--resume yes" in message and "--output_dir" in message
    capsys.readouterr()
    train(script_options(tmp_path, resume="yes", **ANOTHER_RUN[case]))
    assert "nothing left to train" in capsys.readouterr().out


OTHER_RULES = {
    "optimizer.lr": {"optimizer": Optimizer(lr=0.5)},
    "optimizer.weight_decay": {"optimizer": Optimizer(weight_decay=0.5)},
    "scheduler.duration": {"scheduler": Schedule(duration="6 steps", warmup="1 steps")},
    "scheduler.warmup": {"scheduler": Schedule(duration=f"{TOTAL} steps", warmup="2 steps")},
    "batch_size": {"batch_size": 8},
    "accumulate": {"accumulate": 2},
}


@pytest.mark.parametrize("name", OTHER_RULES)
def test_other_rules_of_training_are_refused_unless_the_user_insists(tmp_path, name):
    with pytest.raises(SystemExit):
        train(script_options(tmp_path, max_steps=2))
    message = refused(script_options(tmp_path, **OTHER_RULES[name]))
    assert f"{name}: " in message and "--resume yes" in message and "--resume no" in message
    config = script_options(tmp_path, resume="yes", **OTHER_RULES[name])
    run, _ = train(config)
    assert run.first_step == 2 and run.plan.peak_lr == config.optimizer.lr
    assert f"{run.plan.total} steps" == config.scheduler.duration
    assert run.plan.warmup == int(config.scheduler.warmup.split()[0])
    decays = {group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {0.0, config.optimizer.weight_decay}
    assert run.plan.batch == 2 * config.accumulate


def test_what_may_change_on_resuming(tmp_path):
    with pytest.raises(SystemExit):
        train(script_options(tmp_path, max_steps=2))
    run, _ = train(
        script_options(
            tmp_path,
            label_smoothing=0.1,
            keep=3,
            train_file=[os.path.abspath("coco.json")],  # the same file
            batch_size=2,
            accumulate=2,  # the same global batch
        )
    )
    assert run.step == TOTAL


def test_a_folder_that_was_moved_with_what_the_run_made_in_it_continues(tmp_path):
    folders = tmp_path / "before", tmp_path / "now"
    with pytest.raises(SystemExit):
        made = [str(folders[0] / "tokenizer")]
        train(script_options(folders[0], max_steps=2, train_file=made))
    folders[0].rename(folders[1])
    other = [str(folders[1] / "another")]
    assert "train_file: " in refused(script_options(folders[1], train_file=other))
    run, _ = train(script_options(folders[1], train_file=[str(folders[1] / "tokenizer")]))
    assert run.first_step == 2


def test_the_global_batch_counts_processes():
    saved = {key: {} for key in ENTRIES} | {"per_rank": [{}] * 8}
    saved["config"] = {"batch_size": 4, "accumulate": 1}

    def resume(processes: int, **options: int) -> None:
        config = saved["config"] | options
        check_same_run(saved, Path("a/b.pt"), "VE.py", config, processes=processes, insist=False)

    resume(processes=8)
    resume(processes=4, accumulate=2)
    resume(processes=2)  # an elastic run: its options are as before
    with pytest.raises(UserError, match="accumulate: 1 -> 2"):
        resume(processes=8, accumulate=2)
    with pytest.raises(UserError, match="batch_size: 4 -> 16"):
        resume(processes=4, batch_size=16)


@pytest.mark.parametrize("change", [{"epoch_steps": 19}, {"peak_lr": 1e-3}, {}])
def test_a_process_with_other_data_or_options_is_named_before_it_trains(
    change, tmp_path, monkeypatch
):
    """Nodes may have copies of their own; {}: two samples less, too few for another update."""

    def of_two_nodes(own):
        samples, plan = own
        return [own, (samples, replace(plan, **change)) if change else (samples - 2, plan)]

    monkeypatch.setattr(distributed, "gather_objects", of_two_nodes)
    with pytest.raises(UserError, match="rank 1 would train otherwise than rank 0: it has"):
        train(options(tmp_path))
    assert not (tmp_path / "log.jsonl").exists()


class Taught(Net):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(2, 1).requires_grad_(False)


class Doubled(Net):
    """A layer that occurs twice, as those of NLVR's text encoder."""

    def __init__(self):
        super().__init__()
        self.again = self.layer


def test_a_network_with_a_layer_twice_resumes_under_ddp(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Net", Doubled)
    train(options(tmp_path / "straight"))
    with pytest.raises(SystemExit):
        train(options(tmp_path / "halves", max_steps=2))
    wrapped = nn.parallel.DistributedDataParallel
    monkeypatch.setattr("runtime.run.parallelize", lambda model, *_: wrapped(model))
    where = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        train(options(tmp_path / "halves"))
    finally:
        torch.distributed.destroy_process_group()
    ends = [load_checked(saved(tmp_path / name, TOTAL)) for name in ("straight", "halves")]
    assert steps_of(tmp_path / "halves") == [1, 2, 3, 4]
    for name in ("layer.weight", "again.weight"):
        assert torch.equal(ends[0]["model"][name], ends[1]["model"][name])


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)


MISFITS = {
    "another part": "no teacher.weight",
    "a weight is missing": "no layer.bias",
    "another width": "layer.weight [1, 2] instead of [1, 3]",
    "another optimizer": "--opt",
    "another script": "test_other.py",
    "an entry is missing": "per_rank",
}


@pytest.mark.parametrize("resume", ["auto", "yes"])
@pytest.mark.parametrize("change", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch, change, resume):
    train(options(tmp_path))
    newest = tmp_path / f"checkpoint_{TOTAL:08d}.pt"
    saved = torch.load(newest, weights_only=True)
    config = options(tmp_path, resume=resume)
    if change == "another part":
        monkeypatch.setitem(globals(), "Net", Taught)
    elif change == "another width":
        monkeypatch.setitem(globals(), "Net", Wide)
    elif change == "another optimizer":
        config.optimizer.opt = "lamb"
    elif change == "a weight is missing":
        del saved["model"]["layer.bias"]
    elif change == "another script":
        saved["script"] = "test_other.py"
    else:
        del saved["per_rank"]
    for path in tmp_path.glob("checkpoint_*.pt"):
        path.unlink()
    CheckpointFolder(tmp_path).save(saved, TOTAL)
    message = refused(config)
    assert MISFITS[change] in message and str(newest) in message and "--output_dir" in message


def test_a_command_that_fails_before_the_first_update_leaves_the_folder_as_it_was(tmp_path):
    train(options(tmp_path))
    before = contents(tmp_path)
    Run(options(tmp_path, log_every=3), ALONE).close()  # its data turned out to be unreadable
    assert contents(tmp_path) == before
    fresh = tmp_path / "fresh"
    Run(options(fresh), ALONE).close()
    assert [path.name for path in fresh.iterdir()] == [".lock"]


LOCKS = """
import fcntl, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(exist_ok=True)
lock = path.open("w")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("second", ["comes later", "was first"])
def test_a_folder_that_is_removed_under_way_is_locked_again(second, tmp_path):
    folder = tmp_path / "run"
    tried = []
    comes = {"was first": 2, "comes later": 3}[second]

    def at(step):
        if step == 2:
            shutil.rmtree(folder)
        if step == comes:
            command = [sys.executable, "-c", LOCKS, str(folder / ".lock")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            tried.append(subprocess.Popen(command, **pipes))
            tried.append(tried[0].stdout.readline())

    try:
        if second == "comes later":
            run, _ = train(options(folder), at=at)
            assert run.step == TOTAL and tried[1] == ""
            assert steps_of(folder) == [3, 4] and (folder / "config.yaml").is_file()
        else:
            with pytest.raises(UserError, match="another run writes to this folder"):
                train(options(folder), at=at)
            assert tried[1] == "locked\n" and [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        tried[0].communicate("", timeout=20)


@both_kinds
def test_a_checkpoint_that_is_removed_in_its_validation_is_saved_again(kind, tmp_path):
    class Scores(list):
        def __getitem__(self, step):
            if step == 1:
                shutil.rmtree(tmp_path / "run")
            return super().__getitem__(step)

    config = options(tmp_path / "run", async_save=False)  # a write under way would fail
    run, checkpoint = train(config, Scores([0.1, 0.4, 0.2, 0.3]))
    assert run.step == TOTAL and best_step(tmp_path / "run") == 2
    assert checkpoint == saved(tmp_path / "run", "best") and validated(tmp_path / "run")[-1] == 4


def test_a_file_system_without_locks_is_no_second_run(tmp_path, monkeypatch, capsys):
    """Lustre has none unless it is mounted with them."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, no_locks)
    run, _ = train(options(tmp_path))
    assert run.step == TOTAL
    assert "no locks (Function not implemented)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*now .*superseded")
def test_a_folder_in_a_checkpoints_place_is_set_aside(tmp_path):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=2))
    for name in ("checkpoint_00000003.pt", "checkpoint_00000004.pt"):
        (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.warns(UserWarning, match="Is a directory"):
        run, checkpoint = train(options(tmp_path))
    assert run.step == TOTAL and find_damage(checkpoint) is None
    assert (tmp_path / "checkpoint_00000004.pt.superseded/inside").is_dir()


def test_damaged_lines_of_the_log_are_left_out_and_counted(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=3))
    log = tmp_path / "log.jsonl"
    first, second, third = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([first, b"\xff\xfe" + second, third, b'{"step": 4, "lo']))
    train(options(tmp_path))
    assert steps_of(tmp_path) == [1, 3, 4]
    assert "1 damaged lines left out" in capsys.readouterr().err


# ---- full disks
def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["config.yaml", "log.jsonl", "tensorboard"])
def test_a_full_disk_is_one_sentence_and_the_weights_are_safe(tmp_path, monkeypatch, where):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=2))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full") as error:
        if where == "config.yaml":
            patch.setattr(os, "fsync", full)
        elif where == "log.jsonl":
            patch.setattr("runtime.log.keep_before", lambda *_: disk_is_full_from_now_on(tmp_path))
        else:
            patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        train(options(tmp_path, tensorboard=where == "tensorboard"))
    assert where in str(error.value) and "\n" not in str(error.value)
    if (tmp_path / "log.jsonl").is_symlink():
        (tmp_path / "log.jsonl").unlink()
    assert CheckpointFolder(tmp_path).newest_valid().name == "checkpoint_00000002.pt"
    assert train(options(tmp_path))[0].step == TOTAL
    assert steps_of(tmp_path)[-2:] == [3, 4]


def disk_is_full_from_now_on(folder: Path) -> None:
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to("/dev/full")


@pytest.mark.parametrize("updates, traced", [(9, 2), (6, 1), (4, 0)])
def test_profile_traces_updates_after_a_few(updates, traced, tmp_path):
    """Also of a run that ends before all are traced; one that ends before the first leaves none."""
    plan = Schedule(duration=f"{updates} steps", warmup="1 steps")
    train(options(tmp_path, profile=2, scheduler=plan))
    trace = tmp_path / "trace_rank0.json.gz"
    assert trace.is_file() == bool(traced)
    if traced:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events]
        assert names.count("Optimizer.step#AdamW.step") == traced


def test_deterministic_asks_for_kernels_that_repeat(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        train(options(tmp_path, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


class Unrepeatable(torch.autograd.Function):
    """Identity whose backward pass writes with put_, which has no deterministic kernel."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone().put_(torch.tensor([0]), gradient.flatten()[:1])


def backward_that_cannot():
    Unrepeatable.apply(torch.ones(3, requires_grad=True)).sum().backward()


def compiled_that_cannot():
    raise RuntimeError(
        "backend='inductor' raised:\nRuntimeError: put_ does not have a deterministic implementation, "
        "but you set"
    )


@pytest.mark.parametrize("work", [backward_that_cannot, compiled_that_cannot])
def test_deterministic_names_the_operation_that_cannot(work, capsys):
    def script(config):
        make_deterministic()
        work()

    try:
        with pytest.raises(SystemExit, match="2"):
            run_script(script, type("Config", (), {"__dataclass_fields__": {}}), argv=[])
    finally:
        torch.use_deterministic_algorithms(False)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --deterministic: put_ has no deterministic kernel")


def test_other_faults_of_torch_keep_their_traceback():
    def fail(_):
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="size"):
        run_script(fail, type("Config", (), {"__dataclass_fields__": {}}), argv=[])
