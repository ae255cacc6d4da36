"""Speed and memory of a pre-training step: ViT-B/16 + BERT-base SIMLA or ALBEF at 256 px, ours and
the original's.

    python -m benchmarks.pretrain --system simla --batch 4                        # ours alone
    python -m benchmarks.pretrain --peer PATH/TO/SIMLA                            # against a checkout, alternating
    python -m benchmarks.pretrain --peer PATH/TO/ALBEF --system albef --precision bf16 --activation-checkpointing
    python -m benchmarks.pretrain --peer PATH/TO/SIMLA --check                    # do both compute the same losses?

A step is momentum update, forward, backward, gradient norm and AdamW, for SIMLA with the image
tokenizer (DALL-E's encoder, full size). Weights are random, nothing is downloaded. Each measurement
runs in a process of its own, ours and the peer's in turn, so that memory is clean and a busy
machine disturbs both alike. Memory is the peak of the whole process on the CPU (weights and
libraries included) and of the allocator on a GPU. The table is written to docs/BENCHMARKS.md, one
section for each setting; a later run of the same setting replaces its section.

--peer runs github.com/codezakh/SIMLA or github.com/salesforce/ALBEF. Their numeric code runs
unchanged; small stand-ins take the place of the old libraries around it. --peer-python PYTHON uses
the libraries of another interpreter instead (transformers 4.28.1, timm 0.4.12 were tried).
"""

import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from base.errors import UserError
from runtime.config import cli as configuration
from runtime.config.cli import knob

ROOT = Path(__file__).resolve().parents[1]

QUEUE_SIZE = 65536  # of the original, fixed
PREAMBLE = """# Benchmarks

Written by the `benchmarks` package; each section names the command that made it, whose `--help` says what is
measured. A step of SIMLA or ALBEF is momentum update, forward, backward, gradient norm and AdamW on random images
of 256 px and captions of 25 tokens, at full size (ViT-B/16, BERT-base, for SIMLA also DALL-E's encoder). *ours* and
*original* ran in turn, each in a process of its own. A ratio is the median of the ratios of neighbouring runs. Memory
is the peak of the process on a CPU, with weights and libraries, and the peak of the allocator on a GPU. CPU seconds
are the processor time of all threads: on a shared machine they vary less than the clock. MFU is the share of the
device's peak that the FLOPs of the network's forward and backward pass make up, without those that activation
checkpointing repeats and those of the image tokenizer; the peak is the vendor's figure for a GPU, and a measured
matrix product of the same number type, by processor time, for a CPU.
"""


