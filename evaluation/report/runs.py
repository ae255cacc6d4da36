"""One page for all runs below a folder: what each scored, their curves in one chart, and in which
options they differ."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from base import distributed
from base.errors import UserError
from base.reading import parse_json, read_json, read_lines
from base.writing import write_text
from evaluation.report.names import score_name
from evaluation.report.page import card, group, line_chart, link, page, table
from runtime.config.values import show
from runtime.config.yaml import read_yaml
from runtime.log import is_number

DEPTH = 5  # folders below the one given that are looked through
INSIDE = 2  # the same of a run's own folder, at its end
OTHERS = ("result", "wandb")  # folders inside a run's; W&B keeps a config.yaml of its own
POINTS = 400  # of a curve that are drawn at most
# columns of the log without a chart: every training has them, or they are one number
ALWAYS = {
    *("step", "epoch", "lr", "data_wait", "step_s", "memory_gb", "errors", "mfu", "tflops"),
    *("val_chance", "val_pointing_chance"),
}
LARGEST = 1e100  # of a number that is drawn
CURVES = 18  # charts at most
ENSEMBLE = re.compile(r"_zh_0\.[1-46-9]$")  # of z and h by other weights: a chart of its report
# options of an evaluation that say of which data its scores are
SCORED = ("val_file", "test_file", "val_data", "train_data", "val", "test", "choices", "datasets")
UNSAID = {"output_dir"}  # options that always differ
BESIDE = 20  # newest runs beside one that are compared with it
LOG_BYTES = 32 << 20  # of a log above which its curves are left out of that comparison
MADE_BY = '<meta name="generator" content="quintet runs">'


@dataclass
class RunFolder:
    """What a run or an evaluation left in its folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    scored: dict[str, str] = field(default_factory=dict)  # checkpoint and data of the metrics
    page: Path | None = None

    @property
    def steps(self) -> int | None:
        """The last logged update; None for an evaluation."""
        return self.log[-1].get("step") if self.log else None


def write_index(folder: Path) -> Path | None:
    """Write index.html in the folder of a run: the runs in it, and the newest beside it, compared;
    the page of the folder above is written again where scripts/compare.py made one.

    A file that cannot be read or written costs its row or the page, never the run: the page is a
    convenience. Returns the page; None on other processes than the first.
    """
    if distributed.rank() != 0:
        return None
    folder = Path(folder)
    above = folder.resolve().parent
    runs = []
    for found in [*sorted(run_folders(folder, INSIDE)), *beside(folder)]:
        with suppress(UserError, OSError):
            root = folder if found.is_relative_to(folder) else above
            runs.append(open_run(found, root, LOG_BYTES))
    page_above = above / "index.html"
    target = folder / "index.html"
    try:
        write_text(
            target, runs_page(runs, folder, f"{folder.resolve().name} and the runs beside it")
        )
        if is_runs_page(page_above):
            write_text(page_above, runs_page(find_runs(above), above, f"Runs in {above.name}"))
    except (UserError, OSError) as error:
        print(f"the page of all runs was not written: {error}", flush=True)
        return None
    return target


def beside(folder: Path) -> list[Path]:
    """The newest other runs in the folder that holds a run's, by name."""
    own = folder.resolve()
    found = []
    with suppress(OSError):
        for entry in os.scandir(own.parent):
            path = Path(entry.path)
            if path != own and not entry.name.startswith(".") and entry.is_dir() and is_run(path):
                found.append((entry.stat().st_mtime, path))
    return sorted(path for _, path in sorted(found)[-BESIDE:])


def is_run(folder: Path) -> bool:
    """Whether a folder has the configuration of a run or of an evaluation."""
    return any((folder / name).is_file() for name in ("config.yaml", "result/config.yaml"))


def is_runs_page(file: Path) -> bool:
    """Whether a file is a page of this module, which may be written again."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return MADE_BY.encode() in opened.read(1000)


def find_runs(folder: Path) -> list[RunFolder]:
    """The runs in `folder` and below, by name. One whose files are damaged, or another program's,
    is named and left out. UserError where there is none."""
    runs = []
    for found in sorted(run_folders(folder)):
        try:
            runs.append(open_run(found, folder))
        except (UserError, OSError) as error:
            print(f"left out: {error}", flush=True)
    if not runs:
        raise UserError(
            f"{folder}: no run in it that can be read: no folder with config.yaml or "
            "result/config.yaml"
        )
    return runs


def run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders with the configuration of a run or of an evaluation, at most `depth` below."""
    for path, names, _ in os.walk(folder):
        names.sort()
        here = Path(path)
        if is_run(here):
            yield here
        names[:] = [name for name in names if name not in OTHERS and not name.startswith(".")]
        if len(here.relative_to(folder).parts) >= depth:
            names.clear()


