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

FILL = -100.0  # score of a pair that was no candidate
TEXT_UNIT, SIMILARITY_UNIT = (
    256,
    256,
)  # captions per encoder pass; queries per block of similarities
COLUMN = 64  # texts that share one computation of an image's keys and values
AT = (1, 5, 10)
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
    rerank: False = order by similarity alone. similarity_weight: that often the similarity is added
    to the score of matching, as BLIP adds them. keep_text_states: hold what fusion starts from for
    all captions (ALBEF's text half) instead of only their ids. image_batch: images a unit; the
    result may depend on it in the last bits.
    pairs: about that many a forward pass.

    Under autocast image tokens wait in its type, on the host where half of the free device memory
    would not hold them.
    Raises UserError where a score is not a number.
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
    if rerank:
        similar = by_image.scores, by_text.scores
        matched = _rerank(
            model, by_image, by_text, captions, states, tokens, image_batch, pairs, world, bar
        )
        by_image, by_text = (
            in_order(
                Ranking(found.candidates, found.scores + similarity_weight * scores, found.size)
            )
            for found, scores in zip(matched, similar, strict=True)
        )
    return by_image, by_text


def nearest(queries: Tensor, keys: Tensor, k: int, world: World) -> Ranking:
    """The k keys [N,E] most similar to each query [Q,E] by inner product."""
    n, own = len(keys), units(len(queries), SIMILARITY_UNIT, world)
    candidates, scores = [queries.new_zeros(0, k, dtype=torch.int64)], [queries.new_zeros(0, k)]
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
    """This process's share of range(count) cut into units of `size`."""
    starts = range(0, count, size)[world.rank :: world.size]
    return [list(range(start, min(start + size, count))) for start in starts]


def _flat(own: list[list[int]]) -> Tensor:
    return torch.tensor([i for unit in own for i in unit], dtype=torch.int64)


def _encode_images(
    model, load_images, images, image_batch, world, bar
) -> tuple[list[Tensor], Tensor]:
    """Image tokens of this process's units, and the features [I,E] of all images."""
    own = units(images, image_batch, world)
    tokens, features, to_host = [], [], False
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
    """What fusion starts from [T,L,D], where it is kept, and the features [T,E] of all captions."""
    longest = int(captions.lengths.max())
    order = captions.lengths.argsort(stable=True)
    own = [order[rows] for rows in units(len(captions), TEXT_UNIT, world)]
    states, features = [], []
    for rows in bar(own, "captions", len(own)):
        width = int(captions.lengths[rows].max())
        ids, mask = (x[rows, :width].to(world.device) for x in (captions.ids, captions.mask))
        state, feature = model.encode_text(ids, mask)
        features.append(feature)
        if keep_states:
            state = torch.nn.functional.pad(state, (0, 0, 0, longest - width))
            states.append(state.to(_store_type(world.device)))
    rows = torch.cat([order.new_zeros(0), *own])
    kept = gather_parts(states, rows, len(captions), world.device) if keep_states else None
    return kept, gather_parts(features, rows, len(captions), world.device)


def _store_type(device: torch.device) -> torch.dtype:
    """Type in which states wait to be used: that of the forward pass, which would cast them
    anyway."""
    return (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else torch.float32
    )


def _rerank(model, by_image, by_text, captions, states, tokens, image_batch, pairs, world, bar):
    """Candidates of both rankings with their scores of matching, unordered; a pair is computed
    once, by one process."""
    texts = len(captions)
    images = len(by_image.candidates)
    keys_i2t = torch.arange(images)[:, None] * texts + by_image.candidates
    keys_t2i = by_text.candidates * texts + torch.arange(texts)[:, None]
    wanted = torch.cat(
        [keys_i2t.flatten(), keys_t2i.flatten()]
    ).unique()  # image * texts + caption, ascending
    own = units(images, image_batch, world)
    edges = torch.tensor([(unit[0] * texts, (unit[-1] + 1) * texts) for unit in own]).reshape(-1, 2)
    spans = torch.searchsorted(wanted, edges).tolist()
    bar.start("matching", sum(end - start for start, end in spans), "pair")
    matcher = _Matcher(model, captions, states, pairs, world.device)
    scores, rows = [torch.zeros(0, device=world.device)], [torch.zeros(0, dtype=torch.int64)]
    for unit, unit_tokens, (start, end) in zip(own, tokens, spans, strict=True):
        image, text = wanted[start:end] // texts - unit[0], wanted[start:end] % texts
        scores.append(matcher.scores(image, text, unit_tokens.to(world.device), bar))
        rows.append(torch.arange(start, end))
    table = gather_rows(torch.cat(scores), torch.cat(rows), len(wanted)).cpu()
    bar.stop()
    if not table.isfinite().all():
        raise UserError(f"matching scores are {NOT_FINITE}")
    return tuple(
        Ranking(old.candidates, table[torch.searchsorted(wanted, keys)], old.size)
        for old, keys in ((by_image, keys_i2t), (by_text, keys_t2i))
    )


class _Matcher:
    """Scores pairs of one unit of images in tiles."""

    def __init__(
        self, model: RetrievalModel, captions: Captions, states: Tensor | None, pairs: int, device
    ):
        self.model, self.lengths, self.pairs, self.device = model, captions.lengths, pairs, device
        self.text = captions.ids.to(device) if states is None else states
        self.mask = captions.mask.to(device)

    def scores(self, image: Tensor, text: Tensor, tokens: Tensor, bar: "_Progress") -> Tensor:
        """float32 [P] of P pairs (place of the image in the unit's tokens [b,N+1,D], caption)."""
        result = torch.empty(len(image), device=self.device)
        for tile in tiles(image, self.lengths[text], self.pairs):
            real = tile >= 0
            pair = torch.where(
                real, tile, tile[:1]
            ).flatten()  # a column is filled up with its first text
            rows, width = text[pair].to(self.device), int(self.lengths[text[pair]].max())
            columns = tokens.index_select(0, image[tile[0]].to(self.device))
            found = self.model.match_scores(
                self.text[rows, :width], self.mask[rows, :width], columns, None
            )
            result[tile[real].to(self.device)] = found.float()[real.flatten().to(self.device)]
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
    columns = [
        c
        for of_image in order.split(image.bincount().tolist())
        for c in of_image.split(COLUMN)
        if len(c)
    ]
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


def ranks(ranking: Ranking, hits: Tensor, last: Tensor) -> Tensor:
    """Place, from 0, of the best right answer of each query, int64 [Q].

    hits bool [Q,K]: which candidates are right; last int64 [Q]: largest index among all right
    answers. What was no candidate comes after all candidates, the later index first.
    """
    later = ranking.size - 1 - last - (ranking.candidates > last[:, None]).sum(1)
    return torch.where(hits.any(1), hits.int().argmax(1), ranking.candidates.shape[1] + later)


def recalls(by_image: Ranking, by_text: Ranking, text_image: Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 in percent, of captions for images (`txt_r1`), of images for captions
    (`img_r1`); means.

    text_image int64 [T]: the image of each caption. An image without captions is not asked for.
    """
    every = torch.arange(len(by_image.candidates))
    last = torch.full_like(every, -1).scatter_reduce(
        0, text_image, torch.arange(len(text_image)), "amax"
    )
    places = {
        "txt": ranks(by_image, text_image[by_image.candidates] == every[:, None], last)[last >= 0],
        "img": ranks(by_text, by_text.candidates == text_image[:, None], text_image),
    }
    metrics = {}
    for name, place in places.items():
        found = {f"{name}_r{at}": 100 * (place < at).double().mean().item() for at in AT}
        metrics |= found | {f"{name}_r_mean": sum(found.values()) / len(AT)}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


def chance(text_image: Tensor, images: int) -> dict[str, float]:
    """What ordering at random scores in `recalls`, in percent: text_image int64 [T], the image of
    each caption."""
    texts, metrics = len(text_image), {}
    counts = text_image.bincount(minlength=images)
    counts = counts[counts > 0].double()
    for name in ("txt", "img"):
        found = {}
        for at in AT:
            # none of an image's captions among the first: drawn without replacement
            misses = [
                ((texts - i - counts).clamp(min=0) / (texts - i)) for i in range(min(at, texts))
            ]
            missed = (
                torch.stack(misses).prod(0).mean().item()
                if name == "txt"
                else 1 - min(1, at / images)
            )
            found[f"{name}_r{at}"] = 100 * (1 - missed)
        metrics |= found | {f"{name}_r_mean": sum(found.values()) / len(AT)}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


class _Progress:
    """A progress bar on one process, nothing on the others."""

    def __init__(self, shown: bool):
        self.shown, self.bar = shown, None

    def __call__(self, items: Iterable, name: str, total: int) -> Iterable:
        if not self.shown:
            return items
        from tqdm import tqdm

        return tqdm(items, name, total, leave=False, dynamic_ncols=True, unit="batch")

    def start(self, name: str, total: int, unit: str) -> None:
        if self.shown:
            from tqdm import tqdm

            self.bar = tqdm(
                desc=name, total=total, unit=unit, leave=False, dynamic_ncols=True, unit_scale=True
            )

    def advance(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
