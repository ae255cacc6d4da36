"""Image-text retrieval: every image against every caption by contrast (ITC), the best k re-ranked
by matching (ITM).

Work is cut into units that do not depend on the number of processes P (a batch of images, of
captions, of rows of the similarity), and unit u belongs to process u mod P. Nothing is computed
twice, and any P gives the same bits.

The pairs to match are those of both directions, each once, and each goes to the process that has
encoded its image, so image tokens never travel. A forward pass takes a tile of pairs: columns of
texts that share an image, whose keys and values are computed once a column, texts of similar length
side by side, trimmed to the longest.

Of equal scores the later index comes first, in candidates and in ranks, as in the originals'
reversed argsort.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from base.distributed import World, gather_parts, gather_rows, say
from base.heartbeat import beat
from evaluation.predict import check_finite, cosines, percent, progress

FILL = -100.0  # score of a pair that was no candidate
TEXT_UNIT = 256  # captions per encoder pass
SIMILARITY_UNIT = 256  # queries per block of similarities
COLUMN = 64  # texts that share one computation of an image's keys and values
AT = (1, 5, 10)  # k of the recalls at k


class RetrievalModel(Protocol):
    """What is asked of a network; shapes as in `models.fusion.retrieval.Retrieval`."""

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]: ...

    def match_scores(
        self, text: Tensor, text_mask: Tensor, image_tokens: Tensor, rows: Tensor | None
    ) -> Tensor: ...


@dataclass
class Captions:
    """All captions: ids int64 [T,L], mask bool [T,L] (True = token), and the index of each one's
    image, int64 [T]."""

    ids: Tensor
    mask: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each caption, int64 [T]."""
        return self.mask.sum(1)


@dataclass
class Ranking:
    """One direction: the K candidates of each of Q queries, best first, out of `size` things."""

    candidates: Tensor  # int64 [Q,K]
    scores: Tensor  # float32 [Q,K]
    size: int

    def dense(self) -> Tensor:
        """Scores as a matrix [Q,size], -100 where a pair was no candidate."""
        matrix = torch.full((len(self.scores), self.size), FILL)
        return matrix.scatter_(1, self.candidates, self.scores)


@torch.inference_mode()
def rank(
    model: RetrievalModel,
    load_images: Callable[[list[int]], Iterable[Tensor]],
    images: int,
    captions: Captions,
    world: World,
    *,
    k: int,
    rerank: bool = True,
    similarity_weight: float = 0.0,
    keep_text_states: bool = False,
    image_batch: int = 32,
    pairs: int = 512,
) -> tuple[Ranking, Ranking]:
    """`(captions ranked for each image, images ranked for each caption)`, on the CPU of every
    process.

    model: in eval mode, on `world.device`. load_images: yields the images whose indices it is
    given, in order, as float tensors [image_batch,3,S,S], the last one maybe smaller. k: candidates
    a query, at most all there are.
    rerank: False = order by ITC similarity alone. similarity_weight: weight of the ITC similarity
    added to the ITM score, as in BLIP. keep_text_states: keep the text encoder's states of all
    captions (ALBEF) instead of only their ids. image_batch: images a unit; the result may depend on
    it in the last bits. pairs: about how many pairs a forward pass takes.

    Under autocast image tokens are kept in its type, on the host if half of the free device memory
    would not hold them.
    Raises UserError if a score is not a number.
    """
    tokens, image_features = _encode_images(model, load_images, images, image_batch, world)
    states, text_features = _encode_texts(model, captions, keep_text_states and rerank, world)
    check_finite(image_features, "the images' features")
    check_finite(text_features, "the captions' features")
    if rerank and k > min(images, len(captions)) and world.is_main:
        warnings.warn(
            f"k {k}: there are {images} images and {len(captions)} captions, all re-ranked",
            stacklevel=3,
        )
    if k < min(max(AT), max(images, len(captions))):
        note_recalls_beyond(k)
    by_image = nearest(image_features, text_features, min(k, len(captions)), world)
    by_text = nearest(text_features, image_features, min(k, images), world)
    if not rerank:
        return by_image, by_text
    every_image = torch.arange(images)[:, None].expand_as(by_image.candidates)
    every_text = torch.arange(len(captions))[:, None].expand_as(by_text.candidates)
    matcher = Matcher(model, captions, states, images, tokens, image_batch, pairs, world)
    for_images, for_texts = matcher.scores(
        image=torch.cat([every_image.flatten(), by_text.candidates.flatten()]),
        text=torch.cat([by_image.candidates.flatten(), every_text.flatten()]),
    ).split([every_image.numel(), every_text.numel()])
    return (
        in_order(with_matching(by_image, for_images, similarity_weight)),
        in_order(with_matching(by_text, for_texts, similarity_weight)),
    )


