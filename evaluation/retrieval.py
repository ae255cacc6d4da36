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
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from base.distributed import World, gather_parts, gather_rows
from base.errors import UserError
from base.heartbeat import beat
from evaluation.predict import percent

FILL = -100.0  # score of a pair that was no candidate
TEXT_UNIT = 256  # captions per encoder pass
SIMILARITY_UNIT = 256  # queries per block of similarities
COLUMN = 64  # texts that share one computation of an image's keys and values
AT = (1, 5, 10)  # k of the recalls at k
NOT_FINITE = (
    "not finite: the checkpoint holds NaN, or fp16 overflows (try --precision bf16 or fp32)"
)


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
    progress: bool = True,
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
    bar = _Progress(progress and world.is_main)
    tokens, image_features = _encode_images(model, load_images, images, image_batch, world, bar)
    states, text_features = _encode_texts(model, captions, keep_text_states and rerank, world, bar)
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise UserError(
            "the network's features are not finite: the weights hold NaN, or --precision fp16 overflows"
        )
    if k > min(images, len(captions)) and world.is_main:
        warnings.warn(
            f"k {k}: there are {images} images and {len(captions)} captions, all re-ranked",
            stacklevel=3,
        )
    by_image = nearest(image_features, text_features, min(k, len(captions)), world)
    by_text = nearest(text_features, image_features, min(k, images), world)
    if not rerank:
        return by_image, by_text
    matched = _rerank(
        model, by_image, by_text, captions, states, tokens, image_batch, pairs, world, bar
    )
    return (
        in_order(with_similarity(matched[0], by_image, similarity_weight)),
        in_order(with_similarity(matched[1], by_text, similarity_weight)),
    )


def with_similarity(matched: Ranking, similar: Ranking, weight: float) -> Ranking:
    """ITM scores plus `weight` times the ITC similarity of the same candidates."""
    return Ranking(matched.candidates, matched.scores + weight * similar.scores, matched.size)


def nearest(queries: Tensor, keys: Tensor, k: int, world: World) -> Ranking:
    """The k keys [N,E] most similar to each query [Q,E] by inner product."""
    n = len(keys)
    own = units(len(queries), SIMILARITY_UNIT, world)
    candidates = [queries.new_zeros(0, k, dtype=torch.int64)]  # a process may have no unit
    scores = [queries.new_zeros(0, k)]
    for rows in own:
        similarity = queries[rows] @ keys.T
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


def _encode_images(
    model, load_images, images, image_batch, world, bar
) -> tuple[list[Tensor], Tensor]:
    """Image tokens of this process's units, and the features [I,E] of all images."""
    own = units(images, image_batch, world)
    tokens: list[Tensor] = []
    features = []
    to_host = False
    for image in bar(load_images(_flat(own).tolist()), "images", len(own)):
        states, feature = model.encode_image(image.to(world.device, non_blocking=True))
        if not tokens and world.device.type == "cuda":
            needed = states.numel() * _store_type(world.device).itemsize * len(own)
            to_host = needed > torch.cuda.mem_get_info(world.device)[0] / 2
        states = states.to(_store_type(world.device))
        tokens.append(states.cpu() if to_host else states)
        features.append(feature)
    return tokens, gather_parts(features, _flat(own), images, world.device)


def _encode_texts(model, captions, keep_states, world, bar) -> tuple[Tensor | None, Tensor]:
    """Text states [T,L,D] for fusion (None unless kept), and features [T,E] of all captions."""
    longest = int(captions.lengths.max())
    order = captions.lengths.argsort(stable=True)
    own = [order[rows] for rows in units(len(captions), TEXT_UNIT, world)]
    states = []
    features = []
    for rows in bar(own, "captions", len(own)):
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


def _rerank(model, by_image, by_text, captions, states, tokens, image_batch, pairs, world, bar):
    """Candidates of both rankings with their ITM scores, unordered; a pair is computed once, by one
    process."""
    texts = len(captions)
    images = len(by_image.candidates)
    every_image = torch.arange(images)[:, None]
    every_text = torch.arange(texts)[:, None]
    keys_i2t = every_image * texts + by_image.candidates
    keys_t2i = by_text.candidates * texts + every_text
    # image * texts + caption, ascending
    wanted = torch.cat([keys_i2t.flatten(), keys_t2i.flatten()]).unique()
    table = _match(model, wanted, images, captions, states, tokens, image_batch, pairs, world, bar)
    scores_i2t = table[torch.searchsorted(wanted, keys_i2t)]
    scores_t2i = table[torch.searchsorted(wanted, keys_t2i)]
    return (
        Ranking(by_image.candidates, scores_i2t, by_image.size),
        Ranking(by_text.candidates, scores_t2i, by_text.size),
    )


