"""Tables of docs/BENCHMARKS.md: medians, ratios of neighbouring runs, and sections of the page.

`results` is what `runner.take_turns` returns: {side: its measurements}, with the same number of
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

from base.errors import UserError
from base.writing import write_text
from benchmarks.runner import IDLE_LOAD, OURS, ROOT, Options, device_of

PREAMBLE = """# Benchmarks

Written by the `benchmarks` package; each section names the command that made it, whose `--help`
says what is measured. *ours* and the others ran in turn, each measurement in a process of its own;
the figures are medians. A ratio is the median of the ratios of neighbouring runs. Memory is the
peak of the process on a CPU, with weights and libraries, and the peak of the allocator on a GPU.
CPU seconds are the processor time of all threads: on a shared machine they vary less than the
clock. MFU is the FLOPs of the network's forward and backward pass over the device's peak, without
those that activation checkpointing repeats and those of the image tokenizer; the peak is the
vendor's figure for a GPU, and a measured matrix product of the same number type, by processor time,
for a CPU. The load is the number of cores that other work used, before a measurement and during it.
No other work may run meanwhile: a benchmark waits for that up to `--wait` minutes, else refuses.
"""


# ---- figures
def median(runs: list[dict], key: str) -> float:
    """Median of one figure over the measurements of a side that have it."""
    return statistics.median(run[key] for run in runs if key in run)


def ratio(results: dict[str, list[dict]], other: str, key: str) -> float:
    """Median over neighbouring runs of the other side's figure divided by ours."""
    pairs = zip(results[OURS], results[other], strict=True)
    return statistics.median(theirs[key] / ours[key] for ours, theirs in pairs)


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
        if isinstance(runs[0][self.key], str):
            return runs[0][self.key]
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


def table(results: dict[str, list[dict]], columns: list[Column]) -> str:
    """A row a side."""
    return tables({"": results}, columns)


def tables(cases: dict[str, dict[str, list[dict]]], columns: list[Column]) -> str:
    """One table of the results of several cases, a row a case and side; columns of ratios only if
    ours has company."""
    if not any(OURS in results and len(results) > 1 for results in cases.values()):
        columns = [column for column in columns if not column.ratio]
    rows = []
    for case, results in cases.items():
        for side in results:
            name = ": ".join(filter(None, [case, side]))
            rows.append([name, *(column.cell(results, side) for column in columns)])
    return markdown(["", *(column.head for column in columns)], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- what is said of a table
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


def load_note(runs: list[dict]) -> str:
    """The load before and during the measurements, and a warning where it was none; empty if nothing
    was timed."""
    before = [run["load"] for run in runs if "load" in run]
    if not before:
        return ""
    during = statistics.median(run.get("others", 0.0) for run in runs)
    if max(before) < IDLE_LOAD and during < IDLE_LOAD:
        return f" Load {max(before):.2f} at the start, {during:.2f} meanwhile."
    return (
        f" Other work was running (load {max(before):.1f} at the start, {during:.1f} meanwhile): "
        "times by the clock are disturbed."
    )


def command_line(options: Options, name: str) -> str:
    """The command that repeats this run of benchmarks.NAME; the paths on this disk are left out."""
    words = ["python", "-m", f"benchmarks.{name}"]
    standard = asdict(type(options)())
    for key, value in asdict(options).items():
        if value == standard[key] or key in ("report", "busy", "wait"):
            continue
        words.append("--" + key.replace("_", "-"))
        if key in ("peer", "peer_python"):
            words.append("PATH")
        elif isinstance(value, list):
            words += [str(each) for each in value]
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return shlex.join(words)


# ---- the page
def publish(
    options: Options, name: str, title: list[str], body: str, results: dict[str, list[dict]]
) -> None:
    """Print the table with machine, load and command; write it to the page of `report`.

    The words of the title distinguish a setting: a run of the same setting replaces its section.
    A tiny network's figures are printed only. Raises UserError, after printing, if other work ran
    beside the measurements and --busy does not allow it.
    """
    heading = ", ".join(title + ["tiny"] * options.tiny)
    runs = [run for side in results.values() for run in side]
    note = load_note(runs)
    text = f"{body}\n\nMachine: {machine(options)}.{note}\n\n    {command_line(options, name)}"
    print(f"{heading}\n\n{text}")
    if "disturbed" in note and not options.busy:
        raise UserError("other work began meanwhile: nothing is recorded; measure again, or --busy")
    if options.report and not options.tiny:
        page = ROOT / options.report
        before = page.read_text() if page.exists() else PREAMBLE
        write_text(page, with_section(before, heading, text))
        print(f"written to {page}")


def with_section(page: str, title: str, body: str) -> str:
    """`page` with the section `## title` replaced, or added at its end."""
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(page):
        return old.sub(lambda _: section + "\n", page).rstrip() + "\n"
    return f"{page.rstrip()}\n\n{section}"
