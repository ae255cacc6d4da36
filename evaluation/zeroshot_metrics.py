"""Metrics of zero-shot classification from scores of classes: mean per class, ROC-AUC, PASCAL VOC's
mean precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from evaluation.predict import percent

KEPT = 5  # classes kept of an image where only the best matter
NEEDS_SCORES = ("roc_auc", "map11")
LEVELS = torch.arange(11, dtype=torch.float64) / 10  # of recall, where VOC 2007 takes precision
DRAWN = 2**18  # ranks of random orders


def mean_per_class(predicted: Tensor, targets: Tensor) -> float:
    """Accuracy of every class that occurs, averaged, in percent; predicted, targets int64 [N]."""
    shown = targets.bincount()
    right = targets[predicted == targets].bincount(minlength=len(shown))
    accuracy = right.double() / shown
    return percent(accuracy[shown > 0])


def roc_auc(scores: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve in percent: how often an image of class 1 scores above one of class
    0, ties half.

    scores float [N], targets [N] of 0 and 1. NaN where one of the classes does not occur.
    """
    positive = scores[targets == 1].double()
    negative = scores[targets == 0].double().sort().values
    if not len(positive) or not len(negative):
        return float("nan")
    below = torch.searchsorted(negative, positive)
    at_most = torch.searchsorted(negative, positive, right=True)
    return 50 * (below + at_most).double().mean().item() / len(negative)


def precision_recall(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolated precision and recall, float64 [M], at every distinct score from the highest on.

    scores [N], targets [N] of 1, 0 and -1, which is left out. The precision at a recall is the
    highest at that recall or a higher one (Everingham et al. 2010).
    """
    counted = targets >= 0
    order = scores[counted].argsort(descending=True, stable=True)
    ranked = scores[counted][order]
    hits = targets[counted][order].double().cumsum(0)
    last = torch.ones(len(ranked), dtype=torch.bool)  # of equal scores
    last[:-1] = ranked[1:] != ranked[:-1]
    precision = (hits / torch.arange(1, len(hits) + 1))[last]
    highest_from_here = precision.flip(0).cummax(0).values.flip(0)
    recall = hits[last] / hits[-1]
    return highest_from_here, recall


def average_precision(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """PASCAL VOC's average precision of one class in percent: (mean at recall 0, 0.1 ... 1 (2007),
    area (2010))."""
    if not (targets == 1).any():
        return float("nan"), float("nan")
    precision, recall = precision_recall(scores, targets)
    at_levels = precision[torch.searchsorted(recall, LEVELS)]
    steps = recall.diff(prepend=recall.new_zeros(1))
    area = (precision * steps).sum()
    return percent(at_levels), percent(area)


def ranked_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean precision at the rank of every image that shows the class, in percent, averaged over all
    classes: CLIP_benchmark's mean average precision. scores, targets [N,C]; what is not 1
    (shown) counts as not shown.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    shown = (targets.gather(0, order) == 1).double()
    ranks = torch.arange(1, len(shown) + 1, dtype=torch.float64)[:, None]
    precision = shown.cumsum(0) / ranks
    return percent((precision * shown).sum(0) / shown.sum(0).clamp(min=1))


def voc_map(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """(11-point, area) mean average precision in percent over the classes that occur; scores,
    targets [N,C]."""
    rows = []
    for column, target in zip(scores.T, targets.T, strict=True):
        rows.append(average_precision(column, target))
    eleven_point, area = torch.tensor(rows, dtype=torch.float64).nanmean(0).tolist()
    return eleven_point, area


def random_map11(targets: Tensor) -> float:
    """11-point mean average precision of a random order, expected, in percent; targets [N,C] of 1,
    0 and -1, which is left out. An estimate, the same on every machine: there is no closed form.
    """
    generator = torch.Generator().manual_seed(0)
    expected = []
    for target in targets.T[(targets.T == 1).any(1)]:
        positives, total = int((target == 1).sum()), int((target >= 0).sum())
        orders = torch.rand(max(1, DRAWN // total), total, generator=generator).argsort(1)
        ranks = 1 + orders[:, :positives].sort(1).values  # of the positives
        hits = torch.arange(1, positives + 1, dtype=torch.float64)
        precision = (hits / ranks).flip(1).cummax(1).values.flip(1)
        expected.append(percent(precision[:, torch.searchsorted(hits / positives, LEVELS)]))
    return sum(expected) / len(expected) if expected else float("nan")


def measure(metric: str, found: Tensor, targets: Tensor) -> dict[str, float]:
    """The metric and its relatives in percent, by name.

    found: for roc_auc and map11 the scores, float [N,C]; otherwise the classes, best first, int64
    [N,K]. targets int64 [N], of map11 [N,C].
    """
    if metric == "roc_auc":
        auc = roc_auc(found[:, 1] - found[:, 0], targets)
        return {"roc_auc": auc, "acc1": percent(found.argmax(1) == targets)}
    if metric == "map11":
        eleven_point, area = voc_map(found, targets)
        ranked = ranked_precision(found, targets)
        return {"map11": eleven_point, "map": area, "ap": ranked}
    hits = found == targets[:, None]
    acc1 = percent(hits[:, 0])
    acc5 = percent(hits[:, :KEPT].any(1))
    return {
        "acc1": acc1,
        "acc5": acc5,
        "mean_per_class": mean_per_class(found[:, 0], targets),
        "acc1_acc5": (acc1 + acc5) / 2,
    }


def class_figures(metric: str, found: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Accuracy of every class in percent, float64 [C]; of map11 its 11-point average precision. NaN
    for classes that do not occur. found, targets: see `measure`, found for 11-point the scores.
    """
    if metric == "map11":
        figures = []
        for column, target in zip(found.T, targets.T, strict=True):
            figures.append(average_precision(column, target)[0])
        return torch.tensor(figures, dtype=torch.float64)
    shown = targets.bincount(minlength=classes)
    right = targets[found[:, 0] == targets].bincount(minlength=classes)
    return 100 * right.double() / shown


def by_score(names: list[str], function: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """`<metric>_<score>` of every score: function(number of the score) -> metrics by name."""
    result = {}
    for number, name in enumerate(names):
        for metric, value in function(number).items():
            result[f"{metric}_{name}"] = value
    return result
