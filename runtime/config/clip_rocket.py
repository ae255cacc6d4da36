"""What every run has, under the names and with the defaults of clip-rocket's command line."""

from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.config.cli import knob
from runtime.run import RunConfig


@dataclass
class IgnoredFlags:
    """Accepted from clip-rocket's command line, without effect."""

    attn_layer: str = knob(
        "flash", "always the fastest; both compute the same", choices=("flash", "standard")
    )
    start_epoch: int = knob(0, "a run goes on where its checkpoint stands")
    gpu: int | None = knob(None, "the launcher chooses; see --device")
    name: str = knob("CLIP_ROCKET", "a run is known by its --output-dir")
    no_share_token: bool = knob(False, "had no effect")
    semi_paired: bool = knob(
        False, "unfinished in clip-rocket: its losses cannot take more images than texts"
    )
    unpaired_ratio: int = knob(4, "belongs to --semi-paired")
    metadata_unpaired: str = knob("", "belongs to --semi-paired")
    workers_unpaired: int = knob(5, "belongs to --semi-paired")


@dataclass
class RocketRunConfig(IgnoredFlags, RunConfig):
    """System."""

    seed: int = knob(0, "one seed for weights, data order and augmentation")
    precision: str = knob(
        "auto", "bf16, else fp16, on GPUs; fp32 elsewhere", choices=("auto", "fp32", "bf16", "fp16")
    )
    disable_amp: bool = knob(False, "--precision fp32")
    accumulate: int = knob(1, "micro-batches per update", low=1, aliases=("update_freq",))
    activation_checkpointing: bool = knob(
        False, "recompute blocks in the backward pass", aliases=("checkpoint_grad",)
    )
    workers: int = knob(10, "loader processes per training process", low=0, aliases=("j",))
    log_every: int = knob(25, "updates between two log lines", low=1, aliases=("print_freq",))
    wandb: str = knob(
        "off", "Weights & Biases", choices=("off", "online", "offline"), bare="online"
    )
    offline: bool = knob(False, "with --wandb: offline")

    def settle(self, device: torch.device) -> None:
        """Put plain values where the machine or another flag decides; a file given to --resume is a
        --checkpoint."""
        if self.disable_amp or (self.precision == "auto" and device.type != "cuda"):
            self.precision = "fp32"
        elif self.precision == "auto":
            self.precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if self.offline and self.wandb != "off":
            self.wandb = "offline"
        if Path(self.resume).is_file():
            self.checkpoint, self.resume = Path(self.resume), "auto"