def with_matching(similar: Ranking, matching: Tensor, weight: float) -> Ranking:
    """The candidates of a ranking by ITC with their ITM scores [Q*K] plus `weight` times the
    similarity."""
    scores = matching.view_as(similar.scores) + weight * similar.scores
    return Ranking(similar.candidates, scores, similar.size)


@cache
def note_recalls_beyond(k: int) -> None:
    """Say once a process which recalls count more than the k candidates."""
    deeper = " and ".join(f"R@{at}" for at in AT if at > k)
    say(
        f"note: k {k}: {deeper} count what follows the {k} candidates in the order of the list; "
        f"re-rank {max(AT)} or more"
    )


def nearest(queries: Tensor, keys: Tensor, k: int, world: World) -> Ranking:
    """The k keys [N,E] most similar to each query [Q,E] by inner product."""
    n = len(keys)
    own = units(len(queries), SIMILARITY_UNIT, world)
    candidates = [queries.new_zeros(0, k, dtype=torch.int64)]  # a process may have no unit
    scores = [queries.new_zeros(0, k)]
    for rows in own:
        similarity = cosines(queries[rows], keys)
        # flipped, because a stable sort keeps the earlier of equals first
        values, order = similarity.flip(1).sort(dim=1, descending=True, stable=True)
        scores.append(values[:, :k])
        candidates.append(n - 1 - order[:, :k])
    rows = _flat(own)
    return Ranking(
        candidates=gather_rows(torch.cat(candidates), rows, len(queries)).cpu(),
        scores=gather_rows(torch.cat(scores), rows, len(queries)).cpu(),
        size=n,
    )


def units(count: int, size: int, world: World) -> list[list[int]]:
    """This process's units of range(count), which is cut into units of `size`."""
    own = []
    for start in range(0, count, size)[world.rank :: world.size]:
        stop = min(start + size, count)
        own.append(list(range(start, stop)))
    return own


def _flat(own: list[list[int]]) -> Tensor:
    return torch.tensor([i for unit in own for i in unit], dtype=torch.int64)


def _encode_images(model, load_images, images, image_batch, world) -> tuple[list[Tensor], Tensor]:
    """Image tokens of this process's units, and the features [I,E] of all images."""
    own = units(images, image_batch, world)
    tokens: list[Tensor] = []
    features = []
    to_host = False
    for image in progress(load_images(_flat(own).tolist()), "images", world, len(own)):
        states, feature = model.encode_image(image.to(world.device, non_blocking=True))
        if not tokens and world.device.type == "cuda":
            needed = states.numel() * _store_type(world.device).itemsize * len(own)
            to_host = needed > torch.cuda.mem_get_info(world.device)[0] / 2
        states = states.to(_store_type(world.device))
        tokens.append(states.cpu() if to_host else states)
        features.append(feature)
    return tokens, gather_parts(features, _flat(own), images, world.device)


def _encode_texts(model, captions, keep_states, world) -> tuple[Tensor | None, Tensor]:
    """Text states [T,L,D] for fusion (None unless kept), and features [T,E] of all captions."""
    longest = int(captions.lengths.max())
    order = captions.lengths.argsort(stable=True)
    own = [order[rows] for rows in units(len(captions), TEXT_UNIT, world)]
    states = []
    features = []
    for rows in progress(own, "captions", world):
        width = int(captions.lengths[rows].max())
        ids = captions.ids[rows, :width].to(world.device)
        mask = captions.mask[rows, :width].to(world.device)
        state, feature = model.encode_text(ids, mask)
        features.append(feature)
        if keep_states:
            state = torch.nn.functional.pad(state, (0, 0, 0, longest - width))
            states.append(state.to(_store_type(world.device)))
    rows = torch.cat([order.new_zeros(0), *own])
    features = gather_parts(features, rows, len(captions), world.device)
    if not keep_states:
        return None, features
    return gather_parts(states, rows, len(captions), world.device), features


