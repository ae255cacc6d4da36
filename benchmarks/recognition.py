"""Speed of NXTP with 51.5M parameters: labels a second, and a training step, ours and the
original's.

    python -m benchmarks.recognition                                        # ours alone, all cases
    python -m benchmarks.recognition --peer PATH/TO/nxtp                    # against a checkout, alternating
    python -m benchmarks.recognition --peer PATH --cases train --steps 3

Cases: `1` and `8`, the top 20 labels of so many images, cut off at three tokens (two and a
delimiter); `1-limit`, the same with nineteen tokens, as of weights that never end a label; `train`,
a step of four images with five labels each.
The network is random: image tower 256 wide, 6 blocks, 256 image tokens of 224 px; decoder 512 wide,
4 blocks, 32,002 tokens. The original's own functions run, each measurement in a process of its own
with equal weights, and its labels and losses are compared with ours. It pads texts to 512 positions
and computes the caption's branch, whose weight is 0.
Tables are written to docs/BENCHMARKS.md.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from runtime.config import cli as configuration
from runtime.config.cli import knob

CASES = {
    "1": {"images": 1, "tokens": 3},
    "8": {"images": 8, "tokens": 3},
    "1-limit": {"images": 1, "tokens": 19},
    "train": {"images": 0, "tokens": 0},
}


@dataclass
class Config:
    """What to measure."""

    cases: list[str] = knob(["1", "8", "train"], "cases to measure", choices=tuple(CASES))
    labels: int = knob(20, "labels of an image", low=1)
    batch: int = knob(4, "images of a training step", low=1)
    precision: str = knob(
        "fp32", "ours: type of the training step", choices=("fp32", "bf16", "fp16")
    )
    compat: str = knob(
        "original", "ours: none = also the last label sees itself", choices=("none", "original")
    )
    peer: str | None = knob(None, "checkout of the original to measure beside ours")
    peer_python: str | None = knob(None, "interpreter for the original; none = this one")
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(1, "measurements of each side", low=1)
    warmup: int = knob(1, "runs before the clock starts, in each measurement", low=0)
    steps: int = knob(2, "timed runs of a measurement; their median counts", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


def measure_case(config: Config, case: str, exchange: str) -> dict[str, list[dict]]:
    """Both sides' measurements in turn, the original's first: it leaves the weights."""
    results: dict[str, list[dict]] = {
        side: [] for side in ("peer", "ours") if side == "ours" or config.peer
    }
    for turn in range(config.repeats):
        for side, runs in results.items():
            runs.append(
                bench.run_side(
                    f"recognition_{side}", config, exchange=exchange, case=case, **CASES[case]
                )
            )
            one = runs[-1]
            figures = f"{one['seconds']:.2f} s, {one['cpu_seconds']:.2f} CPU s, {one['peak_bytes'] / 2**30:.2f} GiB"
            print(f"{case}: {side} {turn + 1}/{config.repeats}: {figures}", flush=True)
    return results


def agreement(results: dict[str, list[dict]]) -> str:
    """Whether both sides found the same, in words."""
    ours, peer = results["ours"][0], results["peer"][0]
    if "loss" in ours:
        return f"first loss {ours['loss']:.6f} and {peer['loss']:.6f}"
    labels = [[t for tokens in side["tokens"] for t in tokens] for side in (ours, peer)]
    same = sum(mine == theirs for mine, theirs in zip(*labels, strict=True))
    return f"{same} of {len(labels[0])} labels alike"


def row(case: str, results: dict[str, list[dict]], config: Config) -> str:
    """One line of the table."""
    cells = {}
    for side, runs in results.items():
        seconds, cpu = (
            statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds")
        )
        memory = statistics.median(run["peak_bytes"] for run in runs) / 2**30
        done = config.batch if case == "train" else CASES[case]["images"] * config.labels
        cells[side] = [f"{seconds:.2f}", f"{cpu:.2f}", f"{done / seconds:.1f}", f"{memory:.2f} GiB"]
    words = [
        f"training step, {config.batch} images"
        if case == "train"
        else f"top {config.labels}, case {case}"
    ]
    words += cells["ours"] + cells.get("peer", [""] * 4)
    if "peer" in results:
        found = bench.ratios(results)
        words += [f"{found['speed']:.1f} x", f"{found['cpu']:.1f} x", agreement(results)]
    return "| " + " | ".join(words + [""] * (12 - len(words))) + " |"


def main(config: Config) -> None:
    if config.peer and not (Path(config.peer) / "src/decoding.py").is_file():
        raise UserError(
            f"--peer {config.peer}: no src/decoding.py there; it takes a checkout of NXTP"
        )
    sides = [
        f"{side}: {name}"
        for side in ("ours", "original")
        for name in ("s", "CPU s", "labels or images/s", "peak")
    ]
    lines = [
        "| | " + " | ".join([*sides, "by the clock", "by CPU time", "agreement"]) + " |",
        "|" + "---|" * 12,
    ]
    with tempfile.TemporaryDirectory() as exchange:
        for case in config.cases:
            results = measure_case(config, case, exchange)
            lines.append(row(case, results, config))
    first = results["ours"][0]
    body = "\n".join(lines) + f"\n\nMachine: {bench.machine(first, config.threads)}."
    title = f"Recognition, 51.5M parameters, {', '.join(config.cases)}, {config.precision}, {first['device']}"
    title += ", against the original" * bool(config.peer)
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'recognition')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
