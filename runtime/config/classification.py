"""System, optimisation and validation of Classification.py."""

from dataclasses import dataclass

from runtime.config.cli import knob, restated, section
from runtime.config.old_names import FLAGS_OF_VIT, TIMM
from runtime.optim.build import Optimizer
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig, StreamConfig, ValidationConfig


@dataclass
class ClassificationRunConfig(StreamConfig, ValidationConfig, RunConfig):
    """The run, its optimisation and its validation."""

    IGNORED = TIMM
    NEW_NAMES = FLAGS_OF_VIT

    workers: int = restated(RunConfig, "workers", 4, aliases=("j",))
    batch_size: int = knob(64, "images per process and micro-batch", low=1, aliases=("b",))
    batch_size_test: int = knob(64, "images per forward pass in evaluation", low=1)
    optimizer: Optimizer = section(Optimizer, flat=True, lr=1e-3, clip_grad_norm=1.0)
    scheduler: Schedule = section(
        Schedule, flat=True, duration="8 epochs", min_lr=0.0, warmup_lr=0.0, warmup="500 steps"
    )
