"""Results of the tabs as HTML and as entries of the gallery."""

from collections.abc import Sequence

from markupsafe import Markup
from torch import Tensor

from evaluation.demo.index import Index
from evaluation.demo.tasks import Hit, Scored
from evaluation.report import page
from evaluation.report.images import heat_map

ROWS = 20  # of a table of scores
NAMED = 20  # unreadable images that are named
TILE = 208  # pixels of a side


def percent(fraction: float) -> str:
    """`41.2 %`, with two digits below 1 %."""
    value = 100 * fraction
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2g} %"


def score_rows(scored: Sequence[Scored], what: str, remark: str = "") -> Markup:
    """Names with probability beside chance. what: of the first column; remark: a line below."""
    lines = []
    for each in scored[:ROWS]:
        bar = page.bar(100 * each.probability, 100 * each.chance)
        lines.append([each.name, bar, percent(each.probability), percent(each.chance)])
    head = [what, "", "probability", "chance"]
    hidden = len(scored) - len(lines)
    more = f"{hidden} less likely ones are not shown. " if hidden > 0 else ""
    return with_note(page.table(head, lines, 0), more + remark)


def label_rows(labels: Sequence[tuple[str, float]], remark: str) -> Markup:
    """Labels with their probabilities; a label is free text, no chance is known."""
    lines = []
    for text, probability in labels[:ROWS]:
        lines.append([text, page.bar(100 * probability), percent(probability)])
    return with_note(page.table(["label", "", "probability"], lines, 0), remark)


def tiles(image: Tensor, heats: Sequence[tuple[str, Tensor]]) -> Markup:
    """The image, and the same under the heat [g,g] of each word."""
    cells = [page.figure(page.thumbnail(image, TILE), "the image")]
    for word, heat in heats:
        cells.append(page.figure(page.thumbnail(heat_map(image, heat, 2 * TILE), TILE), word))
    return page.group("words", cells)


def note(text: str) -> Markup:
    """A quiet line."""
    return Markup("<p class='note'>{}</p>").format(text)


def with_note(block: Markup, text: str) -> Markup:
    return page.join(block, note(text)) if text else block


def caption_rows(hits: Sequence[Hit], total: int) -> Markup:
    """Captions of the folder that fit an image."""
    scored = [Scored(hit.name, hit.probability, 1 / total) for hit in hits]
    return score_rows(
        scored, "caption", f"Probability: softmax over the folder's {total:,} captions."
    )


def hit_text(hit: Hit, total: int, match: float | None = None) -> str:
    """What stands below an image that was found among `total`."""
    if match is not None:
        return f"matches {percent(match)}\n{hit.name}"
    if hit.probability is None:
        return f"cosine {hit.cosine:.3f}\n{hit.name}"
    times = hit.probability * total
    multiple = f"{times:,.1f}" if times >= 0.05 else "< 0.1"
    return f"{percent(hit.probability)} = {multiple} × chance\n{hit.name}"


def found_note(hits: Sequence[Hit], total: int, milliseconds: float, matched: int = 0) -> Markup:
    """The line above the images that were found. matched: how many of them image-text matching has
    put first."""
    took = f"{total:,} images compared in {milliseconds:.1f} ms"
    if not hits or hits[0].probability is None:
        mean = f"{hits[0].against:.3f}" if hits else "-"
        return note(f"{took}. Cosine of the images; the mean of the folder is {mean}.")
    chance = percent(1 / total)
    line = f"{took}. Probability: softmax over the folder; chance is {chance}."
    if matched:
        line += f" The first {matched}: the probability that the words match the image."
    return note(line)


def folder_note(index: Index) -> Markup:
    """How many images are searched, and which cannot be."""
    line = f"{len(index):,} images of {index.root.name or index.root}"  # not where it lies
    if not index.unreadable:
        return note(line)
    names = [f"{name}: {reason}" for name, reason in index.unreadable.items()]
    items = Markup("").join(Markup("<li>{}</li>").format(name) for name in names[:NAMED])
    if len(names) > NAMED:
        items += Markup("<li>and {} more</li>").format(len(names) - NAMED)
    summary = f"{len(index.unreadable)} unreadable"
    block = "<details class='note'><summary>{} · {}</summary><ul>{}</ul></details>"
    return Markup(block).format(line, summary, items)
