"""Rankings on disk and in images: queries with their first hits, right ones framed green, wrong
ones red."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from base.files import write_bytes
from evaluation.report.page import card, escape, thumbnail
from evaluation.retrieval import Ranking, ranks

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
    """What `save_rankings` wrote: (captions for images, images for captions)."""
    from safetensors.torch import load_file

    found = load_file(path)
    sizes = {"by_image": len(found["by_text.scores"]), "by_text": len(found["by_image.scores"])}
    return tuple(
        Ranking(found[f"{n}.candidates"], found[f"{n}.scores"], size) for n, size in sizes.items()
    )


def retrieval_gallery(
    files: Sequence[Path],
    captions: Sequence[str],
    text_image: Tensor,
    by_image: Ranking,
    by_text: Ranking,
    cases: int = 4,
) -> str:
    """HTML of both directions, `cases` queries answered rightly at rank 1 and as many wrongly,
    spread over the split.

    files: the images; captions with the image of each, int64 [T].
    """
    hit_texts = text_image[by_image.candidates] == torch.arange(len(files))[:, None]
    hit_images = by_text.candidates == text_image[:, None]
    last = torch.full((len(files),), -1).scatter_reduce(
        0, text_image, torch.arange(len(captions)), "amax"
    )
    kept = min(KEPT, by_image.candidates.shape[1], by_text.candidates.shape[1])
    blocks = ["<h3>Captions for an image</h3><div class='cases'>"]
    for query, place in _choose(ranks(by_image, hit_texts, last), cases):
        items = zip(
            by_image.candidates[query], by_image.scores[query], hit_texts[query], strict=True
        )
        lines = "".join(
            _caption_hit(captions[text], score, right) for text, score, right in list(items)[:SHOWN]
        )
        blocks.append(
            f"<div class='case'>{thumbnail(files[query], 112)}<div>{_badge(place, kept)}<ol>{lines}</ol></div></div>"
        )
    blocks.append("</div><h3>Images for a caption</h3><div class='cases'>")
    for query, place in _choose(ranks(by_text, hit_images, text_image), cases):
        items = zip(
            by_text.candidates[query], by_text.scores[query], hit_images[query], strict=True
        )
        hits = "".join(
            _image_hit(files[image], score, right) for image, score, right in list(items)[:SHOWN]
        )
        quote = f"<p class='quote'>“{escape(captions[query])}”</p>"
        blocks.append(
            f"<div class='case'><div>{_badge(place, kept)}{quote}<div class='hits'>{hits}</div></div></div>"
        )
    intro = "The first five hits with their scores. Green: belongs to the query; red: does not."
    return card("Retrieved", *blocks, "</div>", intro=intro)


def _choose(places: Tensor, cases: int) -> list[tuple[int, int]]:
    """(query, its place) of queries that were answered rightly at once, then of others, both spread
    evenly."""
    chosen = []
    for group in ((places == 0).nonzero().flatten(), (places > 0).nonzero().flatten()):
        some = (
            group[torch.linspace(0, len(group) - 1, min(cases, len(group))).long()]
            if len(group)
            else group
        )
        chosen += [(int(query), int(places[query])) for query in some]
    return chosen


def _badge(place: int, kept: int) -> str:
    found = f"right one at rank {place + 1}" if place < kept else f"not among the first {kept}"
    text = "right" if place == 0 else found
    return f"<span class='badge{' right' if place == 0 else ''}'>{text}</span>"


def _caption_hit(caption: str, score: Tensor, right: Tensor) -> str:
    number = f"<span class='score'>{float(score):.2f}</span>"
    return f"<li{' class=right' if right else ''}>{number}{escape(caption)}</li>"


def _image_hit(file: Path, score: Tensor, right: Tensor) -> str:
    return f"<figure>{thumbnail(file, 76, bool(right))}<figcaption>{float(score):.2f}</figcaption></figure>"
