"""Where a network looks for a word: cross-attention of the fusion layers, weighted by its gradient
(Grad-CAM)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def word_maps(model, image: Tensor, text_ids: Tensor, text_mask: Tensor, layer: int) -> Tensor:
    """Maps [L,g,g] float32 >= 0 of the tokens of one caption over an image of g x g patches.

    model: `models.fusion.retrieval.Retrieval` on any device; image [1,3,S,S], text_ids and
    text_mask [1,L]. As in ALBEF (Li et al. 2021, section 6.3): the cross-attention probabilities of
    `layer`, times the positive part of their gradient with respect to the matching score, averaged
    over the heads.
    """
    with torch.enable_grad():
        tokens, _ = model.encode_image(image)
        stage, _ = model.encode_text(text_ids, text_mask)
        fused, probabilities = model.bert.fuse(stage, text_mask, tokens, map_of=("cross", layer))
        score = model.itm_head(fused[:, 0])[:, 1].sum()
        (gradient,) = torch.autograd.grad(score, probabilities)
    weighted = probabilities.detach() * gradient.clamp(min=0)  # [1,H,L,1+g*g]
    heads_mean = weighted.mean(1)[0]
    patches = heads_mean[:, 1:]  # without [CLS]
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side)).float().cpu()


def word_layer(first: int, depth: int) -> int:
    """The layer whose maps tell words apart best: at two thirds of a text transformer with `depth`
    layers, of which those from `first` on see the image. After the last but one only [CLS] is
    read."""
    return max(first, min(depth - 2, depth * 2 // 3))


def merge_pieces(
    ids: Sequence[int], maps: Tensor, piece_of: Callable[[int], str]
) -> list[tuple[str, Tensor]]:
    """Whole words with their map [g,g], scaled to a maximum of 1, from WordPiece ids after [CLS]
    and maps [L,g,g]."""
    words: list[str] = []
    parts: list[list[Tensor]] = []  # maps of each word's pieces
    for number in range(1, len(ids)):
        piece = piece_of(ids[number])
        if piece.startswith("##") and words:
            words[-1] += piece.removeprefix("##")
            parts[-1].append(maps[number])
        else:
            words.append(piece)
            parts.append([maps[number]])
    merged = []
    for word, of_word in zip(words, parts, strict=True):
        heat = torch.stack(of_word).mean(0)
        merged.append((word, heat / heat.max().clamp(min=1e-12)))
    return merged
