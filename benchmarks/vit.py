"""Speed and memory of a multi-label pre-training step of ViT-B/16: ours, timm's, transformers' and
the original's.

    python -m benchmarks.vit                                             # ours, timm and transformers, alternating
    python -m benchmarks.vit --peer PATH/TO/coyo-vit --peer-python PATH  # and TensorFlow's COYO-ViT

A step is forward, backward, global-norm clipping and AdamW of ViT-B/16 with the tanh layer and
21,841 classes, on random images of 224 px. Loss, optimizer and loop are ours for the three in
PyTorch; the original runs its own, in float32 and as one graph. Each measurement is a process of
its own, in turn. The table is written to docs/BENCHMARKS.md.
"""

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from runtime.config import cli as configuration
from runtime.config.cli import knob

NAMES = {
    "ours": "ours",
    "timm": "timm",
    "transformers": "transformers",
    "peer": "original (TensorFlow)",
}


@dataclass
class Config:
    """What to measure."""

    model: str = knob("vit-b/16", "network", choices=("vit-b/16", "vit-l/16"))
    batch: int = knob(4, "images a step", low=1)
    image_size: int = knob(224, "side of the images in pixels", low=16)
    classes: int = knob(21841, "classes", low=2)
    sides: list[str] = knob(
        ["ours", "timm", "transformers"], "in PyTorch", choices=("ours", "timm", "transformers")
    )
    precision: str = knob(
        "fp32", "in PyTorch: type of the forward pass", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = knob(False, "in PyTorch: torch.compile")
    activation_checkpointing: bool = knob(
        False, "in PyTorch: recompute blocks in the backward pass"
    )
    peer: str | None = knob(
        None, "checkout of github.com/kakaobrain/coyo-vit to measure beside ours"
    )
    peer_python: str | None = knob(None, "interpreter with TensorFlow 2.12")
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(3, "measurements of each side", low=1)
    warmup: int = knob(1, "steps before the clock starts, in each measurement", low=0)
    steps: int = knob(3, "timed steps of a measurement; their median counts", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


def table(results: dict[str, list[dict]], batch: int) -> str:
    """Markdown, a row a side; ratios are medians over the turns of a side's time over ours."""
    head = [
        "",
        "seconds a step",
        "CPU seconds",
        "images/s",
        "peak memory",
        "ours is faster by",
        "by CPU time",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for side, runs in results.items():
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("seconds", "cpu_seconds", "peak_bytes")
        }
        spread = (
            f"{min(run['seconds'] for run in runs):.2f}-{max(run['seconds'] for run in runs):.2f}"
        )
        ratios = ["", ""]
        if side != "ours" and "ours" in results:
            pairs = list(zip(results["ours"], runs, strict=True))
            medians = (
                statistics.median(b[key] / a[key] for a, b in pairs)
                for key in ("seconds", "cpu_seconds")
            )
            ratios = [f"{ratio:.2f} x" for ratio in medians]
        times = [f"{middle['seconds']:.2f} ({spread})", f"{middle['cpu_seconds']:.2f}"]
        memory = f"{middle['peak_bytes'] / 2**30:.2f} GiB"
        cells = [NAMES[side], *times, f"{batch / middle['seconds']:.2f}", memory, *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_config(config: Config) -> None:
    """Raise UserError where the settings cannot be measured."""
    if config.peer and not (Path(config.peer) / "backbones/vit/vit_model.py").is_file():
        raise UserError(
            f"--peer {config.peer}: no backbones/vit/vit_model.py there; it takes a checkout of coyo-vit"
        )
    if config.peer and not config.peer_python:
        raise UserError(
            "--peer needs --peer-python, an interpreter with TensorFlow 2.12 and tensorflow-addons"
        )


def main(config: Config) -> None:
    check_config(config)
    load = os.getloadavg()[0]
    scripts = dict.fromkeys(config.sides, "vit_ours") | (
        {"peer": "vit_peer"} if config.peer else {}
    )
    results = bench.take_turns(config, scripts)
    first = next(iter(results.values()))[0]
    body = f"{table(results, config.batch)}\n\n{first['parameters'] / 1e6:.1f} million parameters."
    if config.peer:
        body += f" The original by {results['peer'][0]['torch']}, float32."
    body += f" Machine: {bench.machine(first, config.threads)}.{bench.disturbed(load)}"
    extra = ["compiled"] * config.compile + [
        "activation checkpointing"
    ] * config.activation_checkpointing
    settings = [
        f"{config.model}, {config.classes:,} classes",
        f"batch {config.batch}",
        config.precision,
    ]
    title = ", ".join(["Classification step", *settings, first["device"], *extra])
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'vit')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
