"""System, optimisation and validation of main.py, with clip-rocket's names and defaults."""

from dataclasses import dataclass
from pathlib import Path

import torch

from base import distributed
from base.errors import UserError
from runtime.config.cli import knob, restated, section
from runtime.config.old_names import CLIP_ROCKET, FLAGS_OF_MAIN
from runtime.optim.build import Optimizer
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig, StreamConfig, ValidationConfig


@dataclass
class RocketRunConfig(StreamConfig, ValidationConfig, RunConfig):
    """The run, its optimisation and its validation."""

    IGNORED = CLIP_ROCKET
    NEW_NAMES = FLAGS_OF_MAIN

    seed: int = restated(RunConfig, "seed", 0)
    precision: str = knob(
        "auto", "bf16, else fp16, on GPUs; fp32 elsewhere", choices=("auto", "fp32", "bf16", "fp16")
    )
    disable_amp: bool = knob(False, "--precision fp32", rare=True)
    accumulate: int = restated(RunConfig, "accumulate", 1, aliases=("update_freq",))
    activation_checkpointing: bool = restated(
        RunConfig, "activation_checkpointing", False, aliases=("checkpoint_grad",)
    )
    workers: int = restated(RunConfig, "workers", 10, aliases=("j",))
    log_every: int = restated(RunConfig, "log_every", 25, aliases=("print_freq",))
    wandb: str = restated(RunConfig, "wandb", "off", bare="online")
    offline: bool = knob(False, "with --wandb: offline", rare=True)
    # the optimisation
    init_text_encoder: Path | None = knob(
        None, "checkpoint to take the text transformer's blocks", rare=True
    )
    random_weights: bool = knob(
        False, "a library's network or towers begin without the published weights", rare=True
    )
    lock: list[str] = knob(
        [],
        "towers with weights of a library that are not trained (LiT)",
        choices=("image", "text"),
        rare=True,
    )
    batch_size: int = knob(64, "pairs per process and micro-batch", low=1)
    optimizer: Optimizer = section(
        Optimizer, flat=True, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98)
    )
    duration: str = knob("25 epochs", "length of training", aliases=("epochs",))
    warmup: str = knob("1 epochs", "length of the linear warm-up", aliases=("warmup_epochs",))
    sched: str = knob(
        "rocket",
        "shape of the schedule; ALIGN's is vit_linear; constant stays at the peak until cooldown",
        choices=("rocket", "vit_linear", "constant"),
    )
    cooldown: str = restated(Schedule, "cooldown", "0 steps")
    lr_start: float = knob(1e-6, "learning rate at the first update", low=0)
    lr_end: float = knob(1e-5, "learning rate at the end", low=0)
    # validation
    val_folder: Path | None = knob(None, "class folders for zero-shot validation; none = none")
    val_dataset: str = knob("imagenet", "its name in the two files")
    labels: Path = knob(Path("labels.json"), "class names by data set; not there: OpenAI's")
    templates: Path = knob(
        Path("templates.json"), "templates with {} by data set; not there: OpenAI's"
    )
    eval_every: str = restated(ValidationConfig, "eval_every", "1 epochs", aliases=("eval_freq",))
    evaluate: bool = knob(False, "no training: validate --checkpoint")

    def check(self) -> None:
        """Check that the options are compatible."""
        if self.evaluate and not (self.checkpoint and self.val_folder):
            raise UserError("--evaluate needs --checkpoint and --val-folder")
        if self.random_weights and (self.lock or self.checkpoint or self.network.tower_classes):
            raise UserError("--random-weights excludes --checkpoint, --lock and --tower-classes")
        if not self.evaluate and self.batch_size < 2:
            raise UserError("--batch-size 1: a pair alone has no contrast; train with 2 or more")

    @property
    def loads_published(self) -> bool:
        """Whether networks of libraries begin with the weights that these publish."""
        return self.checkpoint is None and not self.random_weights

    @property
    def scheduler(self) -> Schedule:
        """The schedule that the flags describe."""
        return Schedule(
            sched=self.sched,
            duration=self.duration,
            min_lr=self.lr_end,
            warmup_lr=self.lr_start,
            warmup=self.warmup,
            cooldown=self.cooldown,
        )

    def resolve_auto(self, device: torch.device) -> None:
        """Put plain values where the machine or another flag decides; a file given to --resume is a
        --checkpoint."""
        if self.disable_amp or (self.precision == "auto" and device.type != "cuda"):
            self.precision = "fp32"
        elif self.precision == "auto":
            self.precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if self.offline and self.wandb != "off":
            self.wandb = "offline"
        if Path(self.resume).is_file():
            distributed.say(
                f"--resume {self.resume}: the weights in it are the start, as with --checkpoint, at "
                "update 0; a run resumes when it is started again with its --output-dir"
            )
            self.checkpoint = Path(self.resume)
            self.resume = "auto"
