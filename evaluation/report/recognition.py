"""Labels of images as figures: an image with the attention of its labels, and the pages of a
split."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import torch
from markupsafe import Markup
from torch import Tensor

from base.writing import write_json
from evaluation.report import page
from evaluation.report.examples import SEVERAL_LABELS, gallery
from evaluation.report.images import heat_map, resized

SCORES = {
    "exact_recall": "labels found, spelt alike (recall)",
    "exact_precision": "right among as many labels as an image shows (precision)",
    "exact_f1": "F1 of both",
    "recall": "recall by meaning",
    "precision": "precision by meaning",
    "f1": "F1 by meaning",
    "div_avg": "likeness of an image's labels to one another, by meaning",
}
TILE = 224  # pixels; this and the next two
CAPTION = 24
GAP = 8


def attention_page(
    path: Path, image: Tensor, labels: Sequence[tuple[str, float]], maps: Sequence[Tensor]
) -> None:
    """Save as one image the image uint8 [3,H,W] and, beside it, the same under its first labels'
    attention [g,g]."""
    from PIL import Image, ImageDraw, ImageFont

    tiles = [resized(image, TILE).round().clamp(0, 255).byte()]
    texts = ["the image, as it is seen"]
    for (text, score), heat in zip(labels, maps, strict=False):
        tiles.append(heat_map(image, heat, TILE))
        texts.append(f"{shorten(text, 20, placeholder=' …')}  {score:.1%}")
    across = min(4, len(tiles))
    down = math.ceil(len(tiles) / across)
    width = TILE + GAP
    height = TILE + CAPTION + GAP
    sheet = Image.new("RGB", (across * width + GAP, down * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(number, across)
        left = GAP + column * width
        top = GAP + row * height
        pixels = tile.permute(1, 2, 0).contiguous().numpy()
        sheet.paste(Image.fromarray(pixels), (left, top))
        draw.text((left, top + TILE + 3), text, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_labels(path: Path, data, found: Sequence[Sequence[tuple[str, float]]]) -> None:
    """A JSON list of {image, references, labels: [[text, score]]}; data: the split's images, with
    `names` and `references`."""
    rows = []
    for name, true, labels in zip(data.names, data.references, found, strict=True):
        rounded = [[text, round(score, 5)] for text, score in labels]
        rows.append({"image": name, "references": list(true), "labels": rounded})
    write_json(path, rows)


def label_report(
    data, found: Sequence[Sequence[tuple[str, float]]], metrics: dict, split: str
) -> list[Markup]:
    """Cards of a split: the scores, how often each label was found, and images with their labels.

    data: has `references`, `image(i)` and a length; found: its labels with scores, best first.
    """
    scores = page.score_table(["in %", "score", "chance"], label_scores(metrics), None)
    shown: Counter[str] = Counter()
    named: Counter[str] = Counter()
    right = torch.zeros(len(data), dtype=torch.bool)
    for i, (reference, labels) in enumerate(zip(data.references, found, strict=True)):
        true = set(reference)
        best = {text for text, _ in labels[: len(true)]}
        right[i] = true <= best
        shown.update(true)
        named.update(true & best)
    common = []
    for name, count in shown.most_common(20):
        common.append((name, count, f"{100 * named[name] / count:.1f}"))

    def example(i: int) -> Markup:
        return label_case(data.image(i), found[i][:10], data.references[i], bool(right[i]))

    intro = "Green: what the image shows. The ten likeliest labels each."
    return [
        page.card(f"{split}: {len(data)} images", scores),
        page.card("The most frequent labels", page.table(["label", "images", "found, %"], common)),
        gallery(f"Labels, {split}", right, example, intro=intro, verdicts=SEVERAL_LABELS),
    ]


def label_scores(metrics: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """(name, score, chance) in percent of the figures of `evaluation.recognition`: exact ones are in
    percent already, those by meaning from 0 to 1, and chance is that of the last F1."""
    guessed = "f1" if "f1" in metrics else "exact_f1"
    rows = []
    for name, title in SCORES.items():
        if name in metrics:
            scale = 1 if name.startswith("exact") else 100
            chance = metrics.get("chance") if name == guessed else None
            rows.append((title, scale * metrics[name], chance and scale * chance))
    return rows


def label_case(
    image, labels: Sequence[tuple[str, float]], true: Sequence[str], right: bool
) -> Markup:
    """An image, its labels with their probabilities, the true ones green, and what it shows."""
    items = []
    for text, score in labels:
        items.append((text, f"{score:.1%}", "right" if text in true else "", None))
    shows = ", ".join(dict.fromkeys(true))
    said = page.join(
        page.badge("all found" if right else "not all", right),
        page.ranked(items, f"shows: {shows}"),
    )
    return page.case(page.thumbnail(image, 112, alt=shows), said)
