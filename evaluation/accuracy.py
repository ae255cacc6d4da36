"""Accuracy of a classifier, overall and by class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from base.distributed import World, rank
from evaluation.predict import over_split, percent
from evaluation.report.examples import answer_case, gallery
from evaluation.report.page import card, heading, score_table, table
from runtime.run import evaluating


def statement_logits(
    model, batches, own: Sequence[int], total: int, world: World, precision
) -> tuple[Tensor, dict[str, int]]:
    """`(logits float32 [total,C], damaged images)` of all sentences of a split, the same on every
    process.

    model: has `logits`; batches: dataset.loading.eval.EvalLoader of the rows `own` of this process;
    precision: runtime.optim.build.Precision.
    """

    def predict(**batch: Tensor) -> tuple[Tensor]:
        return (model.logits(**batch),)

    with evaluating(model), precision.autocast():
        (logits,) = over_split(predict, batches, own, total, world, "judging")
    return logits, batches.damages()


def class_accuracy(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict:
    """`accuracy` in percent, `chance` (always the most frequent class), and the accuracy of each
    class.

    logits [R,C], labels int64 [R], names of the C classes.
    """
    right = logits.argmax(1) == labels
    counts = labels.bincount(minlength=len(names))
    result = {
        "accuracy": percent(right),
        "chance": 100 * counts.max().item() / len(labels),
    }
    by_class = {}
    for number, name in enumerate(names):
        if counts[number]:
            by_class[name] = percent(right[labels == number])
    result["by_class"] = by_class
    result["samples"] = len(labels)
    return result


def confusion_table(logits: Tensor, labels: Tensor, names: Sequence[str]) -> str:
    """HTML: how often each true class (row) was given each label (column)."""
    size = len(names)
    pairs = labels * size + logits.argmax(1)
    cells = pairs.bincount(minlength=size * size).view(size, size)
    rows = []
    for name, row in zip(names, cells.tolist(), strict=True):
        rows.append([name, *map(str, row)])
    return table(["true \\ given", *names], rows)


def class_results(
    judged: Mapping[str, tuple[Tensor, dict]], splits: Mapping, names: Sequence[str]
) -> tuple[dict, list[str]]:
    """`(metrics by split, cards of the report)`; the cards on rank 0 alone, the last split's first.

    judged: by split, see `statement_logits`; splits: data with `labels` int64 [R], `records` and
    `files`; names of the classes.
    """
    metrics = {}
    cards = []
    for split, data in splits.items():
        logits, damages = judged[split]
        metrics[split] = class_accuracy(logits, data.labels, names) | damages
        if rank() == 0:
            own = statement_report(split, logits, data.labels, names, data.records, data.files)
            cards = own + cards
    return metrics, cards


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
    scores = class_accuracy(logits, labels, names)
    probability = logits.softmax(1)
    rows = [("all", scores["accuracy"], scores["chance"])]
    for name, value in scores["by_class"].items():
        rows.append((name, value, None))
    right = logits.argmax(1) == labels

    def case(i: int) -> str:
        best = probability[i].sort(descending=True)
        guesses = []
        for number, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            guesses.append((names[number], p))
        record = records[i]
        truth = names[int(labels[i])]
        return answer_case(files(record), record["sentence"], guesses, truth, bool(right[i]))

    by_class = score_table(["accuracy in %", split, "the most frequent class"], rows)
    tables = (by_class, heading("Confusions"), confusion_table(logits, labels, names))
    return [
        card(f"{split}: {len(labels)} statements", *tables),
        gallery(f"Judged, {split}", right, case),
    ]
