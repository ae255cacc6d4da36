"""Tables of docs/BENCHMARKS.md: medians, ratios of neighbouring runs, and sections of the page.

A result is what `runner.take_turns` returns: {side: its measurements}, with the same number of
measurements of each side; the i-th of two sides are neighbours in time.
"""

import contextlib
import os
import platform
import re
import shlex
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base.files import write_text
from benchmarks.runner import (
    IDLE_LOAD,
    OURS,
    ROOT,
    Options,
    Side,
    TrainOptions,
    device_of,
    load_at_start,
    take_turns,
)

PREAMBLE = """# Benchmarks

Written by the `benchmarks` package; each section names the command that made it, whose `--help`
says what is measured. *ours* and the others ran in turn, each measurement in a process of its own;
the figures are medians. A ratio is the median of the ratios of neighbouring runs. Memory is the
peak of the process on a CPU, with weights and libraries, and the peak of the allocator on a GPU.
CPU seconds are the processor time of all threads: on a shared machine they vary less than the
clock. MFU is the FLOPs of the network's forward and backward pass over the device's peak, without
those that activation checkpointing repeats and those of the image tokenizer; the peak is the
vendor's figure for a GPU, and a measured matrix product of the same number type, by processor time,
for a CPU.
"""


def median(runs: list[dict], key: str) -> float:
    """Median of one figure over the measurements of a side that have it."""
    return statistics.median(run[key] for run in runs if key in run)


def ratio(results: dict[str, list[dict]], other: str, key: str) -> float:
    """Median over neighbouring runs of the other side's figure divided by ours."""
    pairs = zip(results[OURS], results[other], strict=True)
    return statistics.median(theirs[key] / ours[key] for ours, theirs in pairs)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; short rows are filled with empty cells."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = row + [""] * (len(head) - len(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """One figure of the measurements: its median, or with `ratio` ours against the other side's."""

    head: str
    key: str
    form: str = "{:.2f}"
    scale: float = 1.0
    spread: bool = False  # also the least and the most
    ratio: str = ""  # "lower" or "higher" is better; empty = the median itself

    def cell(self, results: dict[str, list[dict]], side: str) -> str:
        """Text of a cell; empty where the side has no such figure or no partner."""
        runs = results[side]
        if runs[0].get(self.key) is None or (self.ratio and (side == OURS or OURS not in results)):
            return ""
        if self.ratio:
            value = ratio(results, side, self.key)
            return self.form.format(value if self.ratio == "lower" else 1 / value)
        text = self.form.format(median(runs, self.key) * self.scale)
        if self.spread:
            values = [run[self.key] * self.scale for run in runs]
            text += f" ({self.form.format(min(values))}-{self.form.format(max(values))})"
        return text


SECONDS = Column("seconds", "seconds", "{:.1f}")
CPU_SECONDS = Column("CPU seconds", "cpu_seconds", "{:.1f}")
MEMORY = Column("peak memory", "peak_bytes", "{:.2f} GiB", 2**-30)
STEP_COLUMNS = [
    Column("seconds a step", "seconds", "{:.3f}", spread=True),
    Column("CPU seconds", "cpu_seconds"),
    Column("samples/s", "rate", "{:.3f}"),
    MEMORY,
    Column("MFU", "mfu", "{:.0%}"),
    Column("ours is faster by", "seconds", "{:.2f} x", ratio="lower"),
    Column("by CPU time", "cpu_seconds", "{:.2f} x", ratio="lower"),
    Column("ours needs of its memory", "peak_bytes", "{:.2f} x", ratio="higher"),
]


def table(results: dict[str, list[dict]], columns: list[Column]) -> str:
    """A row a side; columns of ratios only if ours has company."""
    if len(results) == 1 or OURS not in results:
        columns = [column for column in columns if not column.ratio]
    rows = []
    for side in results:
        rows.append([side, *(column.cell(results, side) for column in columns)])
    return markdown(["", *(column.head for column in columns)], rows)


def settings(options: TrainOptions) -> list[str]:
    """Words of a title for the options that all benchmarks of training steps have."""
    words = [f"batch {options.batch}", options.precision, device_of(options)]
    if options.compile:
        words.append("compiled")
    if options.activation_checkpointing:
        words.append("activation checkpointing")
    return words


def compare_steps(options: TrainOptions, name: str, title: list[str], sides: list[Side]) -> None:
    """Measure the training steps of all sides and publish their table."""
    load = load_at_start(options)
    results = take_turns(options, sides)
    for runs in results.values():
        for run in runs:
            run["rate"] = options.batch / run["seconds"]
    body = table(results, STEP_COLUMNS)
    parameters = results[sides[0].name][0]["parameters"]
    body += f"\n\n{parameters / 1e6:.1f} million parameters."
    for side, runs in results.items():
        if "library" in runs[0]:
            body += f" {side}: {runs[0]['library']}, float32."
    publish(options, name, title, body, load)


def machine(options: Options) -> str:
    """GPU, CPU, number of cores, memory and versions, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    words = [cpu, f"{os.cpu_count()} cores ({options.threads} threads used)", f"{memory:.0f} GiB"]
    if device_of(options) == "cuda":
        words.insert(0, torch.cuda.get_device_name())
    return ", ".join([*words, f"torch {torch.__version__}"])


def load_note(load: float | None) -> str:
    """A warning if other work was running when the measurements began; None = nothing was timed."""
    if load is None:
        return ""
    if load <= IDLE_LOAD:
        return f" Load {load:.1f} at the start."
    return (
        f" Other work was running (load {load:.1f} at the start): times by the clock are disturbed."
    )


def command_line(options: Options, name: str) -> str:
    """The command that repeats this run of benchmarks.NAME; the paths on this disk are left out."""
    words = ["python", "-m", f"benchmarks.{name}"]
    standard = asdict(type(options)())
    for key, value in asdict(options).items():
        if value == standard[key] or key in ("report", "busy"):
            continue
        words.append("--" + key.replace("_", "-"))
        if key in ("peer", "peer_python"):
            words.append("PATH")
        elif isinstance(value, list):
            words += [str(each) for each in value]
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return shlex.join(words)


def with_section(page: str, title: str, body: str) -> str:
    """`page` with the section `## title` replaced, or added at its end."""
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(page):
        return old.sub(lambda _: section + "\n", page).rstrip() + "\n"
    return f"{page.rstrip()}\n\n{section}"


def publish(options: Options, name: str, title: list[str], body: str, load: float | None) -> None:
    """Print the table with machine, load and command, and write it to the page of `report`.

    The words of the title distinguish a setting: a run of the same setting replaces its section.
    A tiny network's figures are printed only.
    """
    heading = ", ".join(title + ["tiny"] * options.tiny)
    note = f"Machine: {machine(options)}.{load_note(load)}"
    text = f"{body}\n\n{note}\n\n    {command_line(options, name)}"
    print(f"{heading}\n\n{text}")
    if options.report and not options.tiny:
        write_section(options.report, heading, text)


def write_section(report: str, title: str, text: str) -> None:
    """Replace or add a section of the page, a path below the repository's root."""
    page = ROOT / report
    before = page.read_text() if page.exists() else PREAMBLE
    write_text(page, with_section(before, title, text))
    print(f"written to {page}")
