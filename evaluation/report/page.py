"""Self-contained HTML pages of results, with no link to anything outside the file, and no script
but the few lines that sort a table.

Every function returns `Markup`; plain strings handed to one are escaped. The HTML itself is in
blocks.html.j2, its style in page.css.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from torch import Tensor

from evaluation.report.chart import Points, lay_out
from evaluation.report.images import image_uri

SORTABLE = '<table class="sortable">'
FOUND = {"txt": "caption", "img": "image"}  # what is retrieved


@cache
def blocks():
    """The macros of blocks.html.j2."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("blocks.html.j2").module


def page(
    title: str,
    sections: Iterable[Markup],
    subtitle: str = "",
    footer: str | Markup = "",
    head: Markup | None = None,
) -> Markup:
    """The whole HTML document. head: further elements of its <head>."""
    sections = list(sections)
    sortable = any(SORTABLE in section for section in sections)
    return blocks().page(title, sections, subtitle, footer, sortable, head or Markup())


def card(title: str, *contents: Markup, intro: str = "") -> Markup:
    """A titled section of blocks."""
    return blocks().card(title, contents, intro)


def folded(title: str, cards: Iterable[Markup]) -> Markup:
    """Cards that a click on the title unfolds."""
    return blocks().folded(title, list(cards))


def heading(text: str) -> Markup:
    """A heading inside a card."""
    return blocks().heading(text)


def group(kind: str, contents: Iterable[Markup]) -> Markup:
    """Blocks side by side; kind: grid (charts), cases, hits or words."""
    return blocks().group(kind, list(contents))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    best_row: int | None = None,
    text_columns: Sequence[int] = (0,),
) -> Markup:
    """A table; one row may be set in bold. text_columns: flush left, the others flush right."""
    return blocks().table(head, list(rows), best_row, list(text_columns))


def sortable_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], text_columns: Sequence[int] = (0,)
) -> Markup:
    """A table, as high as a screen, that a click on a heading sorts; text_columns: flush left."""
    return blocks().sortable_table(head, list(rows), list(text_columns))


def score_bar(score: float) -> Markup:
    """A bar as long as a score in percent."""
    return blocks().bar(score, None)


def score_table(
    head: Sequence[str], rows: Iterable[tuple[str, float, float | None]], best_row: int | None = 0
) -> Markup:
    """Names with a score and the score of chance (None = unknown), in percent.

    A bar shows the score, with a mark at chance.
    """
    lines = []
    for name, score, guess in rows:
        chance = "" if guess is None else f"{guess:.1f}"
        lines.append((name, f"{score:.1f}", chance, blocks().bar(score, guess)))
    return table([*head, ""], lines, best_row)


def recall_table(rows: Mapping[str, Mapping[str, float]], best_row: int | None = 0) -> Markup:
    """Recalls in percent by row name, each a dict as `evaluation.retrieval.recalls` gives."""
    keys = []
    head = ["recall in %"]
    for way, name in FOUND.items():
        for k in (1, 5, 10):
            keys.append(f"{way}_r{k}")
            head.append(f"{name} R@{k}")
    keys.append("r_mean")
    head.append("mean")
    lines = []
    for name, recalls in rows.items():
        figures = [f"{recalls[key]:.1f}" for key in keys]
        lines.append([name, *figures])
    return table(head, lines, best_row)


def choices_table(scores: Mapping) -> Markup:
    """Text, image and group accuracy by ITM and ITC beside chance, as
    `evaluation.compositional.match_examples` gives them."""
    names = ("text_acc", "image_acc", "acc")
    rows = []
    for title, prefix in (("ITM", ""), ("ITC", "itc_")):
        rows.append([title, *(f"{scores[prefix + name]:.1f}" for name in names)])
    rows.append(["chance", *(f"{scores['chance'][name]:.1f}" for name in names)])
    return table(["in %", "text", "image", "both"], rows)


def thumbnail(source: Path | bytes | Tensor, side: int = 96, right: bool | None = None) -> Markup:
    """An <img>, framed green or red where it is right or wrong. source: see `image_uri`."""
    return blocks().thumbnail(image_uri(source, 2 * side), side, right)


def figure(image: Markup, caption: str) -> Markup:
    """An image with its caption."""
    return blocks().figure(image, caption)


def badge(text: str, right: bool) -> Markup:
    """A small label, green where something is right."""
    return blocks().badge(text, right)


def link(text: str, address: str) -> Markup:
    """A link to another page beside this one."""
    return blocks().link(text, address)


def quote(text: str) -> Markup:
    """A text of the data set, as written."""
    return blocks().quote(text)


def bold(text: str) -> Markup:
    """A line of the page's own words."""
    return blocks().bold(text)


def ranked(items: Iterable[tuple[str, str, str, float | None]], note: str = "") -> Markup:
    """A list, best first, of (text, score as text, kind, fill).

    kind: right (green), "" (red) or other (grey). fill: fraction of the line that is shaded.
    """
    return blocks().ranked(list(items), note)


def case(left: Markup | None, right: Markup) -> Markup:
    """One example: images on the left, what was said of them on the right."""
    return blocks().case(left, right)


def line_chart(
    series: Mapping[str, Points],
    title: str = "",
    x_label: str = "step",
    guide: tuple[str, float] | None = None,
) -> Markup:
    """An SVG of lines, each a sequence of (x, y); `guide` is a named dashed level."""
    chart = lay_out(series, title, x_label, guide)
    return Markup() if chart is None else blocks().chart(chart)


def join(*contents: Markup) -> Markup:
    """Blocks one after another."""
    return Markup().join(contents)
