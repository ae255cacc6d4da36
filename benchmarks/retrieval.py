"""Speed of retrieval evaluation with re-ranking: ViT-B/16 at 384 px + BERT-base SIMLA or ALBEF,
against the original's.

    python -m benchmarks.retrieval                                 # ours alone
    python -m benchmarks.retrieval --peer PATH/TO/SIMLA            # against a checkout, and are the scores equal?
    python -m benchmarks.retrieval --peer PATH/TO/ALBEF --system albef --precision bf16

All images and captions are encoded; then each image's `k_test` nearest captions, and each caption's
nearest images, are matched. A pair is a candidate of one direction; the same number counts for both
sides. Weights and images are random, five captions an image. The original's evaluation function
runs unchanged in a process of its own, with stand-ins for old libraries (or --peer-python, as in
benchmarks.pretrain); its weights are then ours. The table is written to docs/BENCHMARKS.md, with
the time that COCO's test would take by these rates.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from runtime.config import cli as configuration
from runtime.config.cli import knob

CAPTIONS = 5  # of an image, as in COCO
COCO, COCO_K = 5000, 256  # images of the test, and its k_test


@dataclass
class Config:
    """What to measure."""

    system: str = knob("simla", "which model", choices=("simla", "albef"))
    images: int = knob(12, f"images; each has {CAPTIONS} captions", low=2)
    k_test: int = knob(
        8, "candidates matched, per image and per caption; at most as many as images", low=1
    )
    batch: int = knob(4, "images encoded at once", low=1)
    precision: str = knob(
        "fp32", "ours: type of the forward pass", choices=("fp32", "bf16", "fp16")
    )
    peer: str | None = knob(None, "checkout of the original to measure beside ours")
    peer_python: str | None = knob(
        None, "interpreter with the original's old libraries; none = this one, stand-ins"
    )
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(1, "measurements of each side", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")

    @property
    def pairs(self) -> int:
        return (1 + CAPTIONS) * self.images * self.k_test


def measure_all(config: Config) -> dict[str, list[dict]]:
    """The sides' measurements in turn, the original's first: it leaves the weights."""
    results: dict[str, list[dict]] = {
        side: [] for side in ("peer", "ours") if side == "ours" or config.peer
    }
    with tempfile.TemporaryDirectory() as exchange:
        for turn in range(config.repeats):
            for side, runs in results.items():
                more = {"exchange": exchange, "captions": CAPTIONS * config.images}
                runs.append(bench.run_side(f"retrieval_{side}", config, **more))
                spent = {
                    name: f"{seconds:.1f} s" for name, (seconds, _) in runs[-1]["times"].items()
                }
                print(f"{side} {turn + 1}/{config.repeats}: {spent}", flush=True)
    return results


def rates(runs: list[dict], config: Config) -> dict[str, float]:
    """Medians of a side: `pairs` matched a second, `cpu_pairs` a CPU second, `encoding` seconds,
    and `coco` hours.

    The hours are those of COCO's test by the clock: its images (with captions) at the rate of
    `encoding`, its pairs at that of matching.
    """
    matching, cpu = (statistics.median(run["times"]["matching"][i] for run in runs) for i in (0, 1))
    encoding = statistics.median(run["times"]["encoding"][0] for run in runs)
    pairs = (1 + CAPTIONS) * COCO * COCO_K
    hours = (encoding / config.images * COCO + matching / config.pairs * pairs) / 3600
    return {
        "pairs": config.pairs / matching,
        "cpu_pairs": config.pairs / cpu,
        "encoding": encoding,
        "coco": hours,
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a side."""
    million = (1 + CAPTIONS) * COCO * COCO_K / 1e6
    head = [
        "",
        "pairs/s",
        "pairs per CPU second",
        "encoding, s",
        f"COCO, {million:.1f} million pairs, extrapolated",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for side, name in (("ours", "ours"), ("peer", "original")):
        if side in found:
            pairs, cpu, encoding, coco = (
                found[side][key] for key in ("pairs", "cpu_pairs", "encoding", "coco")
            )
            lines.append(f"| {name} | {pairs:.2f} | {cpu:.2f} | {encoding:.1f} | {coco:,.0f} h |")
    return "\n".join(lines)


def agreement_text(results: dict[str, list[dict]]) -> str:
    """The agreement of scores and orders, in words."""
    by_query = results["ours"][0]["agreement"]
    lowest = {
        key: min(part[key] for part in by_query.values())
        for key in ("candidates", "order", "spearman")
    }
    apart = max(part["difference"] for part in by_query.values())
    return (
        f"With equal weights {lowest['candidates']:.1%} of the candidates are the same, scores differ by at most "
        f"{apart:.1e} of their standard deviation, {lowest['order']:.1%} of the queries have the same order (rank "
        f"correlation {lowest['spearman']:.6f})."
    )


def check_config(config: Config) -> None:
    """Raise UserError where the settings cannot be measured."""
    if config.k_test > config.images:
        raise UserError(
            f"--k-test {config.k_test}: there are {config.images} images; give more --images"
        )
    if config.peer:
        name = {"simla": "models/simla/retrieval.py", "albef": "models/model_retrieval.py"}[
            config.system
        ]
        if not (Path(config.peer) / name).is_file():
            raise UserError(
                f"--peer {config.peer}: no {name} there; it takes a checkout of {config.system.upper()}"
            )


def main(config: Config) -> None:
    check_config(config)
    results = measure_all(config)
    found = {side: rates(runs, config) for side, runs in results.items()}
    first = results["ours"][0]
    body = table(found)
    if config.peer:
        ratio, cpu, coco = (
            found["ours"][key] / found["peer"][key] for key in ("pairs", "cpu_pairs", "coco")
        )
        body += f"\n\nOurs over the original: {ratio:.2f} x pairs/s ({cpu:.2f} x by CPU time), COCO {1 / coco:.2f} x"
        body += f" as fast. {agreement_text(results)}"
    body += f"\n\nMachine: {bench.machine(first, config.threads)}."
    sizes = f"{config.images} images, {CAPTIONS * config.images} captions, k_test {config.k_test}"
    title = f"Retrieval evaluation, {config.system.upper()} at 384 px, {sizes}, {config.precision}, {first['device']}"
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'retrieval')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
