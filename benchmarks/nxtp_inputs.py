"""Inputs of benchmarks.recognition and what is trained, equal for both sides.

Imports little, so that it also runs beside an original's checkout.
"""

import re
import zlib
from types import SimpleNamespace

import torch
from torch import nn

from models.weights.nxtp import trained_names

SIDE, PATCH = 224, 14  # pixels; 256 image tokens
PIECES, IMAGE, EMPTY = 32000, 32000, 32001
ANSWER, COMMA = 526, 29892  # LLaMA's "▁are" and ","
PROMPT = "The objects in the image are"
LENGTH = 512  # positions of the original's sequences, image tokens included
LABEL_TOKENS = 3  # that a label is cut off at
TRAINED_BLOCKS = 2  # of the image tower, the last ones


class Words:
    """Stands in for LLaMA's tokenizer: an id a word, two for labels, which have a digit in them."""

    bos_id = bos = 1
    eos_id = eos = 2
    pad_id, pad, image, delimiter = -1, EMPTY, IMAGE, COMMA
    vocab_size = PIECES + 2

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [self.bos] if bos else []
        for word in re.findall(r"<\|image\|>|,|[^\s,]+?(?=<|,|\s|$)", text):
            if word == "<|image|>":
                ids.append(IMAGE)
            elif word == ",":
                ids.append(COMMA)
            elif word == "are":
                ids.append(ANSWER)
            else:
                parts = (word, f"{word}-") if re.search(r"\d", word) else (word,)
                ids += [1000 + zlib.crc32(part.encode()) % 20000 for part in parts]
        return ids + ([self.eos] if eos else [])

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def sizes_of(options: SimpleNamespace) -> tuple[int, int, dict[str, int]]:
    """Width and blocks of the image tower, whose heads have 64 numbers, and the decoder's sizes."""
    if options.tiny:
        return 64, 3, {"dim": 64, "n_layers": 2, "n_heads": 2, "multiple_of": 32}
    return 256, 6, {"dim": 512, "n_layers": 4, "n_heads": 8, "multiple_of": 256}


def images(count: int) -> torch.Tensor:
    """Random normalised images float32 [count,3,224,224]."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def captions(count: int) -> list[str]:
    """Captions of thirteen words, five of them labels of two tokens."""
    texts = []
    for i in range(count):
        words = [f"thing{i}"] + [f"a word{5 * i + j} by" for j in range(1, 5)]
        texts.append(" ".join(words))
    return texts


def labels_of(caption: str) -> list[str]:
    """The words with a digit: what stands in for the nouns."""
    return [word for word in caption.split() if re.search(r"\d", word)]


def freeze(model: nn.Module) -> None:
    """Train what NXTP trains; both sides have the original's names."""
    trained = trained_names([name for name, _ in model.named_parameters()], TRAINED_BLOCKS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
