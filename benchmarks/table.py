"""Tables of docs/BENCHMARKS.md of what `runner.take_turns` returns: medians, and ratios of
neighbouring runs. Several cases are one table with a row `CASE: SIDE` each."""

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

PAGE = ROOT / "docs/BENCHMARKS.md"


@dataclass(frozen=True)
class Column:
    """One figure of the measurements: its median, or with `ratio` ours against the other side's."""

    head: str
    key: str
    form: str = "{:.2f}"
    scale: float = 1.0
    spread: bool = False  # also the least and the most
    ratio: str = ""  # "lower" or "higher" is better; empty = the median itself

    def cell(self, runs: list[dict], ours: list[dict]) -> str:
        """Text of a cell from a side's measurements and ours beside them; empty without either."""
        values = [run[self.key] for run in runs if self.key in run]
        if not values or (self.ratio and not ours):
            return ""
        if isinstance(values[0], str):
            return values[0]
        if self.ratio:  # a disturbed pair counts once
            pairs = zip(values, ours, strict=True)
            value = statistics.median(theirs / run[self.key] for theirs, run in pairs)
            return self.form.format(value if self.ratio == "lower" else 1 / value)
        values = [value * self.scale for value in values]
        text = self.form.format(statistics.median(values))
        if self.spread:
            text += f" ({self.form.format(min(values))}-{self.form.format(max(values))})"
        return text


SECONDS = Column("seconds", "seconds", "{:.1f}")
CPU_SECONDS = Column("CPU seconds", "cpu_seconds", "{:.1f}")
MEMORY = Column("peak memory", "peak_bytes", "{:.2f} GiB", 2**-30)
FASTER = Column("ours is faster by", "seconds", "{:.2f} x", ratio="lower")
FASTER_CPU = Column("by CPU time", "cpu_seconds", "{:.2f} x", ratio="lower")


def partner(results: dict[str, list[dict]], side: str) -> list[dict]:
    """Our measurements in the case of another side; none for ours."""
    case, colon, name = side.rpartition(": ")
    return results.get(f"{case}{colon}{OURS}", []) if name != OURS else []


def table(results: dict[str, list[dict]], columns: list[Column]) -> str:
    """A row a side; columns of ratios only if a row has a partner."""
    partners = {side: partner(results, side) for side in results}
    columns = [column for column in columns if not column.ratio or any(partners.values())]
    rows = [["", *(column.head for column in columns)], ["---"] * (1 + len(columns))]
    for side, runs in results.items():
        rows.append([side, *(column.cell(runs, partners[side]) for column in columns)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


# ---- what is said of a table
def machine(options: Options) -> str:
    """GPU, CPU, number of cores, memory and versions, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = named.group(1) if named else platform.machine()
    words = [cpu, f"{os.cpu_count()} cores ({options.threads} threads used)", f"{memory:.0f} GiB"]
    if device_of(options) == "cuda":
        words.insert(0, torch.cuda.get_device_name())
    return ", ".join([*words, f"torch {torch.__version__}"])


def load_note(runs: list[dict]) -> str:
    """The load before and during the measurements, with a warning; empty if nothing was timed."""
    if "load" not in runs[0]:
        return ""
    before = max(run["load"] for run in runs)
    during = statistics.median(run.get("others", 0.0) for run in runs)
    if before < IDLE_LOAD and during < IDLE_LOAD:
        return f" Load {before:.2f} at the start, {during:.2f} meanwhile."
    return (
        f" Other work was running (load {before:.1f} at the start, {during:.1f} meanwhile): "
        "times by the clock are disturbed."
    )


def command_line(options: Options, name: str) -> str:
    """The command that repeats this run of benchmarks.NAME, without paths of this disk."""
    words = ["python", "-m", f"benchmarks.{name}"]
    standard = type(options)()
    for key, value in asdict(options).items():
        if value == getattr(standard, key) or key in ("report", "busy", "wait"):
            continue
        if key in ("peer", "peer_python"):
            value = "PATH"
        values = value if isinstance(value, list) else [value]
        words.append("--" + key.replace("_", "-"))
        words += [str(each).lower() if isinstance(each, bool) else str(each) for each in values]
    return shlex.join(words)


# ---- the page
def publish(
    options: Options,
    name: str,
    title: list[str],
    results: dict[str, list[dict]],
    columns: list[Column],
    remark: str = "",
) -> None:
    """Print table, remark, machine, load and command, and write them to the page of `report` in
    place of the section with this title; a tiny network's are printed only. UserError, after
    printing, if other work ran beside the measurements and --busy does not allow it."""
    heading = ", ".join(title + ["tiny"] * options.tiny)
    load = load_note([run for runs in results.values() for run in runs])
    parts = [table(results, columns), remark, f"Machine: {machine(options)}.{load}"]
    text = "\n\n".join(filter(None, [*parts, f"    {command_line(options, name)}"]))
    print(f"{heading}\n\n{text}")
    if "disturbed" in load and not options.busy:
        raise UserError("other work began meanwhile: nothing is recorded; measure again, or --busy")
    if options.report and not options.tiny:
        page = ROOT / options.report
        before = page.read_text() if page.exists() else PAGE.read_text().partition("\n## ")[0]
        write_text(page, with_section(before, heading, text))
        print(f"written to {page}")


def with_section(page: str, title: str, body: str) -> str:
    """`page` with the section `## title` replaced, or added at its end."""
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(page):
        return old.sub(lambda _: section + "\n", page).rstrip() + "\n"
    return f"{page.rstrip()}\n\n{section}"
