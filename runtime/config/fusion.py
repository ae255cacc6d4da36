"""Options that the scripts of fusion encoders share, and the weights that fine-tuning starts from."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from base import distributed
from base.distributed import World
from base.errors import UserError
from runtime.checkpoint import read_weights
from runtime.config import originals
from runtime.config.cli import knob, section
from runtime.config.networks import Geometry, fill_geometry
from runtime.config.old_names import FINE_TUNING, FLAGS_OF_FINE_TUNING
from runtime.optim.build import Optimizer, Precision
from runtime.optim.schedule import Plan, Schedule
from runtime.options import RunConfig, ValidationConfig
from runtime.run import seed_everything


def fine_tuning_schedule(duration: str, warmup: str) -> Any:
    """A `scheduler` section whose cosine ends at 1e-6, as ALBEF's do."""
    return section(
        Schedule, aliases=("schedular",), flat=True, duration=duration, min_lr=1e-6, warmup=warmup
    )


@dataclass
class FineTuneConfig(Geometry, ValidationConfig, RunConfig):
    """Knobs of every fine-tuning script."""

    evaluate: bool = knob(False, "no training: score the checkpoint")
    batch_size_train: int = knob(
        32, "samples per process and micro-batch", low=1, aliases=("batch_size",)
    )
    batch_size_test: int = knob(32, "samples per forward pass in evaluation", low=1)
    alpha: float = knob(0.4, "weight of the teacher's soft targets", low=0, high=1)
    distill: bool = knob(True, "use the momentum teacher's soft targets")
    warm_up: bool = knob(True, "alpha rises linearly from 0 during the first epoch")
    momentum: float = knob(0.995, "momentum of the teacher, per update", low=0, high=1)
    compat: str = knob(
        "none", "'original' reproduces the published code's numbers", choices=("none", "original")
    )
    max_words: int = knob(30, "words kept of a text", low=1)
    crop_scale: tuple[float, float] | None = knob(
        (0.5, 1.0), "area of the random crop, of the image; none = whole", low=0, high=1
    )
    flip: bool = knob(
        True, "horizontal flip with probability 0.5; no where texts say left and right"
    )
    error_budget: float = knob(
        0.01, "fraction of unreadable samples at which the run stops", low=0, high=1
    )
    augment_level: float = knob(
        7, "strength of RandAugment's two operations; 0 = none of them", low=0, high=10
    )
    optimizer: Optimizer = section(Optimizer, flat=True, lr=2e-5)
    scheduler: Schedule = fine_tuning_schedule(duration="5 epochs", warmup="100 steps")

    IGNORED = FINE_TUNING
    NEW_NAMES = FLAGS_OF_FINE_TUNING
    translate = staticmethod(originals.fine_tuning)

    def alpha_at(self, step: int, plan: Plan) -> float:
        """Weight of the teacher's soft targets in update `step`, counted from 0. A script gives it to
        the network as a tensor: for every new number torch.compile would compile again."""
        return self.alpha * (plan.ramp(step, "1 epochs") if self.warm_up else 1.0)


class Start(NamedTuple):
    """What a fine-tuning script starts from."""

    world: World
    weights: dict[str, Tensor]  # of --checkpoint; {} without one
    precision: Precision


def prepare(config: FineTuneConfig) -> Start:
    """Join the processes, seed them alike, and read `--checkpoint`. Architecture options that are
    unset become those of the run that made it."""
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    if config.evaluate and config.checkpoint is None:
        raise UserError("--evaluate needs --checkpoint: a file or the directory of a run")
    weights = read_weights(config.checkpoint) if config.checkpoint else {}
    fill_geometry(config, weights)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    return Start(world, weights, precision)
