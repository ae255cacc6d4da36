"""Accuracy of a classifier, overall and by class."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from base.distributed import World
from evaluation.predict import over_split
from evaluation.report.examples import answer_case, gallery
from evaluation.report.page import card, heading, score_table, table


def statement_logits(
    model, batches: Iterable[dict], own: Sequence[int], total: int, world: World
) -> Tensor:
    """float32 [total,C] of a split's statements on every process; see `over_split`. model: has
    `logits`."""
    return over_split(
        lambda **batch: (model.logits(**batch),), batches, own, total, world, "judging"
    )[0]


def class_accuracy(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict:
    """`accuracy` in percent, `chance` (always the most frequent class), and the accuracy of each
    class.

    logits [R,C], labels int64 [R], names of the C classes.
    """
    right = logits.argmax(1) == labels
    counts = labels.bincount(minlength=len(names))
    result = {
        "accuracy": 100 * right.double().mean().item(),
        "chance": 100 * counts.max().item() / len(labels),
    }
    by_class = {
        name: 100 * right[labels == number].double().mean().item()
        for number, name in enumerate(names)
        if counts[number]
    }
    return result | {"by_class": by_class, "samples": len(labels)}


def confusion_table(logits: Tensor, labels: Tensor, names: Sequence[str]) -> str:
    """HTML: how often each true class (row) was given each label (column)."""
    size = len(names)
    cells = (labels * size + logits.argmax(1)).bincount(minlength=size * size).view(size, size)
    rows = ([name, *map(str, row.tolist())] for name, row in zip(names, cells, strict=True))
    return table(["true \\ given", *names], rows)


def statement_report(
    split: str,
    logits: Tensor,
    labels: Tensor,
    names: Sequence[str],
    records: Sequence[dict],
    files: Callable[[dict], Sequence[Path]],
) -> list[str]:
    """Cards of one split: accuracy beside chance, confusions, and statements judged rightly and
    wrongly.

    logits [R,C], labels int64 [R], names of the classes, records with `sentence`, files(record):
    its images.
    """
    scores, probability = class_accuracy(logits, labels, names), logits.softmax(1)
    rows = [
        ("all", scores["accuracy"], scores["chance"]),
        *((name, x, None) for name, x in scores["by_class"].items()),
    ]
    right = logits.argmax(1) == labels

    def case(i: int) -> str:
        best = probability[i].sort(descending=True)
        guesses = [
            (names[k], float(p)) for k, p in zip(best.indices.tolist(), best.values, strict=True)
        ]
        record = records[i]
        return answer_case(
            files(record), record["sentence"], guesses, names[int(labels[i])], bool(right[i])
        )

    by_class = score_table(["accuracy in %", split, "the most frequent class"], rows)
    tables = (by_class, heading("Confusions"), confusion_table(logits, labels, names))
    return [
        card(f"{split}: {len(labels)} statements", *tables),
        gallery(f"Judged, {split}", right, case),
    ]
