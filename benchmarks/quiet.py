"""Measure the rows that count on a quiet machine, the most important first, and put them into
docs/BENCHMARKS.md.

    python -m benchmarks.quiet --minutes 15 --peers simla=PATH clip-rocket=PATH
    python -m benchmarks.quiet --rows clip knn           # these two
    python -m benchmarks.quiet --minutes 0               # measure nothing, write the page

Every row is a benchmark of this package, ours and the other side in turn, three pairs; a row whose
checkout is not named, or that does not fit into the rest of the minutes, is left out and said so.
Before each measurement the machine must be idle: the row waits for that, up to --wait minutes, and
else is refused, as it is if other work begins meanwhile. A finished row is a line of --record at
once; at the end all of them go to the page.
"""

import importlib
import time
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.reading import read_json_lines
from benchmarks.runner import checkouts
from benchmarks.table import write_sections
from runtime.config.cli import knob, parse, run_script


@dataclass(frozen=True)
class Row:
    """A benchmark with its options, and what it needs."""

    command: str
    minutes: float  # on two idle cores
    peer: str = ""  # name in --peers


ROWS = {  # by importance
    "cl2l": Row("dual --steps 1", 4.0, "clip-rocket"),
    "clip": Row("dual", 2.5),
    "knn": Row("knn", 2.5),
    "views": Row("views", 1.5),
    "simla": Row("pretrain --steps 1", 6.5, "simla"),
    "tiles": Row("contrastive --threads 1 --repeats 1", 5.5),
}


@dataclass
class Config:
    """What to measure, and for how long."""

    rows: list[str] = knob(list(ROWS), "rows to measure", choices=tuple(ROWS))
    minutes: float = knob(15.0, "for all rows together; 0 = write the page alone", low=0)
    wait: float = knob(2.0, "minutes to wait for an idle machine, before each measurement", low=0)
    repeats: int = knob(3, "pairs of measurements", low=1)
    peers: list[str] = knob([], "checkouts of the originals: simla=PATH clip-rocket=PATH")
    record: Path = knob(Path("output/benchmarks/quiet.jsonl"), "file of the finished rows")
    report: str = knob("docs/BENCHMARKS.md", "page to write the tables to; empty = record only")


def measure_row(row: Row, config: Config, peers: dict[str, Path]) -> None:
    """Run the row's benchmark, which appends to `record`. Raises UserError if it refuses."""
    name, *words = row.command.split()
    module = importlib.import_module(f"benchmarks.{name}")
    options = parse(module.Config, words)
    if "--repeats" not in words:
        options.repeats = config.repeats
    options.wait = config.wait
    options.record = config.record
    options.report = ""
    if row.peer:
        options.peer = str(peers[row.peer])
    module.main(options)


def main(config: Config) -> None:
    known = [row.peer for row in ROWS.values() if row.peer]
    peers = checkouts(config.peers, known, "--peers")
    deadline = time.monotonic() + 60 * config.minutes
    for name, row in ROWS.items():
        if name not in config.rows or not config.minutes:
            continue
        left = (deadline - time.monotonic()) / 60
        if row.peer and row.peer not in peers:
            print(f"{name}: left out, it needs --peers {row.peer}=PATH", flush=True)
        elif row.minutes > left:
            print(f"{name}: left out, {row.minutes:g} minutes of {left:.1f} left", flush=True)
        else:
            try:
                measure_row(row, config, peers)
            except UserError as error:
                print(f"{name}: not recorded, {error}", flush=True)
    if config.report and config.record.exists():
        records = read_json_lines(config.record)
        write_sections(config.report, {record["title"]: record["text"] for record in records})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
