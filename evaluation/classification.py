"""Scores of classifiers: top-k accuracy and ImageNet-ReaL; for several labels precision@k, hit@k,
mAP, F1 and more.

Each process scores its own images; tables are then looked at a block of classes at a time, which
bounds the memory at 21,841 classes x 50,000 images. Results do not depend on the number of
processes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import World, gather_objects, gather_rows
from base.errors import UserError
from base.heartbeat import beat
from base.reading import read_json
from evaluation.predict import Guesses, check_finite, percent, progress

BLOCK = 512  # classes looked at together
TOP = 5
MOST_SHOWN = 20  # classes kept of an image for its page


@dataclass
class Scores:
    """What one process has scored: logits float32 [n,C] of the images `own`, and all labels of all
    images."""

    logits: Tensor  # on the CPU
    own: Sequence[int]
    labels: list[list[int]]  # of all images, on every process
    device: torch.device = torch.device("cpu")  # where processes exchange tables

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n,...] of this process's images -> [N,...] of all, on `device` of every process."""
        own = torch.as_tensor(list(self.own), dtype=torch.int64)
        return gather_rows(rows.contiguous().to(self.device), own, len(self.labels))

    def guesses(self, sigmoid: bool = False) -> Guesses:
        """The best classes of every image with their probabilities, on every process (collective):
        five, or as many as an image has labels, MOST_SHOWN at most.

        sigmoid: every class has a probability of its own.
        """
        probability = self.logits.sigmoid() if sigmoid else self.logits.softmax(1)
        labels = max(map(len, self.labels), default=0)
        best = top_classes(self.logits, max(TOP, min(MOST_SHOWN, labels)))
        scores = self.gather(probability.gather(1, best)).cpu()
        return Guesses(self.gather(best).cpu(), scores, self.labels)


@dataclass
class Validation:
    """Scores in percent and other figures, by name, and what the network said of every image."""

    metrics: dict[str, float] = field(default_factory=dict)
    guesses: Guesses | None = None


def validate(
    scores: Scores,
    multi_label: bool,
    real: Sequence[Sequence[int]] | None = None,
    damages: Mapping[str, int] | None = None,
    original: bool = False,
) -> Validation:
    """The metrics of a split, with the `damages` of its images, the same on every process
    (collective). real, original: see `single_label_metrics` and `multi_label_metrics`."""
    if multi_label:
        metrics = multi_label_metrics(scores, original)
    else:
        metrics = single_label_metrics(scores, real, original)
    metrics.update(damages or {})
    return Validation(metrics, scores.guesses(sigmoid=multi_label))


def score(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
) -> Scores:
    """Run a network over this process's part of a split: batches with image, labels [B,K] and
    label_weights [B,K]."""
    found = []
    mine = []
    for batch in progress(batches, "scoring", world):
        logits = logits_of(batch["image"].to(world.device, non_blocking=True))
        found.append(logits.float().cpu())
        for row, weights in zip(batch["labels"], batch["label_weights"], strict=True):
            mine.append(row[weights > 0].tolist())
    labels: list[list[int]] = [[] for _ in range(total)]
    for indices, rows in gather_objects((list(own), mine)):
        for index, row in zip(indices, rows, strict=True):
            labels[index] = row
    width = max(gather_objects(found[0].shape[1] if found else 0))
    return Scores(torch.cat(found) if found else torch.zeros(0, width), own, labels, world.device)


# ---- one label


