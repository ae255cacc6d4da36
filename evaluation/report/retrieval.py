"""Rankings on disk and in images: queries with their first hits, right ones framed green, wrong
ones red."""

from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup
from torch import Tensor

from base.errors import UserError
from base.torch_files import read_tensors
from base.writing import write_bytes
from evaluation.report import page
from evaluation.report.examples import spread
from evaluation.retrieval import Ranking, ranks

RANKINGS = tuple(
    f"by_{way}.{what}" for way in ("image", "text") for what in ("candidates", "scores")
)
KEPT = 10  # hits of a query that are stored
SHOWN = 5


def save_rankings(path: Path, by_image: Ranking, by_text: Ranking) -> None:
    """The first ten hits of every query as safetensors: `by_image.candidates`, `by_image.scores`,
    `by_text. ...`."""
    from safetensors.torch import save

    tensors = {}
    for name, ranking in (("by_image", by_image), ("by_text", by_text)):
        tensors[f"{name}.candidates"] = ranking.candidates[:, :KEPT].contiguous()
        tensors[f"{name}.scores"] = ranking.scores[:, :KEPT].contiguous()
    write_bytes(path, save(tensors))


def load_rankings(path: Path) -> tuple[Ranking, Ranking]:
    """What `save_rankings` wrote: (captions for images, images for captions). UserError."""
    found = read_tensors(path)
    if missing := [name for name in RANKINGS if name not in found]:
        raise UserError(f"{path}: no {missing[0]} in it, so no rankings; evaluate again")
    sizes = {"by_image": len(found["by_text.scores"]), "by_text": len(found["by_image.scores"])}
    return tuple(
        Ranking(found[f"{n}.candidates"], found[f"{n}.scores"], size) for n, size in sizes.items()
    )


def retrieval_gallery(
    files: Sequence[Path | Tensor],
    captions: Sequence[str],
    text_image: Tensor,
    by_image: Ranking,
    by_text: Ranking,
    count: int = 4,
    title: str = "Retrieved",
) -> Markup:
    """A card of both directions: `count` queries with the right hit at rank 1, `count` without.

    files: the images, or their pixels; captions with the image of each, int64 [T].
    """
    hit_texts = text_image[by_image.candidates] == torch.arange(len(files))[:, None]
    hit_images = by_text.candidates == text_image[:, None]
    last_caption = torch.full((len(files),), -1)
    last_caption.scatter_reduce_(0, text_image, torch.arange(len(captions)), "amax")
    kept = min(KEPT, by_image.candidates.shape[1], by_text.candidates.shape[1])
    of_images = []
    of_captions = []
    for query, rank in chosen_queries(ranks(by_image, hit_texts, last_caption), count):
        items = []
        for text, score, right in first_hits(by_image, hit_texts, query):
            items.append((captions[text], f"{score:.2f}", "right" if right else "", None))
        said = page.join(rank_badge(rank, kept), page.ranked(items))
        shown = page.thumbnail(files[query], 112, alt=f"image {query} of the split")
        of_images.append(page.case(shown, said))
    for query, rank in chosen_queries(ranks(by_text, hit_images, text_image), count):
        hits = []
        for image, score, right in first_hits(by_text, hit_images, query):
            belongs = "belongs to the caption" if right else "does not belong to it"
            thumb = page.thumbnail(files[image], 76, right, f"image {image} {belongs}")
            hits.append(page.figure(thumb, f"{score:.2f}"))
        said = (rank_badge(rank, kept), page.quote(captions[query]), page.group("hits", hits))
        of_captions.append(page.case(None, page.join(*said)))
    return page.card(
        title,
        page.heading("Captions for an image"),
        page.group("cases", of_images),
        page.heading("Images for a caption"),
        page.group("cases", of_captions),
        intro="The first five hits with their scores. Green: belongs to the query; red: does not.",
    )


def chosen_queries(positions: Tensor, count: int) -> list[tuple[int, int]]:
    """(query, rank of its right hit from 0): `count` with rank 0, then others, evenly spread."""
    right = spread((positions == 0).nonzero().flatten(), count)
    wrong = spread((positions > 0).nonzero().flatten(), count)
    return [(query, int(positions[query])) for query in right + wrong]


def first_hits(ranking: Ranking, hits: Tensor, query: int) -> list[tuple[int, float, bool]]:
    """(candidate, score, whether it belongs to the query) of the first hits shown."""
    rows = (ranking.candidates[query], ranking.scores[query], hits[query])
    return list(zip(*(row[:SHOWN].tolist() for row in rows), strict=True))


def rank_badge(rank: int, kept: int) -> Markup:
    """Whether the first hit is right, and else where the right one is."""
    if rank == 0:
        return page.badge("right", True)
    if rank < kept:
        return page.badge(f"right one at rank {rank + 1}", False)
    return page.badge(f"not among the first {kept}", False)
