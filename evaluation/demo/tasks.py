"""What the tabs compute, without the page: scores beside chance."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from base.errors import BadSample, UserError
from evaluation.demo.abilities import Abilities, Embedder
from evaluation.demo.index import Index, nearest_rows
from evaluation.zeroshot import word_probabilities

MOST_NAMES = 2000  # class names or answers that are typed at once
MOST_LETTERS = 2000  # of one text


class Scored(NamedTuple):
    """probability and chance: fractions; chance: what guessing gives every name."""

    name: str
    probability: float
    chance: float


class Hit(NamedTuple):
    """A file, or a text, that was found. against: of the cosine, the mean over all."""

    name: str
    cosine: float
    against: float
    probability: float | None = None


def typed_lines(text: str, what: str) -> list[str]:
    """The distinct lines of a text field. UserError."""
    lines = list(dict.fromkeys(line.strip() for line in (text or "").splitlines() if line.strip()))
    if len(lines) > MOST_NAMES:
        raise UserError(f"{len(lines):,} {what} are more than {MOST_NAMES:,}; give fewer")
    for line in lines:
        typed(line, what)
    return lines


def typed(text: str, what: str) -> str:
    """The text without blanks around it. UserError where nothing is left of it, or too much."""
    text = (text or "").strip()
    if not text:
        raise UserError(f"type {what} first")
    if len(text) > MOST_LETTERS:
        raise UserError(f"{what}: {len(text):,} letters are more than {MOST_LETTERS:,}; shorten it")
    return text


def classify(
    embedder: Embedder, image: Tensor, names: Sequence[str], template: str
) -> list[Scored]:
    """Softmax over scaled cosines of the image and each name in the template, best first."""
    template = typed(template, "a template")
    if "{}" not in template:
        raise UserError(f"the template {template!r} has no {{}} for the class name; add it")
    if len(names) < 2:
        raise UserError("type two class names or more, one a line")
    typed(template.replace("{}", max(names, key=len)), "the longest class name in its template")
    texts = embedder.texts([template.replace("{}", name) for name in names])
    query = embedder.images(embedder.view(image)[None])
    found = word_probabilities(query, texts, names, embedder.scale)
    return [Scored(name, probability, 1 / len(names)) for name, probability in found]


def search_words(embedder: Embedder, index: Index, words: str, k: int) -> list[Hit]:
    """The k images of the folder that fit the words best."""
    return hits(embedder.texts([words])[0], index.files, index.images, k, embedder.scale)


def search_image(embedder: Embedder, index: Index, image: Tensor, k: int) -> list[Hit]:
    """The k images of the folder that resemble an image most. Cosines of two images are no logits:
    there is no probability."""
    query = embedder.images(embedder.view(image)[None])[0]
    return hits(query, index.files, index.images, k)


def search_captions(embedder: Embedder, index: Index, image: Tensor, k: int) -> list[Hit]:
    """The k captions of the folder that fit an image best."""
    query = embedder.images(embedder.view(image)[None])[0]
    return hits(query, index.captions, index.texts, k, embedder.scale)


def hits(
    query: Tensor, names: Sequence[str], rows: Tensor, k: int, scale: float | None = None
) -> list[Hit]:
    """The k of `names`, with rows [N,E], nearest to the query [E]; with a scale also the softmax
    over all N, which 1/N is chance of."""
    best, cosines = nearest_rows(query, rows, k)
    probability = (scale * cosines).softmax(0) if scale else None
    mean = cosines.mean().item()
    return [
        Hit(
            names[i],
            cosines[i].item(),
            mean,
            None if probability is None else probability[i].item(),
        )
        for i in best
    ]


def rematch(
    abilities: Abilities,
    read: Callable[[str], Tensor],
    hits: Sequence[Hit],
    words: str,
    k: int,
) -> tuple[list[Hit], dict[str, float]]:
    """The first k hits in the order of image-text matching, then the others; the probabilities by
    file. read: name of a hit -> its image; one that cannot be read any more stays behind."""
    matches = {}
    for hit in hits[:k]:
        try:
            matches[hit.name] = abilities.match(read(hit.name), [words])[0]
        except BadSample:
            continue
    order = sorted(range(len(hits)), key=lambda i: -matches.get(hits[i].name, -1.0))
    return [hits[i] for i in order], matches


def answer(abilities: Abilities, image: Tensor, question: str, own: Sequence[str]) -> list[Scored]:
    """The likeliest answers, of the user's own or of the checkpoint's list."""
    answers = list(own) or abilities.answers
    if not answers:
        raise UserError("type the answers to choose from, one a line, or start with --answer-list")
    found = abilities.answer(image, question, answers)
    return [Scored(name, probability, 1 / len(answers)) for name, probability in found]


def entail(abilities: Abilities, image: Tensor, sentence: str) -> list[Scored]:
    """The classes of visual entailment, likeliest first."""
    found = abilities.entail(image, sentence)
    return [Scored(name, probability, 1 / len(found)) for name, probability in found]


def small(image: Tensor, side: int):
    """The image for Pillow; its longer side has at most `side` pixels."""
    from PIL import Image

    copy = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    copy.thumbnail((side, side), reducing_gap=2.0)
    return copy
