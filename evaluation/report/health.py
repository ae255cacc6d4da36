"""The page of scripts/doctor.py: what is wrong with a data set, with examples."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from evaluation.report import page

SHOWN = 8  # examples of a problem


def health_page(
    title: str,
    tables: Iterable[tuple[str, Sequence[str], Sequence[Sequence[object]]]],
    problems: Iterable[tuple[str, Sequence[tuple[Path | None, str]]]],
    groups: Iterable[tuple[str, Sequence[Sequence[tuple[Path | None, str]]]]],
) -> Markup:
    """The HTML document.

    tables: (title, head, rows). problems: (problem, examples), an example an image's file, where
    there is one, and a text. groups: (title, groups of examples that are duplicates).
    """
    sections = []
    for name, head, rows in tables:
        shown = page.table(head, rows) if rows else page.bold("nothing wrong")
        sections.append(page.card(name, shown))
    for problem, examples in problems:
        shown = [_example(*example) for example in examples[:SHOWN]]
        sections.append(page.card(problem, page.group("cases", shown)))
    for name, found in groups:
        shown = [page.group("hits", [_example(*each) for each in group]) for group in found[:SHOWN]]
        sections.append(page.card(name, *shown, intro=f"{len(found):,} groups"))
    return page.page(title, sections)


def _example(image: Path | None, text: str) -> Markup:
    return page.figure(_thumbnail(image), text) if image else page.quote(text)


def _thumbnail(image: Path) -> Markup:
    try:
        return page.thumbnail(image)
    except Exception:  # an unreadable image is one of the problems that are shown
        return page.badge("unreadable", False)
