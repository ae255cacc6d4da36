"""Durations and learning rates."""

import itertools
from types import SimpleNamespace

import pytest

from base.errors import UserError
from runtime.optim.schedule import Plan, Schedule, learning_rate, ramp, steps
from tests.helpers.golden import golden

SIZES = {"epoch_steps": 100, "batch": 64}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("500 steps", 500),
        ("3 epochs", 300),
        (3, 300),
        ("0.5", 50),
        ("6400 samples", 100),
        ("1e3 steps", 1000),
        ("10%", 30),
        ("3epochs", 300),
        ("1e1epochs", 1000),
        ("500steps", 500),
    ],
)
def test_a_duration_in_any_unit(text, expected):
    assert steps(text, total=300, **SIZES) == expected


@pytest.mark.parametrize("text", ["soon", "3 years", "-1 steps", "", "1e400 steps", "1e308 epochs"])
def test_a_wrong_duration_names_itself_and_the_remedy(text):
    with pytest.raises(UserError, match=r"duration.*(write|use)"):
        steps(text, total=300, **SIZES)


def test_a_percentage_of_nothing_is_refused():
    with pytest.raises(UserError, match="percentage"):
        steps("5%", **SIZES)


def test_default_schedule_rises_linearly_then_falls_to_min_lr_at_the_last_step():
    schedule = Schedule(warmup="10 steps", warmup_lr=0.0, min_lr=1e-5)
    at = learning_rate(schedule, 1e-3, total=110, **SIZES)
    assert at(0) == 0 and at(5) == pytest.approx(5e-4) and at(10) == pytest.approx(1e-3)
    assert at(109) == pytest.approx(1e-5)
    falling = [at(step) for step in range(10, 110)]
    assert falling == sorted(falling, reverse=True)


def planned(loader: tuple[int, int, int], done: int, **schedule) -> Plan:
    """The plan behind `done` updates; loader: (processes, batches an epoch, samples seen)."""
    processes, batches, samples = loader
    about = {"batch_size": 4, "world_size": processes, "steps_per_epoch": batches}
    loader = SimpleNamespace(**about, samples=samples)
    return Plan.of_loader(Schedule(**schedule), 1.0, loader, accumulate=2, done=done)


def test_another_number_of_processes_keeps_the_length_in_samples():
    """Two processes have made 10 updates of 16 samples, 160 of 3 epochs of 160."""
    schedule = {"duration": "3 epochs", "warmup": "10%"}
    before = planned((2, 20, 160), 10, **schedule)
    assert (before.batch, before.total, before.shift) == (16, 30, 0)
    alone = planned((1, 40, 160), 10, **schedule)
    assert (alone.batch, alone.total, alone.shift) == (8, 50, 10)  # 40 updates of 8 are left
    assert alone.epoch(10) == before.epoch(10) == 1
    assert alone.lr(10) == pytest.approx(before.lr(10), rel=0.01)
    assert alone.lr(49) == before.lr(29) == 1e-5
    assert alone.ramp(10, "2 epochs") == before.ramp(10, "2 epochs") == 0.5
    assert alone.steps("50%") == 30
    # 5 updates later the same plan comes out; and four processes join
    assert planned((1, 40, 200), 15, **schedule) == alone
    four = planned((4, 10, 200), 15, **schedule)  # 200 of 480 samples: 8.75 updates of 32 are left
    assert (four.batch, four.total, four.shift) == (32, 24, -9)


def test_a_training_counted_in_updates_keeps_them():
    alone = planned((1, 40, 160), 10, duration="30 steps")
    assert (alone.total, alone.shift) == (30, 0)
    assert alone.lr(10) == planned((1, 40, 0), 0, duration="30 steps").lr(10)
    # 160 of 160 samples an epoch of two processes: one epoch, and every update of 8 is 1/20
    assert (alone.epoch(10), alone.epoch(11)) == (1.0, 1.05)
    assert planned((2, 20, 160), 10, duration="30 steps").epoch(11) == 1.1


@pytest.mark.parametrize("duration", ["0 epochs", 0, "0 steps"])
def test_a_training_without_an_update_is_refused(duration):
    with pytest.raises(UserError, match="no update at all"):
        planned((1, 40, 0), 0, duration=duration)


def test_constant_and_linear_shapes():
    constant = learning_rate(Schedule(sched="constant", warmup="0 steps"), 1e-3, total=50, **SIZES)
    assert {constant(step) for step in range(50)} == {1e-3}
    cooled = Schedule(sched="constant", warmup="10%", warmup_lr=0.0, cooldown="40%", min_lr=0.2)
    at = learning_rate(cooled, 1.0, total=11, **SIZES)
    expected = [0, 0.5, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36, 0.2]
    assert [at(step) for step in range(12)] == pytest.approx([*expected, 0.2])
    linear = learning_rate(
        Schedule(sched="linear", warmup="0 steps", min_lr=0.0), 1.0, total=11, **SIZES
    )
    assert [linear(step) for step in range(11)] == pytest.approx(
        [1 - step / 10 for step in range(11)]
    )


def test_a_warmup_longer_than_training_is_cut():
    at = learning_rate(Schedule(warmup="5 epochs", warmup_lr=0.0), 1.0, total=100, **SIZES)
    assert at(99) == pytest.approx(0.99)


@pytest.mark.parametrize(
    "sched", ["cosine", "linear", "constant", "rocket", "vit_cosine", "vit_linear", "nxtp"]
)
def test_without_a_warmup_training_begins_at_the_peak(sched):
    schedule = Schedule(sched=sched, warmup="0 steps", warmup_lr=0.0, min_lr=0.0)
    at = learning_rate(schedule, 1.0, total=100, **SIZES)
    assert at(0) == 1 and 0.98 <= at(1) <= 1


def test_ramp():
    assert [ramp(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1


def test_original_schedule_equals_the_originals_at_every_change():
    meta, _ = golden("simla", "lr_schedule")
    for name, run in meta["runs"].items():
        wanted, epoch_steps = run["schedule"], run["iterations_per_epoch"]
        schedule = Schedule(
            duration=wanted["epochs"],
            min_lr=wanted["min_lr"],
            warmup_lr=wanted["warmup_lr"],
            warmup=f"{100 * wanted['warmup_epochs']} steps",
            original_warmup=True,
        )
        total = wanted["epochs"] * epoch_steps
        at = learning_rate(
            schedule, run["optimizer"]["lr"], total=total, epoch_steps=epoch_steps, batch=1
        )
        changes = run["changes"] + [{"global_step": total}]
        for change, following in itertools.pairwise(changes):
            for step in (change["global_step"], following["global_step"] - 1):
                assert at(step) == pytest.approx(change["lr"], rel=1e-9), (name, step)


@pytest.mark.parametrize("name", ["duration", "warmup", "cooldown"])
@pytest.mark.parametrize("slip", ["10 stepps", "-3 steps", "five epochs", ""])
def test_a_slip_in_a_duration_shows_before_any_data_are_read(name, slip):
    with pytest.raises(UserError, match="duration"):
        Schedule(**{name: slip})
