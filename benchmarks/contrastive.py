"""Memory of the tiled contrastive loss at a global batch that the dense one cannot hold, and its
equality to it.

    python -m benchmarks.contrastive                  # 65,536 pairs of 512 numbers on one process, tile 2048
    python -m benchmarks.contrastive --pairs 8192     # small enough that the dense loss runs beside it

Value and gradients of CLIP's loss of random features on the CPU, each variant in a process of its
own. Up to 16,384 pairs the dense loss is computed as well and both are compared. The table is
written to docs/BENCHMARKS.md.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import pretrain as bench
from benchmarks.common import about, peak_bytes
from runtime.config import cli as configuration
from runtime.config.cli import knob

DENSE_UP_TO = 16384


@dataclass
class Config:
    """What to measure."""

    pairs: int = knob(65536, "pairs of the global batch", low=2)
    width: int = knob(512, "numbers of a feature", low=1)
    tile: int = knob(2048, "rows and columns of the logits in memory at a time", low=1)
    threads: int = knob(2, "CPU threads", low=1)
    worker: str = knob("", "used by the script itself: run one variant and save the gradients here")
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


def one_variant(config: Config, tile: int | None) -> dict:
    """Loss and gradients of CLIP's loss with tiles of `tile`, dense for None; the gradients go to
    `config.worker`."""
    from models.dual_encoder.losses import clip_loss, normalize

    torch.set_num_threads(config.threads)
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(config.pairs, config.width, generator=rng)
    text = torch.randn(config.pairs, config.width, generator=rng).mul_(2).add_(image)
    scale = torch.tensor(14.0, requires_grad=True)
    before, begin, cpu = peak_bytes(torch.device("cpu")), time.perf_counter(), time.process_time()
    images, texts = (normalize(side.requires_grad_())[:, None] for side in (image, text))
    found = clip_loss(images, texts, images, texts, scale, tile=tile)
    loss = (found.loss_image + found.loss_text) / 2
    loss.backward()
    result = {
        "loss": loss.item(),
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
    }
    result |= {"peak_bytes": peak_bytes(torch.device("cpu")), "before": before}
    torch.save({"image": image.grad, "text": text.grad, "scale": scale.grad}, config.worker)
    return result | about(torch.device("cpu"))


def run(config: Config, tile: int, file: Path) -> dict:
    """`one_variant` in a fresh process; tile 0 is the dense loss."""
    import subprocess

    values = {
        "pairs": config.pairs,
        "width": config.width,
        "tile": max(tile, 1),
        "threads": config.threads,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "benchmarks.contrastive",
        *flags,
        "--worker",
        str(file),
        "--report",
        "dense" * (tile == 0),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=bench.ROOT)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(config: Config) -> None:
    if config.worker:
        return print(
            json.dumps(one_variant(config, None if config.report == "dense" else config.tile))
        )
    variants = {f"tiles of {config.tile}": config.tile} | (
        {"dense": 0} if config.pairs <= DENSE_UP_TO else {}
    )
    lines = [
        "| | loss | seconds | CPU seconds | peak memory | of it before the loss |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.pt" for number, name in enumerate(variants)}
        for name, tile in variants.items():
            found = run(config, tile, files[name])
            times = f"{found['seconds']:.1f} | {found['cpu_seconds']:.1f}"
            memory = f"{found['peak_bytes'] / 2**30:.2f} GiB | {found['before'] / 2**30:.2f} GiB"
            lines.append(f"| {name} | {found['loss']:.7g} | {times} | {memory} |")
            print(lines[-1], flush=True)
        body = "\n".join(lines)
        if len(variants) == 2:
            tiled, dense = (torch.load(file, weights_only=True) for file in files.values())
            worst = max(((tiled[k] - dense[k]).norm() / dense[k].norm()).item() for k in dense)
            body += f"\n\nLargest relative difference of a gradient between the two: {worst:.1e}."
    body += f"\n\nMachine: {bench.machine(found, config.threads)}."
    title = (
        f"Contrastive loss and gradients, {config.pairs:,} pairs of {config.width}, one CPU process"
    )
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'contrastive')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
