"""Metrics of classification, and kNN, against the numbers of COYO-ViT and COYO-ALIGN."""

import torch

from base.distributed import World
from evaluation.classification import (
    Scores,
    class_statistics,
    multi_label_metrics,
    single_label_metrics,
    top_classes,
)
from evaluation.features import Bank
from evaluation.knn import knn_accuracy, nearest_neighbours, votes
from tests.golden.report import compare, same
from tests.helpers.golden import golden


def close(name, ours, theirs):
    compare("coyo_vit metrics", name, ours, theirs, 2e-6)


def lists(targets):
    return [row.nonzero().flatten().tolist() for row in targets]


def test_multi_label_metrics():
    meta, t = golden("coyo_vit", "metrics")
    expected = meta["results"]["multi"]
    logits = [t[f"logits.{i}"] for i in range(meta["batches"])]
    targets = [t[f"multi_labels.{i}"] for i in range(meta["batches"])]
    total = meta["batches"] * meta["batch"]
    together = Scores(torch.cat(logits), range(total), lists(torch.cat(targets)))
    assert together.logits.shape == (total, meta["classes"])
    ours = multi_label_metrics(together, original=True)
    close("precision", ours["hit@1"] / 100, expected["top1_prec"])
    close("precision", ours["precision@1"] / 100, expected["top1_prec"])
    close("area under ROC", ours["auc"] / 100, expected["auc_multi_label"])
    close("accuracy", ours["accuracy"] / 100, expected["binary_acc_thr0"])
    close("bce", ours["bce"], expected["bce_metric"])
    close("F1", ours["F1_macro"] / 100, expected["macro_f1"])
    close("F1", ours["F1_micro"] / 100, expected["micro_f1"])
    best = top_classes(together.logits)[:, :3]
    hit = [
        any(c in row for c in guess)
        for guess, row in zip(best.tolist(), together.labels, strict=True)
    ]
    close("precision", sum(hit) / total, expected["top3_prec"])
    # with one label an image: the first of a row, class 0 where there is none
    single = single_label_metrics(together, original=True)
    close("top-k accuracy", single["top1"] / 100, expected["top1_acc"])
    close("top-k accuracy", single["top5"] / 100, expected["top5_acc"])
    batches = [class_statistics(z, y.bool()) for z, y in zip(logits, targets, strict=True)]
    precisions = sum(each["precisions"] for each in batches)  # the original's AP is by batch
    positives = sum(each["positives"] for each in batches)
    close("mAP", (precisions.sum() / positives.sum()).item(), expected["map_micro"])
    each = precisions / positives.clamp(
        min=1
    )  # a class that does not occur counts 0 there, and is left out here
    close("mAP", each.mean().item(), expected["map_macro"])


def test_single_label_metrics():
    meta, t = golden("coyo_vit", "metrics")
    expected, batches = meta["results"]["single"], range(meta["batches"])
    logits = torch.cat([t[f"logits.{i}"] for i in batches])
    labels = lists(torch.cat([t[f"single_labels.{i}"] for i in batches]))
    ours = single_label_metrics(Scores(logits, range(len(logits)), labels))
    close("top-k accuracy", ours["top1"] / 100, expected["top1_acc"])
    close("top-k accuracy", ours["top1"] / 100, expected["categorical_accuracy"])
    close("top-k accuracy", ours["top5"] / 100, expected["top5_acc"])


def test_nearest_neighbour():
    meta, t = golden("align", "knn")
    sides = ("train", "val")
    train, queries = (
        Bank(t[f"{side}_features"].numpy(), t[f"{side}_labels"].long()) for side in sides
    )
    sizes = [len(t[f"{side}_labels"]) for side in sides]
    same("align knn", "sizes", sizes, [meta[side] for side in sides])
    world, k, classes = World(0, 1, 0, torch.device("cpu")), meta["k"], meta["classes"]
    neighbours = nearest_neighbours(train, queries, k, world)
    same("align knn", "nearest", neighbours.index[:, 0], t["nearest_index"].long())
    predicted = votes(neighbours, train.labels, classes, k)[:, 0]
    same("align knn", "predicted labels", predicted, t["predicted_labels"])
    scores = knn_accuracy(neighbours, train.labels, queries.labels, classes, [k], 0.07)
    same("align knn", "accuracy", f"{scores[f'knn{k}']:.3f}", meta["accuracy_percent"])
