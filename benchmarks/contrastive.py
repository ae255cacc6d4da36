"""Memory of the tiled contrastive loss at a global batch that the dense one cannot hold, and its
equality to it.

    python -m benchmarks.contrastive                  # 65,536 pairs of 512 numbers on one process, tile 2048
    python -m benchmarks.contrastive --pairs 8192     # small enough that the dense loss runs beside it

Value and gradients of CLIP's loss of random features on the CPU. Up to 16,384 pairs the dense loss
is computed as well and both are compared.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.gauge import measure_once, peak_bytes
from benchmarks.runner import Options, Side, take_turns
from benchmarks.table import CPU_SECONDS, MEMORY, SECONDS, Column, publish, table
from runtime.config.cli import knob, run_script

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
    """CLIP's loss in tiles, or dense without `options.tile`: value, time and memory. `options.file`
    gets the gradients."""
    from models.dual_encoder.losses import Views, clip_loss, normalize

    rng = torch.Generator().manual_seed(0)
    image = torch.randn(options.pairs, options.width, generator=rng)
    text = torch.randn(options.pairs, options.width, generator=rng).mul_(2).add_(image)
    image.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(14.0, requires_grad=True)
    before = peak_bytes("cpu")

    def compute() -> float:
        images = normalize(image)[:, None]
        texts = normalize(text)[:, None]
        views = Views(images, texts, images, texts, first=0)
        loss = clip_loss(views, scale, tile=options.tile).loss
        loss.backward()
        return loss.item()

    loss, result = measure_once(compute)
    gradients = {"image": image.grad, "text": text.grad, "scale": scale.grad}
    torch.save(gradients, Path(options.exchange) / options.file)
    return {**result, "loss": loss, "peak_bytes": peak_bytes("cpu"), "before": before}


def largest_difference(folder: str) -> float:
    """Largest relative difference of a gradient between both variants."""
    tiled = torch.load(Path(folder) / "tiled.pt", weights_only=True)
    dense = torch.load(Path(folder) / "dense.pt", weights_only=True)
    return max(float((tiled[name] - dense[name]).norm() / dense[name].norm()) for name in dense)


def main(config: Config) -> None:
    function = "benchmarks.contrastive:loss_and_gradients"
    sides = [Side(f"tiles of {config.tile}", function, settings={"file": "tiled.pt"})]
    if config.pairs <= DENSE_UP_TO:
        sides.append(Side("dense", function, settings={"file": "dense.pt", "tile": None}))
    with tempfile.TemporaryDirectory() as folder:
        results = take_turns(config, sides, exchange=folder)
        body = table(results, COLUMNS)
        if len(sides) == 2:
            difference = largest_difference(folder)
            body += "\n\nLargest relative difference of a gradient between the two: "
            body += f"{difference:.1e}."
    title = ["Contrastive loss and gradients", f"{config.pairs:,} pairs of {config.width}"]
    publish(config, "contrastive", [*title, "one CPU process"], body, results)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
