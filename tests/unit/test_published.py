"""Results and data sets as they are published: CLIP_benchmark's names, rows and shards, VTAB+."""

import json
import math
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base.errors import UserError
from base.reading import read_json, read_json_lines
from base.writing import write_json
from dataset.tasks.catalog import CATALOG, CatalogOptions, Entry, choose, wanted_entries
from dataset.tasks.published import CLIP_BENCHMARK, COLLECTIONS, VTAB_PLUS
from evaluation.probe import ProbeOptions
from evaluation.published import (
    benchmark_metrics,
    benchmark_rows,
    data_name,
    run_name,
    vtab_plus,
    vtab_plus_line,
    write_benchmark,
    write_probe,
)
from evaluation.report.results import write_results
from evaluation.zeroshot_metrics import class_figures, ranked_precision


def evaluated(name: str, **figures):
    return SimpleNamespace(entry=Entry(name, "imagefolder", name), figures=figures)


def test_names_of_clip_benchmark_are_the_catalogues(tmp_path):
    assert {own for own in CLIP_BENCHMARK.values() if own} <= CATALOG.keys()
    found = choose(["imagenet1k", "vtab/pets", "voc2007_multilabel"], CATALOG, tmp_path)
    assert [entry.name for entry in found] == ["imagenet", "pets", "voc2007"]
    assert [entry.published for entry in found] == ["imagenet1k", "vtab/pets", "voc2007_multilabel"]
    (svhn,) = choose(["vtab/svhn"], CATALOG, tmp_path)  # only in shards
    assert (svhn.kind, svhn.path) == ("webdataset", str(tmp_path / "wds_vtab-svhn"))
    (svhn,) = choose(["vtab/svhn"], CATALOG, tmp_path, download=True)
    assert svhn.path == "https://huggingface.co/datasets/clip-benchmark/wds_vtab-svhn"


def test_shards_below_the_root_come_first(tmp_path):
    (tmp_path / "wds_vtab-pets").mkdir()
    (tmp_path / "wds_mine").mkdir()
    (pets,) = choose(["vtab/pets"], CATALOG, tmp_path)
    assert (pets.name, pets.kind, pets.published) == ("wds/vtab/pets", "webdataset", pets.name)
    assert pets.metric == "mean_per_class" and pets.prompts == "pets"
    (cars,) = choose(["wds/cars"], CATALOG, tmp_path)  # wds/ means shards, there or not
    assert cars.path == str(tmp_path / "wds_cars")
    everything = [entry.name for entry in wanted_entries(CatalogOptions(root=tmp_path))]
    assert everything == [*CATALOG, "wds/mine", "wds/vtab/pets"]


def test_collections():
    names = [entry.published.removeprefix("wds/") for entry in choose(["vtab+"], CATALOG)]
    assert len(VTAB_PLUS) == len(set(VTAB_PLUS)) == 35
    assert names == [*VTAB_PLUS, "voc2007_multilabel"]
    assert len(choose(["vtab"], CATALOG)) == len(COLLECTIONS["vtab"]) == 19
    assert len(choose(["sugar_crepe"], CATALOG)) == 7


def test_unknown_names_get_the_nearest(tmp_path):
    for name, nearest in (("wds/vtab/pest", "wds/vtab/pets"), ("imagenet1", "imagenet")):
        with pytest.raises(UserError, match=f"{name!r} is unknown; did you mean {nearest}"):
            choose([name], CATALOG, tmp_path)


def test_row_of_a_linear_probe(tmp_path):
    """The keys of CLIP_benchmark's task `linear_probe`, but for those of its optimizer."""
    options = ProbeOptions(linear_probe=True, probe_l2=0.5, results=tmp_path / "all.jsonl")
    run = {"checkpoint": None, "model": "open_clip/ViT-B-32:laion2b", "output_dir": tmp_path}
    config = SimpleNamespace(**vars(options), **run)
    figures = {"probe": 50.0, "probe_top5": 75.0, "probe_mean_per_class": 25.0}
    write_probe(config, "title", "vtab/cifar10", figures, 10)
    write_probe(config, "title", "few", {**figures, "probe_l2": 0.1}, 5)
    first, second = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert first == {
        "dataset": "vtab/cifar10",
        "model": "ViT-B-32",
        "pretrained": "laion2b",
        "task": "linear_probe",
        "metrics": {
            "lp_acc1": 0.5,
            "lp_acc5": 0.75,
            "lp_mean_per_class_recall": 0.25,
            "weight_decay": 0.5,
            "fewshot_k": -1,
            "normalized": False,
        },
        "language": "en",
    }
    assert second["metrics"]["lp_acc5"] is None and second["metrics"]["weight_decay"] == 0.1
    files = sorted(path.name for path in (tmp_path / "result/clip_benchmark").iterdir())
    assert files[1] == "vtab_cifar10_laion2b_ViT-B-32_en_linear_probe.json"
    names = ["torchvision/CIFAR10:test", "data/pets/test", "lists/flowers.jsonl", "photos"]
    assert [data_name(name) for name in names] == ["cifar10", "pets", "flowers", "photos"]
    with pytest.raises(UserError, match="add --linear-probe"):
        ProbeOptions(data_name="x").check_probe()


