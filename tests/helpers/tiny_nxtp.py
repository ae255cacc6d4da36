"""Tiny NXTP networks, tokenizers and LLaMA folders for tests that need no recorded numbers."""

import json
from functools import cache
from pathlib import Path

import torch

from models.layers.llama import Llama, LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.recognition.nxtp import Nxtp, NxtpConfig

TEXTS = [
    f"The objects in the image are {a}, {b}, living room"
    for a in "dog cat tree".split()
    for b in "sky car".split()
]


@cache
def piece_model() -> bytes:
    """A SentencePiece model trained on a few sentences."""
    from dataset.text.sentencepiece import train_pieces

    kept: list[bytes] = []
    train_pieces(TEXTS * 4, 330, kept.append)
    return kept[0]


def tokenizer(folder: Path):
    from dataset.text.sentencepiece import PieceTokenizer

    (folder / "tokenizer.model").write_bytes(piece_model())
    return PieceTokenizer(folder)


def network(vocabulary: int = 40, seed: int = 0, heads: int = 4, **changes) -> Nxtp:
    """Image tower 64 wide on 16 patches of 8 px, decoder 32 wide, two blocks."""
    torch.manual_seed(seed)
    vision = OpenAIConfig(
        embed_dim=32, image_size=32, vision_width=64, vision_layers=2, patch_size=8
    )
    decoder = LlamaConfig(
        dim=32, n_layers=2, n_heads=heads, n_kv_heads=2, vocab_size=vocabulary, multiple_of=16
    )
    return Nxtp(NxtpConfig(vision, decoder, **changes)).eval()


def meta_folder(folder: Path, shards: int = 1, vocabulary: int = 40, layers: int = 3) -> Llama:
    """A random LLaMA written as Meta publishes it; the network itself."""
    torch.manual_seed(1)
    sizes = {"dim": 32, "n_layers": layers, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5}
    model = Llama(LlamaConfig(**sizes, vocab_size=vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(sizes | {"vocab_size": -1}))
    from models.layers.llama import own_part

    for rank in range(shards):
        state = own_part(model.state_dict(), rank, shards) | {"rope.freqs": torch.zeros(4)}
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    return model
