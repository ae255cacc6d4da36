"""Heat maps of words from those of their tokens (`models.fusion.grounding.token_maps`)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
