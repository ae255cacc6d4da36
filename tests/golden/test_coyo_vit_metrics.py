"""Metrics of classification, and kNN, against the numbers of COYO-ViT and COYO-ALIGN."""

import pytest
import torch

from base.distributed import World
from evaluation.classification import (
    Scores,
    class_statistics,
    multi_label_metrics,
    single_label_metrics,
)
from evaluation.features import Bank
from evaluation.knn import knn_accuracy, nearest_neighbours, votes
from tests.golden.report import record
from tests.helpers.golden import golden


def close(name, ours, theirs):
    record("coyo_vit metrics", name, abs(ours - theirs) / theirs)
    assert ours == pytest.approx(theirs, rel=2e-6)


def lists(targets):
    return [row.nonzero().flatten().tolist() for row in targets]


def test_multi_label_metrics():
    meta, t = golden("coyo_vit", "metrics")
    expected = meta["results"]["multi"]
    logits = [t[f"logits.{i}"] for i in range(meta["batches"])]
    targets = [t[f"multi_labels.{i}"] for i in range(meta["batches"])]
    together = Scores(torch.cat(logits), range(24), lists(torch.cat(targets)))
    ours = multi_label_metrics(together, details=True)
    close("precision", ours["hit@1"] / 100, expected["top1_prec"])
    close("precision", ours["precision@1"] / 100, expected["top1_prec"])
    close("area under ROC", ours["auc"], expected["auc_multi_label"])
    close("accuracy", ours["accuracy"] / 100, expected["binary_acc_thr0"])
    close("bce", ours["bce"], expected["bce_metric"])
    close("F1", ours["F1_macro"] / 100, expected["macro_f1"])
    close("F1", ours["F1_micro"] / 100, expected["micro_f1"])
    batches = [
        class_statistics(z, y.bool()) for z, y in zip(logits, targets, strict=True)
    ]  # the original's AP is by batch
    precisions = sum(each["precisions"] for each in batches)
    positives = sum(each["positives"] for each in batches)
    close("mAP", (precisions.sum() / positives.sum()).item(), expected["map_micro"])
    close("mAP", (precisions / positives).mean().item(), expected["map_macro"])


def test_single_label_metrics():
    meta, t = golden("coyo_vit", "metrics")
    expected, batches = meta["results"]["single"], range(meta["batches"])
    logits = torch.cat([t[f"logits.{i}"] for i in batches])
    labels = lists(torch.cat([t[f"single_labels.{i}"] for i in batches]))
    ours = single_label_metrics(Scores(logits, range(24), labels))
    close("top-k accuracy", ours["top1"] / 100, expected["top1_acc"])
    close("top-k accuracy", ours["top5"] / 100, expected["top5_acc"])


def test_nearest_neighbour():
    meta, t = golden("align", "knn")
    train, queries = (
        Bank(t[f"{name}_features"].numpy(), t[f"{name}_labels"].long()) for name in ("train", "val")
    )
    world = World(0, 1, 0, torch.device("cpu"))
    neighbours = nearest_neighbours(train, queries, 1, world)
    assert torch.equal(neighbours.index[:, 0], t["nearest_index"].long())
    assert torch.equal(
        votes(neighbours, train.labels, meta["classes"], 1)[:, 0], t["predicted_labels"]
    )
    score = knn_accuracy(neighbours, train.labels, queries.labels, meta["classes"], [1], 0.07)[
        "knn1"
    ]
    assert f"{score:.3f}" == meta["accuracy_percent"]
