"""Self-contained HTML pages of results, with no link to anything outside the file, and no script
but the few lines that sort a table.

Every function returns `Markup`; plain strings handed to one are escaped. The HTML itself is in
blocks.html.j2, its style in page.css.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from evaluation.report.chart import Points, lay_out
from evaluation.report.images import image_uri
from evaluation.report.names import recall_names

SORTABLE = '<table class="sortable">'


@cache
def blocks() -> Any:
    """The macros of the template. It is compiled at the first use: 30 ms that no script waits for
    at its start."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("blocks.html.j2").module


def macro(name: str) -> Callable[..., Markup]:
    """A macro of the template, which says what it takes."""
    return lambda *values, **named: getattr(blocks(), name)(*values, **named)


badge = macro("badge")
bar = macro("bar")
bold = macro("bold")
boxes = macro("boxes")
case = macro("case")
figure = macro("figure")
folded = macro("folded")
group = macro("group")
heading = macro("heading")
link = macro("link")
quote = macro("quote")
ranked = macro("ranked")
sortable_table = macro("sortable_table")
table = macro("table")


def page(
    title: str,
    sections: Iterable[Markup],
    subtitle: str = "",
    footer: str | Markup = "",
    head: Markup | None = None,
) -> Markup:
    """The whole HTML document. head: further elements of its `<head>`."""
    sections = list(sections)
    sortable = any(SORTABLE in section for section in sections)
    return blocks().page(title, sections, subtitle, footer, sortable, head or Markup())


def card(title: str, *contents: Markup, intro: str = "") -> Markup:
    """A titled section of blocks."""
    return blocks().card(title, contents, intro)


def score_table(
    head: Sequence[str], rows: Iterable[tuple[str, float, float | None]], best_row: int | None = 0
) -> Markup:
    """Names with a score and the score of chance (None = unknown), in percent.

    A bar shows the score, with a mark at chance.
    """
    lines = []
    for name, score, guess in rows:
        chance = "" if guess is None else f"{guess:.1f}"
        lines.append((name, f"{score:.1f}", chance, bar(score, guess)))
    return table([*head, ""], lines, best_row)


def recall_table(rows: Mapping[str, Mapping[str, float]], best_row: int | None = 0) -> Markup:
    """Recalls in percent by row name, each a dict as `evaluation.retrieval.recalls` gives."""
    columns = {**recall_names("caption", "image"), "r_mean": "mean"}
    lines = []
    for name, recalls in rows.items():
        figures = [f"{recalls[key]:.1f}" for key in columns]
        lines.append([name, *figures])
    return table(["recall in %", *columns.values()], lines, best_row)


def choices_table(scores: Mapping) -> Markup:
    """Text, image and group accuracy by ITM and ITC beside chance, as
    `evaluation.compositional.match_examples` gives them."""
    names = ("text_acc", "image_acc", "acc")
    rows = []
    for title, prefix in (("ITM", ""), ("ITC", "itc_")):
        rows.append([title, *(f"{scores[prefix + name]:.1f}" for name in names)])
    rows.append(["chance", *(f"{scores['chance'][name]:.1f}" for name in names)])
    return table(["in %", "text", "image", "both"], rows)


def thumbnail(
    source: Path | bytes | Tensor, side: int = 96, right: bool | None = None, alt: str = ""
) -> Markup:
    """An `<img>`, framed green or red where it is right or wrong. source: see `image_uri`; alt: what
    it shows, where no text beside it says so."""
    return blocks().thumbnail(image_uri(source, 2 * side), side, right, alt)


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
