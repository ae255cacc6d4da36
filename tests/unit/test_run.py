"""Run: what a training script's loop relies on, with a small network and a real loader."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from base.distributed import ALONE
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from runtime.checkpoint import find_damage
from runtime.config.cli import section
from runtime.interrupt import EXIT_REQUEUE
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.run import Run, RunConfig, ValidationConfig

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


def options(folder: Path, **changes) -> Config:
    values = {"output_dir": folder, "device": "cpu", "log_every": 1, "tensorboard": False}
    return Config(**{**values, "save_every": "1 steps", "eval_every": "1 steps", **changes})


def train(config: Config, scores=(), evaluated=None, at=None) -> tuple[Run, Path | None]:
    """The scripts' loop; `scores` are those of the validations after each update. at(step) is
    called before anything is saved. Returns the run and the checkpoint to test."""
    torch.manual_seed(0)
    run = Run(config, ALONE, metric="accuracy" if scores else None)
    stream = Stream([RecordSource([{"number": i} for i in range(40)], Build(), "train")], collate)
    loader = StreamLoader(stream, batch_size=2, workers=0, state=run.data_state())
    precision = Precision("fp32", ALONE.device)
    model, optimizer, plan = run.begin("test", Net(), loader, precision)
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


def best_score(folder: Path) -> float:
    file = folder / "checkpoint_best.pt"
    assert find_damage(file) is None
    return torch.load(file, weights_only=True)["accuracy"]


def test_max_steps_makes_no_further_update_at_restarts(tmp_path, capsys):
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            train(options(tmp_path, max_steps=2))
        assert ended.value.code == 0
    assert steps_of(tmp_path) == [1, 2]
    assert "step 2 of --max_steps 2: nothing to do" in capsys.readouterr().out
    assert [f.name for f in tmp_path.glob("checkpoint_*")].count("checkpoint_00000003.pt") == 0


@pytest.mark.parametrize("limit", [TOTAL, TOTAL + 5])
def test_max_steps_beyond_the_training_lets_it_finish(tmp_path, limit):
    for _ in range(2):
        run, checkpoint = train(options(tmp_path, max_steps=limit))
        assert checkpoint.name == f"checkpoint_{TOTAL:08d}.pt"
    assert run.step == TOTAL and steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    train(options(tmp_path), scores=[1, 3, 2, 0])
    assert "nothing left to train" not in capsys.readouterr().out
    run, checkpoint = train(options(tmp_path), scores=[9, 9, 9, 9])
    assert "nothing left to train" in capsys.readouterr().out
    assert run.best == 3 and checkpoint.name == "checkpoint_best.pt"
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(("warmup", "warns"), [("4 steps", False), ("5 steps", True)])
def test_a_warm_up_that_does_not_fit_is_reported(tmp_path, capsys, warmup, warns):
    config = options(tmp_path)
    config.scheduler.warmup = warmup
    train(config)
    assert ("does not rise to its peak" in capsys.readouterr().out) == warns


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


@pytest.mark.parametrize("renames", range(8))
def test_the_best_checkpoint_survives_a_kill_between_any_two_renames(
    tmp_path, monkeypatch, renames
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
    run, checkpoint = train(options(tmp_path), scores)
    assert run.best == 3 and checkpoint.name == "checkpoint_best.pt" and best_score(tmp_path) == 3
    assert torch.load(checkpoint, weights_only=True)["step"] == 2


def test_a_damaged_best_checkpoint_is_chosen_again(tmp_path):
    with pytest.raises(SystemExit):
        train(options(tmp_path, max_steps=3), scores=[1, 3, 2, 0])
    file = tmp_path / "checkpoint_best.pt"
    content = bytearray(file.read_bytes())
    file.unlink()  # no second name of a numbered one
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="CHECKPOINT DAMAGED"):
        run, checkpoint = train(options(tmp_path), scores=[1, 3, 2, 0])
    assert run.best == 0 and checkpoint.name == "checkpoint_best.pt" and best_score(tmp_path) == 0


def test_a_new_run_does_not_take_the_best_checkpoint_of_an_earlier_one(tmp_path):
    train(options(tmp_path), scores=[1, 3, 2, 0])
    with pytest.warns(UserWarning, match="of an earlier run"):
        _, checkpoint = train(options(tmp_path, resume="no"))
    assert checkpoint.name == f"checkpoint_{TOTAL:08d}.pt"
    assert not (tmp_path / "checkpoint_best.pt").exists()
    assert (tmp_path / "checkpoint_best.pt.superseded").exists()


def test_a_signal_saves_once_and_asks_for_a_requeue(tmp_path):
    def at(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path, save_every="100 steps"), at=at)
    assert ended.value.code == EXIT_REQUEUE
    assert [f.name for f in tmp_path.glob("checkpoint_*.pt")] == ["checkpoint_00000002.pt"]
    train(options(tmp_path, save_every="100 steps"))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
