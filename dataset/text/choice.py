"""One of several texts, by weights or with equal probability.

Draws from Python's `random`, which the data stream reseeds for every sample: the choice is the same
on any number of workers and after a resume.
"""

import random
from collections.abc import Sequence

from base.text import is_blank


def choose(texts: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """One of the texts. weights: positive, one a text; none = equal."""
    if weights is None:
        return random.choice(texts)
    return random.choices(texts, weights)[0]


def with_text(
    texts: Sequence[str], weights: Sequence[float] | None = None
) -> tuple[list[str], list[float] | None]:
    """The texts that are not blank, and their weights; ([], None) where all are."""
    kept = [number for number, text in enumerate(texts) if not is_blank(text)]
    if weights is None or not kept:
        return [texts[number] for number in kept], None
    return [texts[number] for number in kept], [weights[number] for number in kept]