@dataclass
class Evaluation:
    checkpoint: str
    val_data: str
    output_dir: Path


def test_figures_of_every_evaluation_in_a_folder_are_kept(tmp_path):
    """Of another checkpoint, of other data, and of an earlier version."""
    write_json(tmp_path / "result/metrics.json", {"checkpoint": "before.pt", "acc1": 1.0})
    for number, (checkpoint, data) in enumerate([("a.pt", "x"), ("b.pt", "x"), ("b.pt", "y")]):
        config = Evaluation(checkpoint, data, tmp_path)
        write_results(config, "title", {"acc1": float(number), "loss": math.nan}, [])
    rows = list(read_json_lines(tmp_path / "result/metrics.jsonl"))
    assert [row["checkpoint"] for row in rows] == ["before.pt", "a.pt", "b.pt", "b.pt"]
    assert [row["acc1"] for row in rows] == [1.0, 0.0, 1.0, 2.0]
    assert [row["config"]["val_data"] for row in rows[1:]] == ["x", "x", "y"]
    newest = read_json(tmp_path / "result/metrics.json")
    assert newest == {"checkpoint": "b.pt", "acc1": 2.0, "loss": "nan"}
    history = tmp_path / "result/metrics.jsonl"
    kept = history.read_text()
    write_results(config, "title", newest, [])  # begun again after a kill
    assert history.read_text() == kept
    history.write_text(kept[:-9])  # cut off
    write_results(config, "title", newest, [])
    assert history.read_text() == kept[:-9] + "\n" + kept.splitlines(keepends=True)[-1]


def test_an_evaluation_says_whose_files_it_replaces(tmp_path, capsys):
    for checkpoint, replaced in (("a.pt", None), ("a.pt", None), ("b.pt", "a.pt")):
        write_results(Evaluation(checkpoint, "x", tmp_path), "title", {"acc1": 1.0}, [])
        said = capsys.readouterr().err
        if replaced is None:
            assert "replaces" not in said
        else:
            assert f"{tmp_path}/result: this evaluation replaces the files of {replaced}" in said


