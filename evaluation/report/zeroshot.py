"""Results of zero-shot evaluation as a table for the terminal and as cards of a page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from markupsafe import Markup

from base import distributed
from base.writing import write_json
from evaluation.published import (
    benchmark_rows,
    run_name,
    vtab_plus,
    vtab_plus_line,
    write_benchmark,
)
from evaluation.report.names import recall_names
from evaluation.report.page import card, group, line_chart, quote, table
from evaluation.report.results import write_results
from evaluation.zeroshot import WEIGHTS

SHOWN = ("z", "h", "zh_0.5")
TITLES = {
    "acc1": "top 1",
    "mean_per_class": "mean per class",
    "roc_auc": "ROC-AUC",
    "acc1_acc5": "mean of top 1 and top 5",
    "map11": "11-point mAP",
    "recall": "recall",
    "text_acc": "text choice",
}
CHOICES = {"text_acc": "text", "image_acc": "image", "acc": "both"}  # Winoground's three scores
EMBEDDINGS = (
    "z: the global embeddings that CLIP compares; h: those of the local projectors; "
    "zh_0.5: the mean of both similarities."
)
TEXT_COLUMNS = (0, 3)  # flush left: the data set, and its metric or score
RECALLS = recall_names("text", "image")


class Evaluated(NamedTuple):
    """Of one data set: figures by metric and score, what makes its card of the page, figures by
    class. entry: has its name, type and metric."""

    entry: Any
    figures: dict[str, Any]
    card: Callable[[], Markup] = Markup
    by_class: Sequence[dict] = ()


Results = Mapping[str, Mapping]  # data set -> {metric, images, <metric>_<score> ...}


def tables(results: Results) -> dict[str, list[list[str]]]:
    """Title -> rows, the first of them the head: the set's own metric by score, and recalls."""
    first = next(iter(results.values()))
    scores = [name for name in SHOWN if any(key.endswith(f"_{name}") for key in first)]
    retrieved = {name: row for name, row in results.items() if row["metric"] == "recall"}
    chosen = {name: row for name, row in results.items() if row["metric"] == "text_acc"}
    others = retrieved.keys() | chosen.keys()
    classified = {name: row for name, row in results.items() if name not in others}
    found = {}
    if classified:
        found["Zero-shot classification, in %"] = classification_rows(classified, scores)
    if retrieved:
        found["Zero-shot retrieval, in %"] = figure_rows(retrieved, scores, "captions", RECALLS)
    if chosen:
        found["Captions and images chosen, in %"] = figure_rows(chosen, scores, "examples", CHOICES)
    return found


def classification_rows(results: Results, scores: list[str]) -> list[list[str]]:
    """Head, a row for each data set, and the means if there are several."""
    rows = [["data set", "images", "classes", "metric", *scores, "chance"]]
    columns: dict[str, list[float]] = {score: [] for score in scores}
    for name, row in results.items():
        metric = row["metric"]
        cells = [name, str(row["images"]), str(row["classes"]), TITLES[metric]]
        for score in scores:
            value = row[f"{metric}_{score}"]
            columns[score].append(value)
            cells.append(_figure(value))
        cells.append(_figure(row.get("chance")))
        rows.append(cells)
    if len(results) > 1:
        means = [_figure(mean(values)) for values in columns.values()]
        by_chance = [row["chance"] for row in results.values() if row.get("chance") is not None]
        known = len(by_chance) == len(results)
        rows.append(["mean", "", "", "", *means, _figure(mean(by_chance) if known else None)])
    return rows


