"""Durations in any unit, and learning rates as pure functions of the step."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from base.errors import UserError
from base.knobs import knob
from runtime.config.old_names import SCHEDULE

# "500 steps", "3 epochs", "1e6 samples", "5%"; a bare number counts epochs
Duration = str
# the number and its unit: the e of "3epochs" begins the unit
DURATION = re.compile(r"\s*([+-]?[\d._]+(?:[eE][+-]?\d+)?)\s*(%|[a-z]*)\s*")


@dataclass
class Schedule:
    """Learning-rate schedule; names as in the `schedular` section of the SIMLA / ALBEF
    configurations."""

    sched: str = knob(
        "cosine",
        "shape after the warm-up; rocket: CLIP-rocket's cosine, whose warm-up ends on the peak and which stops one "
        "step before min_lr; vit_cosine, vit_linear: COYO-ViT's, which reach min_lr behind the last step; nxtp: its "
        "own, whose first step has the peak rate and whose warm-up begins, at 0, with the second",
        choices=("cosine", "linear", "constant", "rocket", "vit_cosine", "vit_linear", "nxtp"),
    )
    duration: Duration = knob(
        "30 epochs",
        "length of training: epochs, or with a unit: 'steps', 'epochs', 'samples'",
        aliases=("epochs",),
    )
    min_lr: float = knob(1e-5, "learning rate at the end, absolute", low=0)
    warmup_lr: float = knob(1e-5, "learning rate at the first step, absolute", low=0)
    warmup: Duration = knob(
        "5%", "length of the linear warm-up: 'steps', 'epochs', 'samples' or '%' of training"
    )
    cooldown: Duration = knob(
        "0 steps",
        "of constant: length of the linear descent to min_lr at the end, in the units of warmup",
        rare=True,
    )
    power: float = knob(
        1.0, "of vit_linear: exponent of the fraction of training that is left", low=0, rare=True
    )
    original_warmup: bool = knob(
        False,
        "as SIMLA and ALBEF: the warm-up in stairs of 100 updates inside epoch 0, then one value an epoch",
        rare=True,
    )

    def __post_init__(self):
        for duration in (self.duration, self.warmup, self.cooldown):  # before any data are read
            steps(duration, epoch_steps=1, batch=1, total=1)

    IGNORED = SCHEDULE
    ELSEWHERE = MappingProxyType({"lr": "optimizer.lr"})
    OLD_NAMES = ("warmup_epochs",)

    @staticmethod
    def translate(values: dict, notes: list[str]) -> dict:
        """SIMLA's and ALBEF's `warmup_epochs: 20`, which counts stairs of 100 updates in epoch 0.

        Files that this project saved hold it beside `original_warmup: false`, without effect, and
        an empty `lr`.
        """
        if values.get("lr", "set") is None:
            del values["lr"]
        stairs = values.pop("warmup_epochs", None)
        if stairs is None or values.get("original_warmup") is False:
            return values
        if not isinstance(stairs, int) or stairs < 0:
            raise UserError(f"warmup_epochs {stairs}: expected a whole number of 100 updates")
        return values | {"warmup": f"{100 * stairs} steps", "original_warmup": True}


def steps(
    duration: Duration | float,
    *,
    epoch_steps: int,
    batch: int,
    total: int | None = None,
) -> int:
    """Number of optimizer steps in `duration`.

    epoch_steps: optimizer steps an epoch; batch: samples a step over all processes; total: steps of
    the whole training, needed for percentages. UserError for an unknown unit or a negative duration.
    """
    match = DURATION.fullmatch(str(duration))
    try:
        amount = float(match[1].replace("_", ""))
    except (TypeError, ValueError):
        raise UserError(
            f"duration {duration!r}: write e.g. '500 steps', '3 epochs', '1e6 samples' or '5%'"
        ) from None
    name = match[2] or "epochs"
    scale = {"step": 1, "epoch": epoch_steps, "sample": 1 / batch}
    if name == "%":
        if total is None:
            raise UserError(
                f"duration {duration!r}: a percentage has no meaning here; use steps, epochs or samples"
            )
        scale["%"] = total / 100
    count = amount * scale.get(name.rstrip("s"), math.nan)
    if not 0 <= count < math.inf:
        raise UserError(
            f"duration {duration!r}: use a finite number >= 0 with one of steps, epochs, samples or %"
        )
    return math.ceil(round(count, 6))


def counts_updates(duration: Duration | float) -> bool:
    """Whether a duration is a number of updates."""
    return str(duration).strip().endswith(("step", "steps"))


def learning_rate(
    schedule: Schedule, peak: float, *, total: int, epoch_steps: int, batch: int
) -> Callable[[int], float]:
    """Function step -> learning rate that the update of this step uses (first step is 0).

    Default: linear from `warmup_lr` to `peak` over the warm-up, then cosine or linear to `min_lr`
    at the last step; constant stays at the peak until `cooldown` before the end, then goes there
    linearly (warmup-stable-decay).
    With `original_warmup`: the stairs of SIMLA / ALBEF (see `original_learning_rate`).
    """
    warmup = steps(schedule.warmup, epoch_steps=epoch_steps, batch=batch, total=total)
    if schedule.original_warmup:
        epochs = max(1, total // epoch_steps)
        return lambda step: original_learning_rate(
            schedule, peak, step, epoch_steps, epochs, stairs=round(warmup / 100)
        )
    warmup = min(warmup, total)
    cooldown = steps(schedule.cooldown, epoch_steps=epoch_steps, batch=batch, total=total)

    if schedule.sched == "rocket":
        return lambda step: rocket_learning_rate(schedule, peak, step, warmup, total)
    if schedule.sched == "nxtp":
        return lambda step: nxtp_learning_rate(schedule, peak, step, warmup, total)
    if schedule.sched.startswith("vit_"):
        return lambda step: vit_learning_rate(schedule, peak, step, warmup, total)

    def at(step: int) -> float:
        if step < warmup:
            return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / warmup
        if schedule.sched == "constant":
            left = max(0, total - 1 - step)
            if left >= cooldown:
                return peak
            return schedule.min_lr + (peak - schedule.min_lr) * left / cooldown
        done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        factor = 0.5 * (1 + math.cos(math.pi * done)) if schedule.sched == "cosine" else 1 - done
        return schedule.min_lr + (peak - schedule.min_lr) * factor

    return at


def original_learning_rate(
    schedule: Schedule, peak: float, step: int, epoch_steps: int, epochs: int, stairs: int
) -> float:
    """Learning rate of the SIMLA / ALBEF loops at optimizer step `step` (0-based).

    In epoch 0 the rate rises by one stair after every 100 iterations, `stairs` in all, and stays at
    the peak; epoch e >= 1 uses the cosine at e. An epoch shorter than the warm-up cuts it, and
    epoch 1 jumps.
    """
    epoch, iteration = divmod(step, epoch_steps)
    if epoch == 0:
        # the update of iteration i sees the value set after iteration i - 1, hence the minus one
        reached = min(stairs, max(0, iteration - 1) // 100)
        if stairs == 0 or reached >= stairs:
            return peak
        return schedule.warmup_lr + reached * (peak - schedule.warmup_lr) / stairs
    if epoch >= epochs:
        return schedule.min_lr
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (
        1 + math.cos(math.pi * epoch / epochs)
    )


def rocket_learning_rate(
    schedule: Schedule, peak: float, step: int, warmup: int, total: int
) -> float:
    """Learning rate of CLIP-rocket and SLIP: `warmup` values evenly from warmup_lr to the peak,
    both reached; then a cosine that starts at the peak again and would be at min_lr at step
    `total`."""
    if step < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / max(1, warmup - 1)
    done = (step - warmup) / (total - warmup)
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * done))


def nxtp_learning_rate(
    schedule: Schedule, peak: float, step: int, warmup: int, total: int
) -> float:
    """Learning rate of NXTP's loop at optimizer step `step` (0-based). It sets a step's rate behind
    that step, so that the first has the peak and all others lag by one; the cosine would reach
    min_lr at step total + 1."""
    done = step - 1
    if done < 0:
        return peak
    if done < warmup:
        return peak * done / warmup
    factor = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))
    return schedule.min_lr + (peak - schedule.min_lr) * factor


def vit_learning_rate(schedule: Schedule, peak: float, step: int, warmup: int, total: int) -> float:
    """Learning rate of COYO-ViT at optimizer step `step` (0-based): a warm-up that begins at
    warmup_lr, then a cosine or a power of the fraction that is left, down to min_lr at step `total`. As
    published the decay begins at the peak less warmup_lr: with a warmup_lr other than 0 it jumps.
    """
    rise = max(peak - schedule.warmup_lr, 0)
    if step < warmup:
        return schedule.warmup_lr + rise * step / warmup
    left = 1 - (min(step, total) - warmup) / max(1, total - warmup)
    factor = (
        0.5 * (1 - math.cos(math.pi * left))
        if schedule.sched == "vit_cosine"
        else left**schedule.power
    )
    return schedule.min_lr + (rise - schedule.min_lr) * factor


def ramp(step: int, length: int) -> float:
    """Linear ramp from 0 at step 0 to 1 at step `length` and after; 1 where the length is 0."""
    return 1.0 if step >= length else step / length


@dataclass(frozen=True)
class Plan:
    """What the configuration comes to: how many updates, at which learning rates.

    epoch_steps: updates an epoch; batch: samples an update over all processes; total: updates of
    the training. shift: how many more updates of this batch the samples seen would be than were
    made; other than 0 behind a change of the number of processes or of the batch size, and where the
    training is counted in updates in `seen` alone, by which the log counts epochs.
    """

    schedule: Schedule
    peak_lr: float
    epoch_steps: int
    batch: int
    total: int
    shift: int = 0
    seen: int = 0

    @classmethod
    def of(
        cls, schedule: Schedule, peak_lr: float, *, loader_steps: int, accumulate: int, batch: int
    ) -> "Plan":
        """loader_steps: micro-batches an epoch and process; accumulate: micro-batches an update;
        batch: see above."""
        epoch_steps = max(1, loader_steps // accumulate)
        total = steps(schedule.duration, epoch_steps=epoch_steps, batch=batch)
        if not total:
            raise UserError(
                f"duration {schedule.duration!r}: no update at all; train for one or more"
            )
        return cls(schedule, peak_lr, epoch_steps, batch, total)

    @classmethod
    def of_loader(
        cls, schedule: Schedule, peak_lr: float, loader, accumulate: int, done: int = 0
    ) -> "Plan":
        """loader: a StreamLoader; accumulate: its batches per update; done: updates made so far.

        A training counted in epochs or samples keeps its length in samples, and its learning rate
        follows them; one counted in updates keeps these.
        """
        batch = loader.batch_size * accumulate * loader.world_size
        plan = cls.of(
            schedule,
            peak_lr,
            loader_steps=loader.steps_per_epoch,
            accumulate=accumulate,
            batch=batch,
        )
        if not done:
            return plan
        shift = loader.samples // batch - done
        if counts_updates(schedule.duration):
            return replace(plan, seen=shift)
        return replace(plan, total=plan.total - shift, shift=shift, seen=shift)

    def position(self, step: int) -> int:
        """Updates of this batch that the samples before update `step` would be."""
        return step + self.shift

    def epoch(self, step: int) -> float:
        """Epochs that the samples before update `step` come to."""
        return (step + self.seen) / self.epoch_steps

    def ramp(self, step: int, duration: Duration) -> float:
        """Linear ramp over `duration`, from 0 before the first update of the training to 1."""
        return ramp(self.position(step), self.steps(duration))

    @property
    def warmup(self) -> int:
        """Updates of warm-up that the configuration asks for; they may be more than there is room for."""
        return self.steps(self.schedule.warmup)

    @property
    def warmup_room(self) -> int:
        """Updates that the warm-up may take: all, or for the original one those of the first epoch."""
        return self.epoch_steps if self.schedule.original_warmup else self.position(self.total)

    def steps(self, duration: Duration) -> int:
        """Updates in `duration`."""
        whole = self.position(self.total)
        return steps(duration, epoch_steps=self.epoch_steps, batch=self.batch, total=whole)

    def lr(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        whole = self.position(self.total)
        sizes = {"total": whole, "epoch_steps": self.epoch_steps, "batch": self.batch}
        return learning_rate(self.schedule, self.peak_lr, **sizes)(self.position(step))