def open_run(folder: Path, root: Path, log_bytes: int | None = None) -> RunFolder:
    """Read what a run wrote; what it has not written yet is left out, and a log of more bytes."""
    result = folder / "result"
    config = next(
        file for file in (folder / "config.yaml", result / "config.yaml") if file.is_file()
    )
    run = RunFolder(
        name=str(folder.relative_to(root)) if folder != root else folder.resolve().name,
        folder=folder,
        config=dict(flat(read_yaml(config)[0])),
    )
    log = folder / "log.jsonl"
    if log.is_file() and (log_bytes is None or log.stat().st_size <= log_bytes):
        run.log = read_log(log)
    if (result / "metrics.json").is_file():
        found = read_json(result / "metrics.json", kind=dict)
        run.metrics = {key: float(value) for key, value in flat(found) if is_drawn(value)}
        file = result / "config.yaml"
        given = read_yaml(file)[0] if file.is_file() else {}
        given["checkpoint"] = found.get("checkpoint")
        run.scored = {key: show(given[key]) for key in ("checkpoint", *SCORED) if given.get(key)}
    if (result / "report.html").is_file():
        run.page = result / "report.html"
    return run


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. The last line of a run that is under way may be cut: it is left out."""
    lines = read_lines(path)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line.encode(), f"{path}, line {number}", dict))
        except UserError:
            if number < len(lines):
                raise
    return rows


def is_drawn(value: object) -> bool:
    """Whether a value is a number that has a place in a chart: others' logs have NaN, too."""
    return is_number(value) and abs(value) < LARGEST


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def runs_page(runs: Sequence[RunFolder], root: Path, title: str) -> Markup:
    """The HTML document; links are relative to `root`, the folder that it stands in."""
    sections = [card("Runs", overview(runs, root))]
    charts = curves(runs)
    if charts:
        intro = "From log.jsonl, against the update; runs by their numbers above."
        sections.append(card("Curves", group("grid", charts), intro=intro))
    if any(run.metrics for run in runs):
        sections.append(card("Scores", score_comparison(runs), intro="Of result/metrics.json."))
    if len(runs) > 1:
        sections.append(card("Options that differ", option_differences(runs)))
    return page(title, sections, f"{len(runs)} runs", head=Markup(MADE_BY))


def overview(runs: Sequence[RunFolder], root: Path) -> Markup:
    """A line for each run: its number in the charts, its report, and how far it is."""
    rows = []
    for number, run in enumerate(runs, 1):
        name = link(run.name, os.path.relpath(run.page, root)) if run.page else run.name
        training = [row for row in run.log if is_drawn(row.get("loss"))]
        last = training[-1] if training else {}
        loss = f"{last['loss']:.4g}" if last else ""
        epochs = f"{last['epoch']:.1f}" if is_drawn(last.get("epoch")) else ""
        rows.append((name, number, run.steps or "", epochs, loss, len(run.metrics) or ""))
    return table(("run", "number", "updates", "epochs", "last loss", "scores"), rows)


def curves(runs: Sequence[RunFolder]) -> list[Markup]:
    """A chart for each quantity that is logged. A run has the same colour in all of them."""
    logged = {key for run in runs for row in run.log for key in row} - ALWAYS
    logged = {key for key in logged if not ENSEMBLE.search(key)}
    first = ("val_", "loss")  # then whatever else is logged
    in_order = sorted(logged, key=lambda key: (key != "loss", not key.startswith(first), key))
    charts = []
    for key in in_order:
        series = {str(number): points(run, key) for number, run in enumerate(runs, 1)}
        if len({value for line in series.values() for _, value in line}) > 1:  # it changes
            charts.append(line_chart(series, title=key))
        if len(charts) == CURVES:
            break
    return charts


def points(run: RunFolder, key: str) -> list[tuple[float, float]]:
    """(update, value) of one quantity, at most about POINTS of them."""
    found = [
        (row["step"], row[key])
        for row in run.log
        if is_drawn(row.get(key)) and is_drawn(row.get("step"))
    ]
    every = max(1, len(found) // POINTS)
    return [*found[:-1:every], *found[-1:]]


def score_comparison(runs: Sequence[RunFolder]) -> Markup:
    """Scores by name, a column for each run; first of which checkpoint and data they are."""
    scored = [run for run in runs if run.metrics]
    rows: list[tuple] = []
    for key in ("checkpoint", *SCORED):
        if any(key in run.scored for run in scored):
            rows.append((key, *(run.scored.get(key, "") for run in scored)))
    keys = dict.fromkeys(key for run in scored for key in run.metrics)
    for key in keys:
        if ENSEMBLE.search(key):
            continue
        values = [run.metrics.get(key) for run in scored]
        rows.append(
            (score_label(key), *("" if value is None else f"{value:.4g}" for value in values))
        )
    return group("compare", [table(("score", *(run.name for run in scored)), rows)])


def score_label(key: str) -> str:
    """What a score is called: `top1` in words; of a split or data set, with its name."""
    where, _, name = key.removeprefix("results.").rpartition(".")
    words = score_name(name) or name
    return f"{where}: {words}" if where else words


def option_differences(runs: Sequence[RunFolder]) -> Markup:
    """Options that not all runs share, a column for each run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [show(run.config[key]) if key in run.config else "" for run in runs]
        if key not in UNSAID and len(set(values)) > 1:
            rows.append((key, *values))
    return group("compare", [table(("option", *(run.name for run in runs)), rows)])
