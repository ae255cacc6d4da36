"""Memory of the tiled contrastive loss at a global batch that the dense one cannot hold.

    python -m benchmarks.contrastive                  # 65,536 pairs of 512 numbers on one process, tile 2048
    python -m benchmarks.contrastive --pairs 8192     # small enough that the dense loss runs beside it

Value and gradients of CLIP's loss of random features on the CPU. Up to 16,384 pairs the dense loss
is computed as well and both are compared.
"""

import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks.gauge import measure_once, peak_bytes
from benchmarks.inputs import leave, left
from benchmarks.runner import Options, take_turns
from benchmarks.table import CPU_SECONDS, MEMORY, SECONDS, Column, publish
from models.dual_encoder.losses import Views, clip_loss, normalize
from runtime.config.cli import knob, run_script

DENSE = "dense"
DENSE_UP_TO = 16384  # pairs
COLUMNS = [
    Column("loss", "loss", "{:.7g}"),
    SECONDS,
    CPU_SECONDS,
    MEMORY,
    Column("of it before the loss", "before", "{:.2f} GiB", 2**-30),
]


@dataclass
class Config(Options):
    """What to measure."""

    pairs: int = knob(65536, "pairs of the global batch", low=2)
    width: int = knob(512, "numbers of a feature", low=1)
    tile: int = knob(2048, "rows and columns of the logits in memory at a time", low=1)
    device: str = knob("cpu", "only the CPU is measured", choices=("cpu",))


def loss_and_gradients(options: SimpleNamespace) -> dict:
    """CLIP's loss, dense or in tiles: value, time and memory; leaves the gradients."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(options.pairs, options.width, generator=rng)
    text = torch.randn(options.pairs, options.width, generator=rng).mul_(2).add_(image)
    scale = torch.tensor(14.0)
    inputs = {"image": image, "text": text, "scale": scale}
    for value in inputs.values():
        value.requires_grad_()
    tile = None if options.side == DENSE else options.tile
    before = peak_bytes("cpu")

    def compute() -> float:
        images = normalize(image)[:, None]
        texts = normalize(text)[:, None]
        loss = clip_loss(Views(images, texts, images, texts, first=0), scale, tile=tile).loss
        loss.backward()
        return loss.item()

    loss, result = measure_once(compute)
    leave(options, options.side, {name: value.grad for name, value in inputs.items()})
    return {**result, "loss": loss, "peak_bytes": peak_bytes("cpu"), "before": before}


def main(config: Config) -> None:
    tiled = f"tiles of {config.tile}"
    sides = {tiled: "benchmarks.contrastive:loss_and_gradients"}
    if config.pairs <= DENSE_UP_TO:
        sides[DENSE] = sides[tiled]
    remark = ""
    with tempfile.TemporaryDirectory() as folder:
        results = take_turns(config, sides, exchange=folder)
        if DENSE in sides:
            found = SimpleNamespace(exchange=folder)
            mine, theirs = left(found, tiled), left(found, DENSE)
            each = [
                float((mine[name] - grad).norm() / grad.norm()) for name, grad in theirs.items()
            ]
            remark = "Largest relative difference of a gradient between the two: "
            remark += f"{max(each):.1e}."
    title = ["Contrastive loss and gradients", f"{config.pairs:,} pairs of {config.width}"]
    publish(config, "contrastive", [*title, "one CPU process"], results, COLUMNS, remark)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