def _match(
    model, wanted, images, captions, states, tokens, image_batch, pairs, world, bar
) -> Tensor:
    """ITM scores float32 of the pairs `wanted`: image * captions + caption, ascending."""
    texts = len(captions)
    own = units(images, image_batch, world)
    edges = [(unit[0] * texts, (unit[-1] + 1) * texts) for unit in own]
    edges = torch.tensor(edges).reshape(-1, 2)
    spans = torch.searchsorted(wanted, edges)  # of each unit's pairs
    bar.start("matching", int(spans.diff(dim=1).sum()), "pair")
    matcher = _Matcher(model, captions, states, pairs, world.device)
    scores = [torch.zeros(0, device=world.device)]
    rows = [torch.zeros(0, dtype=torch.int64)]
    for unit, unit_tokens, (start, end) in zip(own, tokens, spans.tolist(), strict=True):
        image = wanted[start:end] // texts - unit[0]
        text = wanted[start:end] % texts
        scores.append(matcher.scores(image, text, unit_tokens.to(world.device), bar))
        rows.append(torch.arange(start, end))
    table = gather_rows(torch.cat(scores), torch.cat(rows), len(wanted)).cpu()
    bar.stop()
    if not table.isfinite().all():
        raise UserError(f"matching scores are {NOT_FINITE}")
    return table


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
    bar = _Progress(world.is_main)
    tokens, image_features = _encode_images(model, load_images, images, image_batch, world, bar)
    states, text_features = _encode_texts(model, captions, keep_text_states, world, bar)
    similarity = (image_features[image] * text_features[text]).sum(-1).float().cpu()
    if not similarity.isfinite().all():
        raise UserError(f"similarities are {NOT_FINITE}")
    keys = image * len(captions) + text
    wanted = keys.flatten().unique()
    table = _match(model, wanted, images, captions, states, tokens, image_batch, pairs, world, bar)
    return similarity, table[torch.searchsorted(wanted, keys)]


class _Matcher:
    """Scores pairs of one unit of images in tiles."""

    def __init__(
        self, model: RetrievalModel, captions: Captions, states: Tensor | None, pairs: int, device
    ):
        self.model = model
        self.pairs = pairs
        self.device = device
        self.lengths = captions.lengths
        self.text = captions.ids.to(device) if states is None else states
        self.mask = captions.mask.to(device)

    def scores(self, image: Tensor, text: Tensor, tokens: Tensor, bar: "_Progress") -> Tensor:
        """float32 [P] of P pairs (index of the image in the unit's tokens [b,N+1,D], caption)."""
        result = torch.empty(len(image), device=self.device)
        for tile in tiles(image, self.lengths[text], self.pairs):
            real = tile >= 0
            padded = torch.where(real, tile, tile[:1])  # columns by their first text
            captions = text[padded.flatten()]
            width = int(self.lengths[captions].max())
            rows = captions.to(self.device)
            images = image[tile[0]].to(self.device)
            found = self.model.match_scores(
                self.text[rows, :width],
                self.mask[rows, :width],
                tokens.index_select(0, images),
                None,
            )
            kept = found.float()[real.flatten().to(self.device)]
            result[tile[real].to(self.device)] = kept
            bar.advance(int(real.sum()))
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


class _Progress:
    """A progress bar on one process, nothing on the others."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.bar = None

    def __call__(self, items: Iterable, name: str, total: int) -> Iterable:
        if self.shown:
            from tqdm import tqdm

            items = tqdm(items, name, total, leave=False, dynamic_ncols=True, unit="batch")
        for item in items:
            beat(f"in validation ({name})")
            yield item

    def start(self, name: str, total: int, unit: str) -> None:
        if self.shown:
            from tqdm import tqdm

            self.bar = tqdm(
                desc=name, total=total, unit=unit, leave=False, dynamic_ncols=True, unit_scale=True
            )

    def advance(self, count: int) -> None:
        beat("in validation (matching)")
        if self.bar is not None:
            self.bar.update(count)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
