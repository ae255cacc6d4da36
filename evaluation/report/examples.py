"""Right and wrong cases of a task as HTML: images, text, what was answered and what is true."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaluation.report.page import card, escape, heat_map, image_uri, thumbnail


def gallery(
    title: str, right: Tensor, case: Callable[[int], str], count: int = 6, intro: str = ""
) -> str:
    """A card of up to `count` wrong and `count` right cases, spread evenly; `right` bool [R],
    case(i) its HTML."""
    blocks = []
    for name, group in (
        ("Wrong", (~right).nonzero().flatten()),
        ("Right", right.nonzero().flatten()),
    ):
        if len(group):
            some = group[torch.linspace(0, len(group) - 1, min(count, len(group))).long()].tolist()
            cases = "".join(case(i) for i in some)
            blocks.append(
                f"<h3>{name}: {len(group)} of {len(right)}</h3><div class='cases'>{cases}</div>"
            )
    return card(title, *blocks, intro=intro)


def answer_case(
    raw_images: Sequence[Path],
    text: str,
    guesses: Sequence[tuple[str, float]],
    truth: str,
    right: bool,
) -> str:
    """Images side by side, the text, guesses with their probabilities (best first), and the true
    answer."""
    images = "".join(thumbnail(image, 112) for image in raw_images)
    lines = "".join(
        _guess(name, share, name == truth, given=place == 0)
        for place, (name, share) in enumerate(guesses)
    )
    badge = f"<span class='badge{' right' if right else ''}'>{'right' if right else 'wrong'}</span>"
    said = f"<p class='quote'>“{escape(text)}”</p><ol>{lines}</ol><figcaption>true: {escape(truth)}</figcaption>"
    return f"<div class='case'><div class='hits' style='flex:none'>{images}</div><div>{badge}{said}</div></div>"


def _guess(name: str, share: float, right: bool, given: bool) -> str:
    """A line of the list of guesses, filled as far as its probability goes; `given`: this one was
    the answer."""
    kind = " class=right" if right else "" if given else " class=other"
    fill = f"background:linear-gradient(90deg,#eef1f5 {share:.0%},transparent {share:.0%})"
    return f"<li{kind} style='{fill}'><span class='score'>{share:.0%}</span>{escape(name)}</li>"


def box_case(
    image: Tensor,
    heat: Tensor,
    text: str,
    boxes: Sequence[Sequence[float]],
    chosen: int,
    target: Sequence[float],
    overlap: float,
) -> str:
    """The image and its heat map under the detected boxes (thin), the chosen one and the true one
    (dashed).

    image uint8 [3,H,W]; heat [H,W]; boxes [x, y, w, h] in its pixels.
    """
    height, width = image.shape[1:]
    level = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    right = overlap >= 0.5
    colour = "var(--right)" if right else "var(--wrong)"
    line = max(width, height) / 200
    marks = [_box(box, "#ffffff99", line) for box in boxes]
    marks += [
        _box(boxes[chosen], colour, 2.5 * line),
        _box(target, "#ffffff", 1.5 * line, dashed=True),
    ]
    frames = "".join(marks)
    figures = "".join(
        f"<svg viewBox='0 0 {width} {height}' style='width:200px'>"
        f"<image href='{image_uri(layer, 400)}' width='{width}' height='{height}' preserveAspectRatio='none'/>"
        f"{frames}</svg>"
        for layer in (image, heat_map(image, level, 400))
    )
    badge = f"<span class='badge{' right' if right else ''}'>IoU {overlap:.2f}</span>"
    said = f"{badge}<p class='quote'>“{escape(text)}”</p>"
    return f"<div class='case'><div>{said}<div class='hits'>{figures}</div></div></div>"


def _box(box: Sequence[float], colour: str, line: float, dashed: bool = False) -> str:
    x, y, w, h = box
    dash = f" stroke-dasharray='{3 * line:.2f}'" if dashed else ""
    place = f"x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' height='{h:.1f}'"
    return f"<rect {place} fill='none' style='stroke:{colour}' stroke-width='{line:.2f}'{dash}/>"
