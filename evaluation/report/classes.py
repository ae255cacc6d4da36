"""What a classifier says of single images and classes: examples, confused pairs, figures by class."""

from collections.abc import Sequence

import torch
from markupsafe import Markup
from torch import Tensor

from base.errors import BadSample
from evaluation.report import page
from evaluation.report.examples import gallery
from evaluation.zeroshot import Classified
from evaluation.zeroshot_metrics import confusions

EXAMPLES = 4  # right ones, and as many wrong ones
PAIRS = 10  # confused classes
LISTED = 100  # classes up to which all are listed; of more, the ends of the list
ENDS = 20


class Shown(Sequence):
    """The pixels of the images of a data set, black where an image cannot be read: those are
    counted where the set is evaluated."""

    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.images[index]["image"]
        except BadSample:
            return torch.zeros(3, 8, 8, dtype=torch.uint8)


def class_name(names: str | Sequence[str]) -> str:
    """The first of a class's names."""
    return names if isinstance(names, str) else names[0]


def classification_card(
    name: str, images: Sequence[Tensor], classes: Sequence, found: Classified
) -> Markup:
    """Examples, confused pairs and the accuracy of every class. images: uint8 [3,H,W] each."""
    names = [class_name(each) for each in classes]
    contents = []
    if found.targets.ndim == 1:
        contents = [_examples(images, names, found), _confused(names, found)]
    return page.card(name, *contents, _by_class(names, found))


def _examples(images: Sequence[Tensor], names: Sequence[str], found: Classified) -> Markup:
    right = found.best[:, 0] == found.targets

    def case(index: int) -> Markup:
        target, best = int(found.targets[index]), found.best[index].tolist()
        kinds = ["right" if each == target else "other" for each in best]
        if not right[index]:
            kinds[0] = ""
        items = [(names[each], "", kind, None) for each, kind in zip(best, kinds, strict=True)]
        said = page.join(
            page.badge("right" if right[index] else "wrong", bool(right[index])),
            page.ranked(items, f"true: {names[target]}"),
        )
        return page.case(page.thumbnail(images[index], 112), said)

    return gallery("Examples", right, case, EXAMPLES)


def _confused(names: Sequence[str], found: Classified) -> Markup:
    pairs = confusions(found.best[:, 0], found.targets, PAIRS)
    if not pairs:
        return Markup()
    shown = found.targets.bincount(minlength=len(names))
    rows = []
    for target, taken, images in pairs:
        of = int(shown[target])
        rows.append((names[target], names[taken], f"{images} of {of}", f"{100 * images / of:.1f}"))
    head = ["class", "taken for", "images", "in %"]
    return page.join(page.heading("Confused most often"), page.table(head, rows))


def _by_class(names: Sequence[str], found: Classified) -> Markup:
    rows = []
    for row in class_rows(names, found):
        if row["figure"] is not None:
            rows.append((row["class"], row["images"], row["figure"]))
    rows.sort(key=by_figure)
    title = "By class, the hardest first"
    if len(rows) > LISTED:
        rows = rows[:ENDS] + rows[-ENDS:]
        title += f" ({ENDS} hardest and {ENDS} easiest of {len(names)}; all: result/classes.json)"
    figure = "accuracy in %" if found.targets.ndim == 1 else "11-point average precision in %"
    cells = [(name, images, f"{value:.1f}") for name, images, value in rows]
    return page.join(page.heading(title), page.table(["class", "images", figure], cells))


def by_figure(row: tuple[str, int, float]) -> float:
    return row[2]


def class_rows(classes: Sequence, found: Classified) -> list[dict]:
    """Of every class its name, its images and its figure in percent, None without images."""
    if found.targets.ndim == 1:
        shown = found.targets.bincount(minlength=len(classes))
    else:
        shown = (found.targets == 1).sum(0)
    rows = []
    for number, names in enumerate(classes):
        figure = found.by_class[number]
        rows.append(
            {
                "class": class_name(names),
                "images": int(shown[number]),
                "figure": None if torch.isnan(figure) else figure.item(),
            }
        )
    return rows
