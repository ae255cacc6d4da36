"""Scores of classifiers: top-k accuracy and ImageNet-ReaL; for several labels precision@k, hit@k,
mAP, F1 and more.

Each process scores its own images; tables are then looked at a block of classes at a time, which
bounds the memory at 21,841 classes x 50,000 images. Results do not depend on the number of
processes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import World, gather_objects, gather_rows
from base.errors import UserError
from base.files import read_json
from evaluation.predict import progress

BLOCK = 512  # classes looked at together
TOP = 5


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


def score(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
) -> Scores:
    """Run a network over this process's part of a split: batches with image, labels [B,K] and
    label_weights [B,K]."""
    found, mine = [], []
    for batch in progress(batches, "scoring", world):
        found.append(logits_of(batch["image"].to(world.device, non_blocking=True)).float().cpu())
        for row, weights in zip(
            batch["labels"].tolist(), batch["label_weights"].tolist(), strict=True
        ):
            mine.append([label for label, weight in zip(row, weights, strict=True) if weight > 0])
    labels: list[list[int]] = [[] for _ in range(total)]
    for indices, rows in gather_objects((list(own), mine)):
        for index, row in zip(indices, rows, strict=True):
            labels[index] = row
    width = max(gather_objects(found[0].shape[1] if found else 0))
    return Scores(torch.cat(found) if found else torch.zeros(0, width), own, labels, world.device)


# --------------------------------------------------------------------------------------------------------- one label


def single_label_metrics(
    scores: Scores, real: Sequence[Sequence[int]] | None = None
) -> dict[str, float]:
    """`top1`, `top5` and with ReaL's labels `real`, in percent; `chance` (the most frequent class)
    and `loss`.

    real: the classes that are right for each image; images without any are left out (Beyer et al.
    2020).
    """
    total, labels = (
        len(scores.labels),
        torch.tensor([row[0] if row else 0 for row in scores.labels]),
    )
    best = scores.gather(top_classes(scores.logits)).cpu()
    mine = labels[torch.as_tensor(list(scores.own), dtype=torch.int64)]
    losses = scores.gather(F.cross_entropy(scores.logits, mine, reduction="none")).cpu()
    hits = best == labels[:, None]
    result = {f"top{k}": percent(hits[:, :k].any(1)) for k in (1, TOP)}
    if real is not None:
        counted = [
            (int(first), right) for first, right in zip(best[:, 0], real, strict=True) if right
        ]
        right = torch.tensor([first in right for first, right in counted])
        result |= {"real": percent(right), "real_images": len(counted)}
    chance = 100 * labels.bincount().max().item() / total
    return result | {"chance": chance, "loss": losses.double().mean().item(), "images": total}


def top_classes(logits: Tensor) -> Tensor:
    """The five best classes, int64 [n,5]; all of them where there are fewer."""
    return logits.topk(min(TOP, logits.shape[1]), 1).indices


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def read_real(path: Path, names: Sequence[str]) -> list[list[int]]:
    """ImageNet-ReaL's `real.json`, classes by image, in the order of `names`.

    The file lists the images in the order of their names, ILSVRC2012_val_00000001 first. Raises
    UserError where it is missing, no such list, or of another number of images.
    """
    lists = read_json(
        path, list, "--real takes real.json of ImageNet-ReaL; fetch it, or leave it out"
    )
    if not all(isinstance(each, list) for each in lists):
        raise UserError(f"--real {path}: expected a list with a list of classes for each image")
    if len(lists) != len(names):
        raise UserError(
            f"--real {path}: labels {len(lists)} images, the validation split has {len(names)}"
        )
    place = {
        index: rank
        for rank, index in enumerate(sorted(range(len(names)), key=lambda i: Path(names[i]).name))
    }
    return [lists[place[index]] for index in range(len(names))]


# ---------------------------------------------------------------------------------------------------- several labels


def multi_label_metrics(scores: Scores, details: bool = False) -> dict[str, float]:
    """In percent: `precision@k` and `hit@k` for k = 1, 5; mAP and F1, each over classes (macro) and
    over all labels (micro); `chance` (mAP of random scores). `bce`: mean over images and classes.
    Images without labels count.

    mAP averages over the classes that occur, macro F1 over all classes (0 where 0 / 0). details:
    also `auc`, the ROC area of 200 thresholds (classes that do not occur count 0), and `accuracy`,
    both of (image, class) pairs.
    """
    logits, classes, result = scores.logits, scores.logits.shape[1], {}
    best = scores.gather(top_classes(logits)).tolist()
    hits = torch.tensor(
        [[c in row for c in guess] for guess, row in zip(best, scores.labels, strict=True)]
    )
    for k in (1, TOP):
        among = hits[:, :k]
        result |= {
            f"precision@{k}": 100 * among.double().mean().item(),
            f"hit@{k}": percent(among.any(1)),
        }
    parts = []
    for first in range(0, classes, BLOCK):
        last = min(first + BLOCK, classes)
        table, targets = (
            scores.gather(logits[:, first:last]),
            block_targets(scores.labels, first, last),
        )
        parts.append(class_statistics(table, targets.to(table.device), details))
    counts = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return result | summary(counts, len(scores.labels), details)


def block_targets(labels: Sequence[Sequence[int]], first: int, last: int) -> Tensor:
    """bool [N,last-first]: which of these classes each image shows."""
    targets = torch.zeros(len(labels), last - first, dtype=torch.bool)
    pairs = [(row, c - first) for row, each in enumerate(labels) for c in each if first <= c < last]
    if pairs:
        rows, columns = torch.tensor(pairs).T
        targets[rows, columns] = True
    return targets


def class_statistics(logits: Tensor, targets: Tensor, details: bool = False) -> dict[str, Tensor]:
    """Sums over N images for each of T classes, float64 [T]: of logits float32 [N,T] and targets
    bool [N,T]."""
    given, hits = logits > 0, (logits > 0) & targets
    counts = {
        "precisions": precision_at_positives(logits, targets),
        "positives": targets.sum(0).double(),
        "given": given.sum(0).double(),
        "right": hits.sum(0).double(),
        "bce": F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
        .double()
        .sum(0),
    }
    if details:
        counts |= {"auc": roc_area(logits, targets), "equal": (given == targets).sum(0).double()}
    return counts


def precision_at_positives(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ over a class's positives of the precision at its place in the ranking, float64 [T]; of
    equal scores the earlier image comes first. Divided by the number of positives it is the average
    precision.
    """
    order = logits.argsort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order).double()
    places = torch.arange(1, len(hits) + 1, dtype=torch.float64, device=hits.device).unsqueeze(1)
    return (hits.cumsum(0) / places * hits).sum(0)


