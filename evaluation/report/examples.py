"""Right and wrong examples of a task: images, text, what was answered and what is true."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from markupsafe import Markup
from torch import Tensor

from evaluation.report import page
from evaluation.report.images import heat_map, image_uri


def spread(items: Tensor, count: int) -> list[int]:
    """Up to `count` of the int64 [N] items, evenly spaced."""
    if not len(items):
        return []
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).long()].tolist()


def gallery(
    title: str,
    right: Tensor,
    case: Callable[[int], Markup],
    count: int = 6,
    intro: str = "",
    verdicts: tuple[str, str] = ("Wrong", "Right"),
) -> Markup:
    """A card of up to `count` wrong and `count` right examples, evenly spread.

    right: bool [R]. case(i): HTML of example i. verdicts: headings of the two.
    """
    contents = []
    for name, group in zip(verdicts, (~right, right), strict=True):
        chosen = spread(group.nonzero().flatten(), count)
        if chosen:
            contents.append(page.heading(f"{name}: {int(group.sum())} of {len(right)}"))
            contents.append(page.group("cases", [case(i) for i in chosen]))
    return page.card(title, *contents, intro=intro)


SEVERAL_LABELS = ("Not all labels found", "All labels found")  # of images with several


def kind(right: bool, said: bool) -> str:
    """How `page.ranked` shows an answer: green where it is right, red where it was said and is
    wrong, grey where it was not said."""
    if right:
        return "right"
    return "" if said else "other"


def answer_case(
    images: Sequence[Path],
    text: str,
    guesses: Sequence[tuple[str, float]],
    truth: str,
    right: bool,
) -> Markup:
    """Images side by side, the text, guesses with their probabilities, and the true answer.

    guesses: best first; the first is the answer given.
    """
    items = []
    for rank, (name, probability) in enumerate(guesses):
        shown = kind(name == truth, said=rank == 0)
        items.append((name, f"{probability:.0%}", shown, probability))
    said = page.join(
        page.badge("right" if right else "wrong", right),
        page.quote(text),
        page.ranked(items, f"true: {truth}"),
    )
    return page.case(
        page.join(*(page.thumbnail(image, 112, alt=image.name) for image in images)), said
    )


def box_case(
    image: Tensor,
    heat: Tensor,
    text: str,
    boxes: Sequence[Sequence[float]],
    chosen: int,
    target: Sequence[float],
    overlap: float,
) -> Markup:
    """The image and its heat map under all boxes (thin), the chosen one and the true one (dashed).

    image uint8 [3,H,W]; heat [H,W]; boxes [x, y, w, h] in its pixels; overlap: their IoU.
    """
    height, width = image.shape[1:]
    level = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    right = overlap >= 0.5
    line = max(width, height) / 200
    marks = [(*box, "#ffffff99", line, False) for box in boxes]
    marks.append((*boxes[chosen], "var(--right)" if right else "var(--wrong)", 2.5 * line, False))
    marks.append((*target, "#ffffff", 1.5 * line, True))
    layers = (image, heat_map(image, level, 400))
    names = ("the image with its boxes", "the heat map of the expression")
    figures = []
    for layer, name in zip(layers, names, strict=True):
        figures.append(page.boxes(image_uri(layer, 400), width, height, marks, name))
    said = page.join(
        page.badge(f"IoU {overlap:.2f}", right), page.quote(text), page.group("hits", figures)
    )
    return page.case(None, said)