@dataclass
class Config:
    """What to measure."""

    system: str = knob("simla", "which model", choices=("simla", "albef"))
    batch: int = knob(4, f"samples a step; with --peer a divisor of {QUEUE_SIZE}", low=2)
    precision: str = knob(
        "fp32", "ours: type of the forward pass", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = knob(False, "ours: torch.compile")
    activation_checkpointing: bool = knob(False, "ours: recompute blocks in the backward pass")
    compat: str = knob(
        "none", "ours: original = with the original's defects", choices=("none", "original")
    )
    peer: str | None = knob(None, "checkout of the original to measure beside ours")
    peer_python: str | None = knob(
        None, "interpreter with the original's old libraries; none = this one, stand-ins"
    )
    peer_precision: str = knob(
        "fp32", "original: fp32 as published, or with TF32 products", choices=("fp32", "tf32")
    )
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(3, "measurements of each side", low=1)
    warmup: int = knob(1, "steps before the clock starts, in each measurement", low=0)
    steps: int = knob(2, "timed steps of a measurement; their median counts", low=1)
    check: bool = knob(
        False, "compare the losses of both sides on equal weights instead of measuring"
    )
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


def run_side(side: str, config, **more) -> dict:
    """One measurement by benchmarks.SIDE (`pretrain_ours`, ...) in a fresh process: what it prints
    as JSON."""
    other = getattr(config, "peer_python", None)
    python = other if side.endswith("peer") and other else sys.executable
    options = {**asdict(config), "stand_ins": not other, **more}
    options["check"] = more.get("check")
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(config.threads)}
    command = [python, "-m", f"benchmarks.{side}", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the {side} side failed (exit {done.returncode}):\n{done.stderr.strip()[-3000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def checked(config: Config) -> tuple[str, str]:
    """Title and text of the comparison of losses: equal weights, masks and negatives, no
    dropout."""
    with tempfile.TemporaryDirectory() as folder:
        peer = run_side("pretrain_peer", config, check=folder)
        ours = run_side("pretrain_ours", config, check=folder)
    lines = ["| loss | ours | original | relative difference |", "|---|---|---|---|"]
    for name, theirs in peer["losses"].items():
        value = ours["losses"][name]
        lines.append(
            f"| {name} | {value:.7g} | {theirs:.7g} | {abs(value - theirs) / abs(theirs):.1e} |"
        )
    how = "The original's weights in both, ours with `compat: original`; no dropout, equal masks and negatives."
    title = f"{config.system.upper()}, same losses, batch {config.batch}, {ours['device']}"
    return title, "\n".join([how, "", *lines])


def take_turns(config, scripts: dict[str, str]) -> dict[str, list[dict]]:
    """All measurements of each side: {side: its module}, in turn, every second time backwards.

    The script learns as `library` which side it measures.
    """
    results: dict[str, list[dict]] = {side: [] for side in scripts}
    for turn in range(config.repeats):
        for side in scripts if turn % 2 == 0 else reversed(scripts):
            result = run_side(scripts[side], config, library=side)
            results[side].append(result)
            figures = f"{result['seconds']:.3f} s a step ({result['cpu_seconds']:.2f} CPU s)"
            figures += f", {result['peak_bytes'] / 2**30:.2f} GiB"
            print(f"{side:<5} {turn + 1}/{config.repeats}: {figures}", flush=True)
    return results


def ratios(results: dict[str, list[dict]]) -> dict[str, float]:
    """Medians over the pairs of neighbouring runs.

    speed: our samples/s over the original's; cpu: the same from processor time; memory: our peak
    over the original's.
    """
    pairs = list(zip(results["ours"], results["peer"], strict=True))

    def median(name: str) -> float:
        return statistics.median(peer[name] / ours[name] for ours, peer in pairs)

    return {
        "speed": median("seconds"),
        "cpu": median("cpu_seconds"),
        "memory": 1 / median("peak_bytes"),
    }


def table(config: Config, results: dict[str, list[dict]]) -> str:
    """Markdown table, a row a side."""
    lines = [
        "| | seconds a step | CPU seconds | samples/s | peak memory | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for side, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        cpu = statistics.median(run["cpu_seconds"] for run in runs)
        memory = statistics.median(run["peak_bytes"] for run in runs) / 2**30
        mfu = f"{statistics.median(run['mfu'] for run in runs):.0%}" if "mfu" in runs[0] else ""
        name, times = (
            ("ours" if side == "ours" else "original"),
            f"{middle:.3f} ({min(seconds):.3f}-{max(seconds):.3f})",
        )
        lines.append(
            f"| {name} | {times} | {cpu:.2f} | {config.batch / middle:.3f} | {memory:.2f} GiB | {mfu} |"
        )
    return "\n".join(lines)


def machine(result: dict, threads: int) -> str:
    """GPU, CPU, number of cores, memory and versions, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    words = [
        result["gpu"],
        cpu,
        f"{os.cpu_count()} cores ({threads} threads used)",
        f"{memory:.0f} GiB",
    ]
    return ", ".join(filter(None, [*words, f"torch {result['torch']}"]))


def disturbed(load: float) -> str:
    """A warning where the load average `load`, taken before the measurements, shows that others
    were working."""
    busy = load > 0.2 * os.cpu_count()
    return (
        f" Other work was running (load {load:.1f} at the start): times by the clock are disturbed."
        if busy
        else ""
    )


def heading(config: Config, device: str) -> str:
    """What distinguishes a setting; a run of the same setting replaces its section."""
    parts = [config.system.upper(), f"batch {config.batch}", config.precision, device]
    parts += ["compiled"] * config.compile + [
        "activation checkpointing"
    ] * config.activation_checkpointing
    parts += [f"original in {config.peer_precision}"] * bool(config.peer) + ["compat original"] * (
        config.compat != "none"
    )
    return ", ".join(parts)


def with_section(page: str, title: str, body: str) -> str:
    """`page` with the section `## title` replaced, or added at its end."""
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(page):
        return old.sub(lambda _: section + "\n", page).rstrip() + "\n"
    return f"{page.rstrip()}\n\n{section}"


def command_line(config, module: str = "pretrain") -> str:
    """The command that repeats this run; where the checkout lies is left open."""
    words = []
    for name, value in asdict(config).items():
        if value != getattr(type(config)(), name) and name != "report":
            value = "PATH" if name in ("peer", "peer_python") else str(value).lower()
            words += ["--" + name.replace("_", "-"), value]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *words])


def write_report(config, title: str, body: str) -> None:
    if config.report:
        page = ROOT / config.report
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(with_section(page.read_text() if page.exists() else PREAMBLE, title, body))
        print(f"written to {page}")


def measured(config: Config) -> tuple[str, str]:
    """Title and text of the measurements."""
    load = os.getloadavg()[0]
    results = take_turns(
        config, {side: f"pretrain_{side}" for side in ("ours", *["peer"] * bool(config.peer))}
    )
    body, first = table(config, results), results["ours"][0]
    if config.peer:
        found = ratios(results)
        body += f"\n\nOurs over the original: {found['speed']:.2f} x samples/s"
        body += f" ({found['cpu']:.2f} x by CPU time)" if first["device"] == "cpu" else ""
        body += f", {found['memory']:.2f} x peak memory."
    body += f"\n\nMachine: {machine(first, config.threads)}."
    body += disturbed(load)
    return heading(config, first["device"]), body


def check_config(config: Config) -> None:
    """Raise UserError where the settings cannot be measured."""
    if config.check and not config.peer:
        raise UserError("--check compares with the original: name its checkout with --peer PATH")
    if config.peer:
        name = {"simla": "models/simla/pretrain.py", "albef": "models/model_pretrain.py"}[
            config.system
        ]
        file = Path(config.peer) / name
        if not file.is_file():
            raise UserError(
                f"--peer {config.peer}: no {file}; it takes a checkout of {config.system.upper()}"
            )
        if QUEUE_SIZE % config.batch:
            raise UserError(
                f"--batch {config.batch}: the original's queue wants a divisor of {QUEUE_SIZE}"
            )


def main(config: Config) -> None:
    check_config(config)
    title, body = checked(config) if config.check else measured(config)
    print(body)
    write_report(config, title, f"{body}\n\n    {command_line(config)}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
