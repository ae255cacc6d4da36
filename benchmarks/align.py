"""Speed and memory of a training step of ALIGN: ours, with transformers' towers, and the
original's.

    python -m benchmarks.align                                               # ours and transformers, in turn
    python -m benchmarks.align --peer PATH/TO/coyo-align --peer-python PATH  # and TensorFlow's COYO-ALIGN

A step is forward, backward and LAMB of EfficientNet-B3 and BERT-mini at 289 pixels and 64 tokens,
on random images and captions. Loss, optimizer and loop are ours for the two in PyTorch; the
original runs its own, in float32 and as one graph, its virtual batch made that of ours where the
batch is smaller. The table is written to docs/BENCHMARKS.md.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from benchmarks.vit import table
from runtime.config import cli as configuration
from runtime.config.cli import knob


@dataclass
class Config:
    """What to measure."""

    model: str = knob("ALIGN_B3_MINI", "network")
    batch: int = knob(8, "pairs a step", low=2)
    virtual_batch: int = knob(8, "samples of a ghost batch", low=2)
    image_size: int = knob(289, "side of the images in pixels", low=32)
    length: int = knob(64, "tokens of a caption", low=2)
    sides: list[str] = knob(
        ["ours", "transformers"], "in PyTorch", choices=("ours", "transformers")
    )
    precision: str = knob(
        "fp32", "in PyTorch: type of the forward pass", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = knob(False, "in PyTorch: torch.compile")
    peer: str | None = knob(
        None, "checkout of github.com/kakaobrain/coyo-align to measure beside ours"
    )
    peer_python: str | None = knob(
        None, "interpreter with TensorFlow 2.12, tensorflow-addons and transformers 4.38"
    )
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(1, "CPU threads of each side", low=1)
    repeats: int = knob(3, "measurements of each side", low=1)
    warmup: int = knob(1, "steps before the clock starts, in each measurement", low=0)
    steps: int = knob(3, "timed steps of a measurement; their median counts", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


def main(config: Config) -> None:
    if config.peer and not (Path(config.peer) / "models/layers/efficientnet.py").is_file():
        raise UserError(
            f"--peer {config.peer}: no models/layers/efficientnet.py there; it takes a checkout of coyo-align"
        )
    if config.peer and not config.peer_python:
        raise UserError(
            "--peer needs --peer-python, an interpreter with TensorFlow 2.12 and tensorflow-addons"
        )
    load = os.getloadavg()[0]
    scripts = dict.fromkeys(config.sides, "align_ours") | (
        {"peer": "align_peer"} if config.peer else {}
    )
    results = bench.take_turns(config, scripts)
    first = next(iter(results.values()))[0]
    body = f"{table(results, config.batch)}\n\n{first['parameters'] / 1e6:.1f} million parameters."
    body += f" The original by {results['peer'][0]['torch']}, float32." if config.peer else ""
    body += f" Machine: {bench.machine(first, config.threads)}.{bench.disturbed(load)}"
    settings = [
        config.model,
        f"{config.image_size} pixels",
        f"batch {config.batch}",
        config.precision,
    ]
    title = ", ".join(["ALIGN step", *settings, first["device"], *["compiled"] * config.compile])
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'align')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