def roc_area(logits: Tensor, targets: Tensor, thresholds: int = 200) -> Tensor:
    """Area under the ROC curve through 200 thresholds of the sigmoid, by trapezoids, float64 [T],
    as Keras' AUC."""
    inner = torch.arange(1, thresholds - 1, dtype=torch.float64) / (thresholds - 1)
    scores = logits.sigmoid()
    above = [scores > edge for edge in (-1e-7, *inner.float().tolist(), 1 + 1e-7)]
    rates = []
    for kind in (targets, ~targets):
        count = kind.sum(0).double()
        rates.append(torch.stack([(each & kind).sum(0) / count.clamp(min=1) for each in above]))
    true, false = rates
    return ((true[:-1] + true[1:]) / 2 * (false[:-1] - false[1:])).sum(0)


def summary(counts: dict[str, Tensor], total: int, details: bool) -> dict[str, float]:
    """Figures of all classes from the sums of each."""
    positives, shown = counts["positives"], counts["positives"] > 0
    f1 = 2 * counts["right"] / (positives + counts["given"]).clamp(min=1)
    cells = total * len(positives)
    result = {
        "mAP": 100 * (counts["precisions"] / positives)[shown].mean().item(),
        "mAP_micro": 100 * (counts["precisions"].sum() / positives.sum().clamp(min=1)).item(),
        "F1_macro": 100 * f1.mean().item(),
        "F1_micro": 200
        * (counts["right"].sum() / (positives + counts["given"]).sum().clamp(min=1)).item(),
        "bce": (counts["bce"].sum() / cells).item(),
        "chance": 100 * (positives[shown] / total).mean().item(),
        "classes_shown": int(shown.sum()),
        "images": total,
    }
    if details:
        result |= {
            "auc": counts["auc"].mean().item(),
            "accuracy": 100 * (counts["equal"].sum() / cells).item(),
        }
    return result
