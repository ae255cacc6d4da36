"""The page of k nearest neighbours: scores, classes, confusions, and images beside their nearest."""

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup
from torch import Tensor

from evaluation.knn import Neighbours, votes
from evaluation.predict import Guesses
from evaluation.report.classes import class_cards, neighbour_hits, score_card
from evaluation.report.images import LazyImages

SHOWN = 5  # neighbours of an image


def neighbour_report(
    title: str,
    names: Sequence[str],
    metrics: Mapping[str, float],
    neighbours: Neighbours,
    labels: tuple[Tensor, Tensor],
    images: tuple[Callable[[int], object], Callable[[int], object]],
    temperature: float,
) -> list[Markup]:
    """All cards. The classes are those of the weighted votes of all neighbours that were searched.

    labels: int64 of the training images and of the queries; images: the same, by number (see
    `LazyImages`).
    """
    train_labels, query_labels = labels
    train = LazyImages(images[0], len(train_labels))
    queries = LazyImages(images[1], len(query_labels))
    k = neighbours.index.shape[1]
    classes = 1 + max(int(train_labels.max()), int(query_labels.max()))
    best = votes(neighbours, train_labels, classes, k, temperature)[:, :1]
    guesses = Guesses(best, None, [[label] for label in query_labels.tolist()])

    def nearest(number: int) -> Markup:
        first = neighbours.index[number, :SHOWN].tolist()
        same = (train_labels[first] == query_labels[number]).tolist()
        texts = [f"{cosine:.2f}" for cosine in neighbours.similarity[number, :SHOWN].tolist()]
        return neighbour_hits([train[each] for each in first], same, texts)

    cards = class_cards(title, names, guesses, queries, nearest)
    return [score_card(title, metrics, guesses.truth), *cards]