def test_a_long_history_is_not_held_in_memory(tmp_path):
    history = tmp_path / "result/metrics.jsonl"
    history.parent.mkdir()
    history.write_text("x" * 2**21)
    config = Evaluation("a.pt", "x", tmp_path)
    tracemalloc.start()
    try:
        for _ in range(2):
            write_results(config, "title", {"acc1": 1.0}, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    start, row = history.read_text().splitlines()
    assert len(start) == 2**21 and json.loads(row)["acc1"] == 1.0


@pytest.mark.parametrize(
    ("model", "checkpoint", "own", "named"),
    [
        ("open_clip/ViT-B-32:laion2b", None, "", ("ViT-B-32", "laion2b")),
        ("open_clip/ViT-B-32:laion2b", None, "mine", ("mine", "laion2b")),
        ("open_clip/ViT-B-32", "run/b.pt", "", ("ViT-B-32", "run/b.pt")),
        ("open_clip/ViT-B-32", None, "", ("ViT-B-32", "random")),
        ("open_clip/hf-hub:timm/ViT-B", None, "", ("hf-hub:timm/ViT-B", "")),
        ("hf/google/siglip", None, "", ("title", "hf/google/siglip")),
        (None, "run", "", ("title", "run")),
    ],
)
def test_what_a_row_calls_its_run(model, checkpoint, own, named):
    config = SimpleNamespace(model=model, checkpoint=checkpoint, model_name=own)
    assert run_name(config, "title") == named


def test_rows_of_clip_benchmark(tmp_path):
    """The keys and files that `clip_benchmark eval` writes, and the table its `build` makes."""
    classified = {"metric": "mean_per_class", "classes": 4, "acc1_z": 50.0, "acc5_z": 100.0}
    found = [
        evaluated("pets", **classified, mean_per_class_z=25.0, acc1_h=1.0),
        evaluated("voc2007", metric="map11", classes=20, map11_z=1.0, ap_z=12.5),
        evaluated("coco", metric="recall", img_r1_z=1, img_r5_z=5, txt_r5_z=50, txt_r10_z=10),
        evaluated("winoground", metric="text_acc", text_acc_z=30.0, image_acc_z=20.0, acc_z=10.0),
    ]
    rows = benchmark_rows(found, "ViT-B-32", "laion2b/e16")
    assert rows[0] == {
        "dataset": "vtab/pets",
        "model": "ViT-B-32",
        "pretrained": "laion2b/e16",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25},
        "language": "en",
    }
    assert benchmark_metrics({**classified, "classes": 5})["acc5"] == 1.0
    assert rows[1]["metrics"] == {"mean_average_precision": 0.125}
    assert rows[2]["task"] == "zeroshot_retrieval" and rows[2]["dataset"] == "mscoco_captions"
    assert rows[2]["metrics"]["image_retrieval_recall@5"] == 0.05
    assert rows[2]["metrics"]["text_retrieval_recall@5"] == 0.5
    assert rows[3]["task"] == "image_caption_selection"
    assert rows[3]["metrics"] == {"image_acc": 0.2, "text_acc": 0.3, "acc": 0.1}

    lines = tmp_path / "all.jsonl"
    write_benchmark(tmp_path / "rows", lines, rows)
    write_benchmark(tmp_path / "rows", lines, benchmark_rows(found[:1], "RN50", "openai"))
    changed = [evaluated("pets", **classified | {"acc1_z": 75.0})]
    write_benchmark(tmp_path / "rows", lines, benchmark_rows(changed, "ViT-B-32", "laion2b/e16"))
    kept = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["dataset"], row["model"]) for row in kept] == [
        ("voc2007_multilabel", "ViT-B-32"),
        ("mscoco_captions", "ViT-B-32"),
        ("winoground", "ViT-B-32"),
        ("vtab/pets", "RN50"),
        ("vtab/pets", "ViT-B-32"),
    ]
    assert kept[-1]["metrics"]["acc1"] == 0.75
    name = "vtab_pets_e16_ViT-B-32_en_zeroshot_classification.json"
    assert json.loads((tmp_path / "rows" / name).read_text()) == kept[-1]
    assert len(list((tmp_path / "rows").iterdir())) == 5


def test_vtab_plus_is_no_mean_over_fewer():
    rows = []
    for number, name in enumerate(VTAB_PLUS):
        shards = "wds/" if number % 2 else ""
        metrics = {"acc1": number / 100}
        rows.append({"dataset": f"{shards}{name}", "language": "en", "metrics": metrics})
    rows.append({"dataset": "voc2007_multilabel", "language": "en", "metrics": {}})
    rows.append({"dataset": "imagenet1k", "language": "it", "metrics": {"acc1": 1.0}})
    full = vtab_plus(rows, VTAB_PLUS)
    assert full["mean"] == pytest.approx(17) and full["missing"] == []
    assert vtab_plus_line(full) == "VTAB+: mean top 1 17.00 over 35 of 35 data sets"
    part = vtab_plus(rows[:34], VTAB_PLUS)
    assert part["mean"] is None and part["mean_of_present"] == pytest.approx(16.5)
    assert vtab_plus_line(part) == (
        "VTAB+: no mean, 34 of 35 data sets; the mean over those 16.50 is not VTAB+'s; missing: "
        "vtab/svhn"
    )


def test_mean_average_precision_of_clip_benchmark():
    """By hand: class 0 is shown by the images ranked 1 and 3, class 1 by the one ranked 2, class 2
    by none."""
    scores = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.9, 0.4], [0.5, 0.5, 0.3]])
    targets = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, -1]])
    expected = 100 * ((1 + 2 / 3) / 2 + 1 / 2 + 0) / 3
    assert ranked_precision(scores, targets) == pytest.approx(expected)


def test_figures_by_class():
    best = torch.tensor([[0], [1], [1], [1], [0], [2]])
    targets = torch.tensor([0, 0, 0, 1, 2, 2])
    figures = class_figures("acc1", best, targets, 4)
    assert figures[:3].tolist() == pytest.approx([100 / 3, 100, 50]) and figures[3].isnan()