def _store_type(device: torch.device) -> torch.dtype:
    """Type in which states are kept: that of the forward pass, which would cast them anyway."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


@torch.inference_mode()
def score_pairs(
    model: RetrievalModel,
    load_images: Callable[[list[int]], Iterable[Tensor]],
    images: int,
    captions: Captions,
    image: Tensor,
    text: Tensor,
    world: World,
    *,
    keep_text_states: bool = False,
    image_batch: int = 32,
    pairs: int = 512,
) -> tuple[Tensor, Tensor]:
    """`(ITC similarities, ITM scores)` float32 of the pairs of image `image` and caption `text`,
    int64 of one shape, on the CPU of every process. Other arguments as of `rank`."""
    tokens, image_features = _encode_images(model, load_images, images, image_batch, world)
    states, text_features = _encode_texts(model, captions, keep_text_states, world)
    similarity = (image_features[image] * text_features[text]).sum(-1).float().cpu()
    check_finite(similarity, "similarities")
    matcher = Matcher(model, captions, states, images, tokens, image_batch, pairs, world)
    return similarity, matcher.scores(image, text)


@dataclass
class Matcher:
    """Scores pairs of an image and a caption by ITM, each once, on the process that has encoded its
    image."""

    model: RetrievalModel
    captions: Captions
    states: Tensor | None  # [T,L,D] of all captions; None: the network starts from their ids
    images: int
    tokens: list[Tensor]  # [b,N+1,D] of each of this process's units of images
    image_batch: int
    pairs: int  # about how many a forward pass takes
    world: World

    def __post_init__(self):
        device = self.world.device
        self.texts = (self.captions.ids if self.states is None else self.states).to(device)
        self.mask = self.captions.mask.to(device)
        self.lengths = self.captions.lengths

    def scores(self, image: Tensor, text: Tensor) -> Tensor:
        """float32 on the CPU of every process, of the shape of image and text, int64."""
        keys = image * len(self.captions) + text
        wanted = keys.flatten().unique()  # ascending
        own = units(self.images, self.image_batch, self.world)
        edges = [(unit[0], unit[-1] + 1) for unit in own]
        edges = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2) * len(self.captions)
        spans = torch.searchsorted(wanted, edges).tolist()  # of each unit's pairs
        scores = [torch.zeros(0, device=self.world.device)]
        rows = [torch.zeros(0, dtype=torch.int64)]
        parts = list(zip(own, self.tokens, spans, strict=True))
        for unit, tokens, (start, end) in progress(parts, "matching", self.world):
            found = wanted[start:end]
            of_unit = found // len(self.captions) - unit[0]
            scores.append(self.of_unit(tokens, of_unit, found % len(self.captions)))
            rows.append(torch.arange(start, end))
        table = gather_rows(torch.cat(scores), torch.cat(rows), len(wanted)).cpu()
        check_finite(table, "matching scores")
        return table[torch.searchsorted(wanted, keys)]

    def of_unit(self, tokens: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """float32 [P] of P pairs: index of the image in `tokens` [b,N+1,D], caption."""
        device = self.world.device
        tokens = tokens.to(device)
        result = torch.empty(len(image), device=device)
        for tile in tiles(image, self.lengths[text], self.pairs):
            beat("in validation (matching)")
            real = tile >= 0
            padded = torch.where(real, tile, tile[:1])  # columns by their first text
            captions = text[padded.flatten()]
            width = int(self.lengths[captions].max())
            rows = captions.to(device)
            found = self.model.match_scores(
                self.texts[rows, :width],
                self.mask[rows, :width],
                tokens.index_select(0, image[tile[0]].to(device)),
                None,
            )
            result[tile[real].to(device)] = found.float()[real.flatten().to(device)]
        return result


def tiles(image: Tensor, length: Tensor, pairs: int) -> Iterator[Tensor]:
    """Arrange P pairs in tiles int64 [G,W]: each column is the pairs of one image, -1 where it is
    shorter than G.

    image, length int64 [P]: the image of a pair, the tokens of its text. G is at most 64, G * W
    about `pairs`. Row r * W + w of a flattened tile belongs to the image of column w, which is the
    order `attend_shared` wants.
    """
    order = length.argsort(stable=True)
    order = order[image[order].argsort(stable=True)]
    columns: list[Tensor] = []
    for of_image in order.split(image.bincount().tolist()):
        if len(of_image):
            columns += of_image.split(COLUMN)
    columns.sort(key=lambda column: (len(column), int(length[column[-1]])), reverse=True)
    while columns:
        width = max(1, pairs // len(columns[0]))
        yield pad_sequence(columns[:width], padding_value=-1)
        columns = columns[width:]


def in_order(ranking: Ranking) -> Ranking:
    """The same candidates, sorted by score."""
    later_first = ranking.candidates.argsort(dim=1, descending=True)
    order = ranking.scores.gather(1, later_first).argsort(dim=1, descending=True, stable=True)
    order = later_first.gather(1, order)
    return Ranking(
        ranking.candidates.gather(1, order), ranking.scores.gather(1, order), ranking.size
    )


def best_of_both(image: Tensor, text: Tensor, world: World) -> tuple[Ranking, Ranking]:
    """The captions nearest to every image, and the images nearest to every caption, as many as
    recalls need: unit embeddings [I,E], [T,E]."""
    image, text = image.to(world.device), text.to(world.device)
    by_image = nearest(image, text, min(max(AT), len(text)), world)
    by_text = nearest(text, image, min(max(AT), len(image)), world)
    return by_image, by_text


def ranks(ranking: Ranking, hits: Tensor, last: Tensor) -> Tensor:
    """Rank, from 0, of the best right answer of each query, int64 [Q].

    hits bool [Q,K]: which candidates are right; last int64 [Q]: largest index among all right
    answers. What was no candidate comes after all candidates, the later index first.
    """
    later_candidates = (ranking.candidates > last[:, None]).sum(1)
    later = ranking.size - 1 - last - later_candidates
    among_candidates = hits.int().argmax(1)
    return torch.where(hits.any(1), among_candidates, ranking.candidates.shape[1] + later)


def recalls(by_image: Ranking, by_text: Ranking, text_image: Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 in percent, of captions for images (`txt_r1`), of images for captions
    (`img_r1`); means.

    text_image int64 [T]: the image of each caption. An image without captions is not asked for.
    """
    every = torch.arange(len(by_image.candidates))
    last = torch.full_like(every, -1).scatter_reduce(
        0, text_image, torch.arange(len(text_image)), "amax"
    )
    text_hits = text_image[by_image.candidates] == every[:, None]
    text_ranks = ranks(by_image, text_hits, last)[last >= 0]
    image_hits = by_text.candidates == text_image[:, None]
    image_ranks = ranks(by_text, image_hits, text_image)
    found = {}
    for at in AT:
        found[f"txt_r{at}"] = percent(text_ranks < at)
        found[f"img_r{at}"] = percent(image_ranks < at)
    return with_means(found)


def with_means(found: dict[str, float]) -> dict[str, float]:
    """Recalls `txt_r<k>` and `img_r<k>` with their means, and the mean of these."""
    metrics = {}
    for name in ("txt", "img"):
        for at in AT:
            metrics[f"{name}_r{at}"] = found[f"{name}_r{at}"]
        metrics[f"{name}_r_mean"] = sum(found[f"{name}_r{at}"] for at in AT) / len(AT)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


def chance(text_image: Tensor, images: int) -> dict[str, float]:
    """`recalls` of a random order, in percent: text_image int64 [T], the image of each caption."""
    texts = len(text_image)
    counts = text_image.bincount(minlength=images)
    counts = counts[counts > 0].double()  # captions of each image that has any
    found = {}
    for at in AT:
        # none of an image's captions among the first: sampled without replacement
        missed = torch.ones_like(counts)
        for i in range(min(at, texts)):
            missed = missed * ((texts - i - counts).clamp(min=0) / (texts - i))
        found[f"txt_r{at}"] = 100 * (1 - missed.mean().item())
        found[f"img_r{at}"] = 100 * min(1, at / images)
    return with_means(found)
