"""k nearest neighbours by cosine, exact, in tiles: memory does not grow with the number of training
images.

Queries are cut into units of fixed size, and unit u belongs to process u mod P; training features
pass by in tiles of fixed size. So any number of processes computes the same products, and equal
similarities go to the earlier image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from base.distributed import World, gather_rows
from evaluation.features import Bank
from evaluation.predict import percent, progress
from evaluation.retrieval import units

UNIT = 1024  # queries
TILE = 16384  # training images


class Neighbours(NamedTuple):
    """The K nearest training images of Q queries, nearest first: cosines float32 [Q,K], numbers
    int64 [Q,K]."""

    similarity: Tensor
    index: Tensor


def nearest_neighbours(train: Bank, queries: Bank, k: int, world: World) -> Neighbours:
    """Of every query, on the CPU of every process. k: at most the number of training images."""
    k = min(k, len(train))
    total = len(queries)
    own = units(total, UNIT, world)
    wanted = []
    best = []
    for unit in own:
        wanted.append(queries.unit(unit[0], unit[-1] + 1, world.device))
        best.append(_nothing(len(unit), k, world.device))
    for first in progress(range(0, len(train), TILE), "neighbours", world):
        last = min(first + TILE, len(train))
        tile = train.unit(first, last, world.device).T
        for number, query in enumerate(wanted):
            found = first_of(query @ tile, k)
            best[number] = merged(best[number], found, first)
    best.append(_nothing(0, k, world.device))  # a process may have no unit
    rows = torch.tensor([i for unit in own for i in unit], dtype=torch.int64)
    similarity = torch.cat([part.similarity for part in best])
    index = torch.cat([part.index for part in best])
    return Neighbours(
        similarity=gather_rows(similarity, rows, total).cpu(),
        index=gather_rows(index, rows, total).cpu(),
    )


def _nothing(count: int, k: int, device: torch.device) -> Neighbours:
    none = torch.full((count, k), -torch.inf, device=device)
    return Neighbours(none, torch.zeros(count, k, dtype=torch.int64, device=device))


def first_of(similarity: Tensor, k: int) -> Neighbours:
    """The k largest of each row [q,n], largest first, of equal ones those that come first."""
    wanted = min(k + 1, similarity.shape[1])
    values, index = similarity.topk(wanted, 1)
    if wanted > k:
        # topk chooses among equals as it likes: sort the rows with equals on both sides of the cut
        equal = values[:, k - 1] == values[:, k]
        torn = equal.nonzero().flatten()
        if len(torn):
            rows = similarity[torn]
            order = rows.sort(dim=1, descending=True, stable=True)
            values[torn] = order.values[:, :wanted]
            index[torn] = order.indices[:, :wanted]
        values = values[:, :k]
        index = index[:, :k]
    index, order = index.sort(1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbours(values, index.gather(1, again))


def merged(best: Neighbours, found: Neighbours, offset: int) -> Neighbours:
    """The K nearest of those so far and those of a later tile, whose columns are numbered from
    `offset`."""
    values = torch.cat([best.similarity, found.similarity], 1)
    index = torch.cat([best.index, found.index + offset], 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    k = best.index.shape[1]
    return Neighbours(values[:, :k], index.gather(1, order[:, :k]))


def votes(
    neighbours: Neighbours, labels: Tensor, classes: int, k: int, temperature: float | None = None
) -> Tensor:
    """Classes by their votes, most first, int64 [Q,min(5,C)]; of equal votes the smaller class.

    labels int64 [N] of the training images. Each of the k nearest has one vote; with a temperature
    T the weight exp(cosine / T), as DINO (Caron et al. 2021, after Wu et al. 2018, where T = 0.07
    and k = 20).
    """
    index = neighbours.index[:, :k]
    similarity = neighbours.similarity[:, :k].double()
    weight = torch.ones_like(similarity)
    if temperature is not None:
        # less than the nearest's: the same order of votes, and exp cannot overflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
    best = []
    for part, vote in zip(index.split(UNIT), weight.split(UNIT), strict=True):
        counts = torch.zeros(len(part), classes, dtype=torch.float64)
        counts.scatter_add_(1, labels[part], vote)
        best.append(counts.sort(dim=1, descending=True, stable=True).indices[:, :5])
    return torch.cat(best)


def knn_accuracy(
    neighbours: Neighbours,
    train_labels: Tensor,
    labels: Tensor,
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """In percent: `knn1`, the class of the nearest image, as COYO-ALIGN counts it; for larger k
    `knn<k>` with equal votes and `knn<k>_weighted` with DINO's, top-1, and `..._top5` of the
    latter.
    """
    result = {}
    for k in ks:
        k = min(k, neighbours.index.shape[1])
        best = votes(neighbours, train_labels, classes, k)
        hits = best == labels[:, None]
        result[f"knn{k}"] = percent(hits[:, 0])
        if k > 1:
            best = votes(neighbours, train_labels, classes, k, temperature)
            hits = best == labels[:, None]
            result[f"knn{k}_weighted"] = percent(hits[:, 0])
            result[f"knn{k}_weighted_top5"] = percent(hits.any(1))
    return result
