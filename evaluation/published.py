"""Results of zero-shot evaluation and of linear probes in the form that CLIP_benchmark writes and its `clip_benchmark
build` reads: a JSON file a data set, and all of them as JSON lines."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from base import distributed
from base.reading import read_json_lines
from base.writing import write_json, write_json_lines
from evaluation.retrieval import AT

SAME_RUN = ("dataset", "model", "pretrained", "task", "language")
TASKS = {"recall": "zeroshot_retrieval", "text_acc": "image_caption_selection"}
ADDRESSES = ("hf-hub:", "local-dir:")  # open_clip's, instead of a name and its tag
SPLITS = ("train", "val", "validation", "valid", "test")  # names of folders
FEWEST_FOR_TOP5 = 5  # classes; with fewer CLIP_benchmark has no top 5


def benchmark_rows(found: Iterable, model: str, pretrained: str) -> list[dict[str, object]]:
    """A row of CLIP_benchmark for every data set, metrics as fractions by the score z.

    found: each has `entry` (its `published` name, `language`) and `figures`: metric, <metric>_z ...
    in percent.
    """
    rows = []
    for each in found:
        rows.append(
            {
                "dataset": each.entry.published,
                "model": model,
                "pretrained": pretrained,
                "task": TASKS.get(each.figures["metric"], "zeroshot_classification"),
                "metrics": benchmark_metrics(each.figures),
                "language": each.entry.language,
            }
        )
    return rows


def benchmark_metrics(result: Mapping) -> dict[str, float | None]:
    """The metrics of one data set as CLIP_benchmark calls them, from 0 to 1."""
    names = {"mean_average_precision": "ap", "roc_auc": "roc_auc"}
    if result["metric"] == "recall":
        for at in AT:
            names[f"image_retrieval_recall@{at}"] = f"img_r{at}"
            names[f"text_retrieval_recall@{at}"] = f"txt_r{at}"
    elif result["metric"] == "text_acc":
        names |= {"image_acc": "image_acc", "text_acc": "text_acc", "acc": "acc"}
    else:
        names |= {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "mean_per_class"}
    found: dict[str, float | None] = {}
    for published, own in names.items():
        if f"{own}_z" in result:
            found[published] = result[f"{own}_z"] / 100
    if "acc5" in found and result["classes"] < FEWEST_FOR_TOP5:
        found["acc5"] = None
    return found


def write_benchmark(folder: Path, lines: Path, rows: Sequence[Mapping]) -> None:
    """A JSON file a row in `folder`, called as CLIP_benchmark does, and the rows as JSON lines.

    Lines of other runs stay in the file; those of the same data set, model and task are replaced.
    """
    for row in rows:
        parts = [row["dataset"], Path(row["pretrained"]).name, row["model"]]
        name = "_".join(str(part) for part in (*parts, row["language"], row["task"]))
        plain = re.sub(r"[^\w.+-]", "_", name)
        write_json(folder / f"{plain}.json", row)
    new = {tuple(row[key] for key in SAME_RUN) for row in rows}
    kept = []
    for row in read_json_lines(lines) if lines.is_file() else ():
        if tuple(row.get(key) for key in SAME_RUN) not in new:
            kept.append(row)
    write_json_lines(lines, [*kept, *rows])


def run_name(config, title: str) -> tuple[str, str]:
    """`model` and `pretrained` as CLIP_benchmark calls a run: ViT-B-32 and laion2b of
    open_clip/ViT-B-32:laion2b, the whole address of open_clip/hf-hub:..., else the model and its
    checkpoint. --model-name comes first."""
    model = str(config.model or "")
    if not model.startswith("open_clip/"):
        return config.model_name or title, str(config.checkpoint or model)
    name = model.removeprefix("open_clip/")
    tag = ""
    if not name.startswith(ADDRESSES):
        name, _, tag = name.partition(":")
        tag = tag or "random"  # without tag and checkpoint it is --random-weights
    return config.model_name or name, str(config.checkpoint or tag)


def write_probe(config, title: str, data_set: str, figures: Mapping, classes: int) -> None:
    """CLIP_benchmark's row of a linear probe below config.output_dir/result; rank 0 does.

    title: of the model; data_set: as CLIP_benchmark calls it; figures: see `linear_probe`. The
    probe here is fitted by L-BFGS, so that a row has no epochs.
    """
    if distributed.rank() != 0:
        return
    metrics: dict[str, object] = {
        "lp_acc1": figures["probe"] / 100,
        "lp_acc5": figures["probe_top5"] / 100 if classes > FEWEST_FOR_TOP5 else None,
        "lp_mean_per_class_recall": figures["probe_mean_per_class"] / 100,
        "weight_decay": figures.get("probe_l2", config.probe_l2),
        "fewshot_k": -1,  # all images
        "normalized": False,
    }
    model, pretrained = run_name(config, title)
    row = {
        "dataset": data_set,
        "model": model,
        "pretrained": pretrained,
        "task": "linear_probe",
        "metrics": metrics,
        "language": "en",
    }
    folder = Path(config.output_dir) / "result"
    write_benchmark(folder / "clip_benchmark", config.results or folder / "results.jsonl", [row])


def data_name(data: str) -> str:
    """What a set of labelled images is called: `cifar10` of torchvision/CIFAR10:test, `pets` of
    data/pets/test."""
    if data.startswith("torchvision/"):
        return data.removeprefix("torchvision/").partition(":")[0].lower()
    path = Path(data)
    name = path.parent.name if path.name in SPLITS else path.stem
    return name or data


def vtab_plus(rows: Sequence[Mapping], names: Sequence[str]) -> dict[str, object]:
    """Mean top 1 in percent over the 35 data sets of VTAB+, as published; None where any is
    missing.

    names: the data sets. `mean_of_present`: the mean over those that are there, no VTAB+ figure.
    """
    found = {}
    for row in rows:
        name = str(row["dataset"]).removeprefix("wds/")
        if name in names and row["language"] == "en" and "acc1" in row["metrics"]:
            found[name] = 100 * row["metrics"]["acc1"]
    missing = [name for name in names if name not in found]
    present = mean(found.values()) if found else None
    return {
        "data_sets": len(names),
        "present": len(found),
        "mean": None if missing else present,
        "mean_of_present": present,
        "missing": missing,
    }


def vtab_plus_line(summary: Mapping) -> str:
    """The summary in one sentence."""
    of = f"{summary['present']} of {summary['data_sets']} data sets"
    if not summary["missing"]:
        return f"VTAB+: mean top 1 {summary['mean']:.2f} over {of}"
    present = summary["mean_of_present"]
    partial = "" if present is None else f"; the mean over those {present:.2f} is not VTAB+'s"
    return f"VTAB+: no mean, {of}{partial}; missing: {', '.join(summary['missing'])}"