def figure_rows(
    results: Results, scores: list[str], counted: str, columns: Mapping[str, str]
) -> list[list[str]]:
    """Head, and for each data set a row by every score and one of chance; columns: figure ->
    title."""
    rows = [["data set", "images", counted, "score", *columns.values()]]
    for name, row in results.items():
        about = [name, str(row["images"]), str(row[counted])]
        for score in scores:
            figures = [_figure(row[f"{key}_{score}"]) for key in columns]
            rows.append([*about, score, *figures])
        by_chance = row.get("chance") or {}
        figures = [_figure(by_chance.get(key)) for key in columns]
        rows.append([*about, "chance", *figures])
    return rows


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plain_tables(results: Results) -> str:
    """The tables in monospaced text."""
    blocks = []
    for title, rows in tables(results).items():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            for column in TEXT_COLUMNS:
                padded[column] = row[column].ljust(widths[column])
            lines.append("  ".join(padded).rstrip())
        blocks.append("\n".join([title, *lines[:1], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(blocks)


def cards(results: Results, skipped: Mapping[str, str]) -> list[Markup]:
    """The tables, the ensembles' course over the weight of z, and what was left out and why."""
    has_h = any(f"{row['metric']}_h" in row or "txt_r1_h" in row for row in results.values())
    found = []
    for title, rows in tables(results).items():
        found.append(card(title, table(rows[0], rows[1:]), intro=EMBEDDINGS if has_h else ""))
    charts = [ensemble_chart(name, row) for name, row in results.items()]
    if any(charts):
        intro = (
            "w times the similarity of z plus 1 - w times that of h; 0 is h alone, 1 is z alone."
        )
        found.append(card("Ensembles", group("grid", charts), intro=intro))
    if skipped:
        found.append(
            card("Not evaluated", table(["data set", "why"], skipped.items(), None, (0, 1)))
        )
    return found


def ensemble_chart(name: str, row: Mapping) -> Markup:
    """The set's own metric (of retrieval the mean recall) over the weight of z; nothing where there
    is no h."""
    metric = "r_mean" if row["metric"] == "recall" else row["metric"]
    if f"{metric}_h" not in row:
        return Markup()
    points = [(0.0, row[f"{metric}_h"])]
    for w in WEIGHTS:
        points.append((w, row[f"{metric}_zh_{w}"]))
    points.append((1.0, row[f"{metric}_z"]))
    chance = row.get("chance")
    if isinstance(chance, Mapping):
        chance = chance.get(metric)
    guide = None if chance is None else ("chance", chance)
    return line_chart({name: points}, f"{name}, {TITLES.get(metric, 'mean recall')}", "w", guide)


def write_zero_shot(
    config,
    title: str,
    found: Mapping[str, Evaluated],
    skipped: Mapping[str, str],
    vtab: Sequence[str],
) -> None:
    """metrics.json, the page, classes.json and CLIP_benchmark's rows below config.output_dir/result;
    rank 0 does.

    vtab: the data sets of VTAB+; its mean is reported where `vtab+` was asked for, and where all of
    them are there.
    """
    if distributed.rank() != 0:
        return
    results = {name: each.figures for name, each in found.items()}
    source = str(config.checkpoint or config.model)
    rows = benchmark_rows(found.values(), *run_name(config, title))
    figures = {"model": title, "results": results, "skipped": skipped}
    heading = title if title == source else f"{title}, {source}"  # a library's model is both
    text = f"{heading}\n\n{plain_tables(results)}"
    sections = cards(results, skipped)
    summary = vtab_plus(rows, vtab)
    if "vtab+" in config.datasets or not summary["missing"]:
        figures["vtab_plus"] = summary
        line = vtab_plus_line(summary)
        text += f"\n\n{line}"
        sections.insert(0, card("VTAB+", quote(line)))
    if skipped:
        why = "see above" if config.datasets or config.catalog else "why: result/report.html"
        text += f"\n\n{len(skipped)} SKIPPED, {why}: {', '.join(skipped)}"
    sections += [each.card() for each in found.values()]
    write_results(config, "Zero-shot evaluation", figures, sections, text)
    folder = Path(config.output_dir) / "result"
    by_class = {name: each.by_class for name, each in found.items() if each.by_class}
    write_json(folder / "classes.json", by_class, indent=1)
    write_benchmark(folder / "clip_benchmark", config.results or folder / "results.jsonl", rows)
