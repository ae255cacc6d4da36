"""Memory of the tiled contrastive loss at a global batch that the dense one cannot hold.

    python -m benchmarks.contrastive                  # 65,536 pairs of 512 numbers on one process, tile 2048
    python -m benchmarks.contrastive --pairs 8192     # small enough that the dense loss runs beside it

Value and gradients of CLIP's loss of random features on the CPU. Up to 16,384 pairs the dense loss
is computed as well and both are compared.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks.child import measure_once, peak_bytes
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
    Column("gradients differ by at most", "difference", "{:.1e}"),
]


@dataclass
class Config(Options):
    pairs: int = knob(65536, "pairs of the global batch", low=2)
    width: int = knob(512, "numbers of a feature", low=1)
    tile: int = knob(2048, "rows and columns of the logits in memory at a time", low=1)
    device: str = knob("cpu", "only the CPU is measured", choices=("cpu",))


def loss_and_gradients(options: SimpleNamespace) -> dict:
    """CLIP's loss, dense or in tiles: value, time and memory; of the dense one also how far its
    gradients are from those that the tiled one left."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(options.pairs, options.width, generator=rng)
    text = torch.randn(options.pairs, options.width, generator=rng).mul_(2).add_(image)
    inputs = [value.requires_grad_() for value in (image, text, torch.tensor(14.0))]
    tile = None if options.side == DENSE else options.tile
    before = peak_bytes("cpu")

    def compute() -> float:
        images, texts = normalize(image)[:, None], normalize(text)[:, None]
        views = Views(images, texts, images, texts, first=0)
        loss = clip_loss(views, inputs[2], tile=tile).loss
        loss.backward()
        return loss.item()

    loss, result = measure_once(compute)
    result |= {"loss": loss, "peak_bytes": peak_bytes("cpu"), "before": before}
    gradients = [value.grad for value in inputs]
    if tile:
        leave(options, gradients)
        return result
    pairs = zip(gradients, left(options), strict=True)
    differences = [float((tiled - grad).norm() / grad.norm()) for grad, tiled in pairs]
    return {**result, "difference": max(differences)}


def main(config: Config) -> None:
    sides = [f"tiles of {config.tile}"]
    if config.pairs <= DENSE_UP_TO:
        sides.append(DENSE)
    results = take_turns(config, dict.fromkeys(sides, "benchmarks.contrastive:loss_and_gradients"))
    title = ["Contrastive loss and gradients", f"{config.pairs:,} pairs of {config.width}"]
    publish(config, "contrastive", [*title, "one CPU process"], results, COLUMNS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