def single_label_metrics(
    scores: Scores, real: Sequence[Sequence[int]] | None = None, original: bool = False
) -> dict[str, float]:
    """`top1`, `top5` and with ReaL's labels `real`, in percent; `chance` (the most frequent class)
    and `loss`.

    real: the classes that are right for each image; images without any are left out (Beyer et al.
    2020), as are from the other figures those that a threshold left no label. UserError where none
    has one. original: such an image is of class 0, as COYO-ViT has it.
    """
    has_label = torch.tensor([original or bool(row) for row in scores.labels])
    check_labelled(has_label)
    labels = torch.tensor([row[0] if row else 0 for row in scores.labels])
    own = torch.as_tensor(list(scores.own), dtype=torch.int64)
    losses = F.cross_entropy(scores.logits, labels[own], reduction="none")
    losses = scores.gather(losses).cpu()
    check_finite(losses, "the network's losses")
    losses = losses[has_label]
    best = scores.gather(top_classes(scores.logits)).cpu()
    labels = labels[has_label]
    hits = best[has_label] == labels[:, None]
    result = {
        "top1": percent(hits[:, 0]),
        f"top{TOP}": percent(hits.any(1)),
    }
    if real is not None:
        right = []
        for first, classes in zip(best[:, 0].tolist(), real, strict=True):
            if classes:
                right.append(first in classes)
        result["real"] = percent(torch.tensor(right))
        result["real_images"] = len(right)
    most_frequent = labels.bincount().max().item()
    result["chance"] = 100 * most_frequent / len(labels)
    result["loss"] = losses.double().mean().item()
    result["images"] = len(labels)
    return result


def check_labelled(has_label: Tensor) -> None:
    """UserError where no image has a label; bool [N]."""
    if not has_label.any():
        raise UserError("no image to validate with has a label: lower --label-threshold")


def top_classes(logits: Tensor, k: int = TOP) -> Tensor:
    """The k best classes, int64 [n,k]; all of them where there are fewer."""
    return logits.topk(min(k, logits.shape[1]), 1).indices


def read_real(path: Path, names: Sequence[str]) -> list[list[int]]:
    """ImageNet-ReaL's `real.json`, classes by image, in the order of `names`.

    The file lists the images in the order of their names, ILSVRC2012_val_00000001 first. Raises
    UserError where it is missing, no such list, without classes, or of another number of images.
    """
    lists = read_json(
        path, list, "--real takes real.json of ImageNet-ReaL; fetch it, or leave it out"
    )
    if not all(isinstance(each, list) and all(type(n) is int for n in each) for each in lists):
        raise UserError(
            f"--real {path}: expected a list with a list of class numbers for each image"
        )
    if not any(lists):
        raise UserError(f"--real {path}: no image has a class; fetch the file again")
    if len(lists) != len(names):
        raise UserError(
            f"--real {path}: labels {len(lists)} images, the validation split has {len(names)}"
        )
    result: list[list[int]] = [[] for _ in names]
    by_name = sorted(range(len(names)), key=lambda index: Path(names[index]).name)
    for index, classes in zip(by_name, lists, strict=True):
        result[index] = classes
    return result


# ---- several labels


def multi_label_metrics(scores: Scores, original: bool = False) -> dict[str, float]:
    """In percent: `precision@k` and `hit@k` for k = 1, 5; mAP and F1, each over classes (macro) and
    over all labels (micro); `chance` (mAP of a random order). `bce`: mean over images and classes.
    Images without labels count.

    mAP averages over the classes that occur, macro F1 over all classes (0 where 0 / 0). original:
    what COYO-ViT reports, too: `auc`, the ROC area of 200 thresholds (classes that do not occur
    count 0), and `accuracy`, both of (image, class) pairs. UserError where no image has a label.
    """
    check_labelled(torch.tensor([bool(row) for row in scores.labels]))
    logits = scores.logits
    classes = logits.shape[1]
    best = scores.gather(top_classes(logits)).tolist()
    hits = []
    for guesses, row in zip(best, scores.labels, strict=True):
        hits.append([guess in row for guess in guesses])
    result = {}
    for k in (1, TOP):
        among = torch.tensor(hits)[:, :k]
        result[f"precision@{k}"] = percent(among)
        result[f"hit@{k}"] = percent(among.any(1))
    parts = []
    for first in range(0, classes, BLOCK):
        beat("in validation (metrics)")
        last = min(first + BLOCK, classes)
        block = scores.gather(logits[:, first:last])
        targets = block_targets(scores.labels, first, last).to(block.device)
        parts.append(class_statistics(block, targets, original))
    counts = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    check_finite(counts["bce"], "the network's losses")
    result.update(summary(counts, len(scores.labels), original))
    return result


