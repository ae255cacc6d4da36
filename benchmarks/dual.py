"""Speed and memory of a dual encoder's training step: CLIP beside open_clip, CL2L beside
clip-rocket, ViT-B/16.

    python -m benchmarks.dual                                     # CLIP: ours and open_clip's, alternating
    python -m benchmarks.dual --peer PATH/TO/clip-rocket          # CL2L, two local views: ours and the original's
    python -m benchmarks.dual --tokens 77                         # captions that fill the whole context

A step is forward, contrastive loss, backward and AdamW on random images of 224 px. Captions have 8
tokens to
--tokens; the others always compute all 77 places, ours the longest caption of the batch, rounded up
to a multiple of 8, as main.py's loader hands them over. Weights are random and nothing is
downloaded. Each measurement runs in a process of its own, the sides in turn. Memory is the peak of
the process on a CPU and of the allocator on a GPU. The table is written to docs/BENCHMARKS.md, a
section a setting.

--peer runs github.com/facebookresearch/clip-rocket: its networks and losses as they are, a stand-in
for xformers' attention (PyTorch's, when `--peer-attention flash`).
"""

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from runtime.config import cli as configuration
from runtime.config.cli import knob

NAMES = {"ours": "ours", "open_clip": "open_clip", "rocket": "clip-rocket"}


@dataclass
class Config:
    """What to measure."""

    batch: int = knob(4, "pairs a step", low=2)
    tokens: int = knob(24, "longest caption in tokens, start and end included", low=8, high=77)
    precision: str = knob(
        "fp32", "all sides: type of the forward pass", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = knob(False, "all sides: torch.compile")
    activation_checkpointing: bool = knob(False, "ours: recompute blocks in the backward pass")
    peer: str | None = knob(
        None, "checkout of clip-rocket: measure CL2L beside it; none = CLIP beside open_clip"
    )
    peer_attention: str = knob(
        "standard", "clip-rocket's attention: its default, or flash", choices=("standard", "flash")
    )
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(3, "measurements of each side", low=1)
    warmup: int = knob(1, "steps before the clock starts, in each measurement", low=0)
    steps: int = knob(2, "timed steps of a measurement; their median counts", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")

    @property
    def other(self) -> str:
        """The side that ours is compared with."""
        return "rocket" if self.peer else "open_clip"


def table(config: Config, results: dict[str, list[dict]]) -> str:
    """Markdown, a row a side."""
    head = ["", "seconds a step", "CPU seconds", "pairs/s", "peak memory", "MFU"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for side, runs in results.items():
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("seconds", "cpu_seconds", "peak_bytes")
        }
        spread = (
            f"{min(run['seconds'] for run in runs):.2f}-{max(run['seconds'] for run in runs):.2f}"
        )
        mfu = (
            f"{100 * statistics.median(run['mfu'] for run in runs):.0f}%"
            if runs[0].get("mfu")
            else ""
        )
        cells = [NAMES[side], f"{middle['seconds']:.2f} ({spread})", f"{middle['cpu_seconds']:.2f}"]
        cells += [
            f"{config.batch / middle['seconds']:.2f}",
            f"{middle['peak_bytes'] / 2**30:.2f} GiB",
            mfu,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_config(config: Config) -> None:
    """Raise UserError where the settings cannot be measured."""
    if config.peer and not (Path(config.peer) / "losses.py").is_file():
        raise UserError(
            f"--peer {config.peer}: no losses.py there; it takes a checkout of clip-rocket"
        )


def main(config: Config) -> None:
    check_config(config)
    load = os.getloadavg()[0]
    results = bench.take_turns(config, dict.fromkeys(("ours", config.other), "dual_side"))
    first = results["ours"][0]
    found = bench.ratios({"ours": results["ours"], "peer": results[config.other]})
    body = f"{table(config, results)}\n\nOurs over {NAMES[config.other]}: {found['speed']:.2f} x pairs/s"
    body += f" ({found['cpu']:.2f} x by CPU time)" if first["device"] == "cpu" else ""
    body += f", {found['memory']:.2f} x peak memory.\n\nMachine: {bench.machine(first, config.threads)}."
    if load > 0.2 * os.cpu_count():
        body += f" Other work was running (load {load:.1f} at the start): times by the clock are disturbed."
    extra = ["compiled"] * config.compile + [
        "activation checkpointing"
    ] * config.activation_checkpointing
    what = "CL2L ViT-B/16, two local views" if config.peer else "CLIP ViT-B/16"
    settings = [
        f"batch {config.batch}",
        f"up to {config.tokens} tokens",
        config.precision,
        first["device"],
    ]
    title = ", ".join([what, *settings, *extra, f"beside {NAMES[config.other]}"])
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'dual')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