def block_targets(labels: Sequence[Sequence[int]], first: int, last: int) -> Tensor:
    """bool [N,last-first]: which of these classes each image shows."""
    targets = torch.zeros(len(labels), last - first, dtype=torch.bool)
    rows = []
    columns = []
    for row, classes in enumerate(labels):
        for number in classes:
            if first <= number < last:
                rows.append(row)
                columns.append(number - first)
    targets[rows, columns] = True
    return targets


def class_statistics(logits: Tensor, targets: Tensor, original: bool = False) -> dict[str, Tensor]:
    """Sums over N images for each of T classes, float64 [T]: of logits float32 [N,T] and targets
    bool [N,T]."""
    given = logits > 0
    bce = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    counts = {
        "precisions": precision_at_positives(logits, targets),
        "positives": targets.sum(0).double(),
        "given": given.sum(0).double(),
        "right": (given & targets).sum(0).double(),
        "bce": bce.double().sum(0),
    }
    if original:
        counts["auc"] = roc_area(logits, targets)
        counts["equal"] = (given == targets).sum(0).double()
    return counts


def precision_at_positives(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ over a class's positives of the precision at its rank, float64 [T]; of equal scores the
    earlier image comes first. Divided by the number of positives it is the average precision.
    """
    order = logits.argsort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order).double()
    ranks = torch.arange(1, len(hits) + 1, dtype=torch.float64, device=hits.device)
    precisions = hits.cumsum(0) / ranks[:, None]
    return (precisions * hits).sum(0)


def random_precision(positives: Tensor, total: int) -> Tensor:
    """Average precision of a random order, expected, float64 [T]: of classes that `positives`
    float64 [T], at least 1, of `total` images show.

    More than the fraction that shows the class: a positive at rank k has itself among its k, and of
    the other k - 1 each is one of the other positives as often as any.
    """
    inverse = (1 / torch.arange(1, total + 1, dtype=torch.float64)).mean()
    others = (positives - 1) / max(1, total - 1)
    return inverse + (1 - inverse) * others


def roc_area(logits: Tensor, targets: Tensor, thresholds: int = 200) -> Tensor:
    """Area under the ROC curve through 200 thresholds of the sigmoid, by trapezoids, float64 [T],
    as Keras' AUC."""
    inner = torch.arange(1, thresholds - 1, dtype=torch.float64) / (thresholds - 1)
    edges = [-1e-7, *inner.float().tolist(), 1 + 1e-7]
    scores = logits.sigmoid()
    positives = targets.sum(0).double().clamp(min=1)
    negatives = (~targets).sum(0).double().clamp(min=1)
    true_rates = []
    false_rates = []
    for edge in edges:
        above = scores > edge
        true_rates.append((above & targets).sum(0) / positives)
        false_rates.append((above & ~targets).sum(0) / negatives)
    true = torch.stack(true_rates)
    false = torch.stack(false_rates)
    heights = (true[:-1] + true[1:]) / 2
    widths = false[:-1] - false[1:]
    return (heights * widths).sum(0)


def summary(counts: dict[str, Tensor], total: int, original: bool) -> dict[str, float]:
    """Figures of all classes from the sums of each."""
    positives = counts["positives"]
    shown = positives > 0
    right = counts["right"]
    f1 = 2 * right / (positives + counts["given"]).clamp(min=1)
    f1_micro = 2 * right.sum() / (positives + counts["given"]).sum().clamp(min=1)
    average_precision = counts["precisions"] / positives
    micro = counts["precisions"].sum() / positives.sum().clamp(min=1)
    cells = total * len(positives)
    result = {
        "mAP": percent(average_precision[shown]),
        "mAP_micro": 100 * micro.item(),
        "F1_macro": percent(f1),
        "F1_micro": 100 * f1_micro.item(),
        "bce": (counts["bce"].sum() / cells).item(),
        "chance": percent(random_precision(positives[shown], total)),
        "classes_shown": int(shown.sum()),
        "images": total,
    }
    if original:
        result["auc"] = percent(counts["auc"])
        result["accuracy"] = 100 * (counts["equal"].sum() / cells).item()
    return result
