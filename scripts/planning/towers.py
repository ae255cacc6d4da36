"""Towers of timm and transformers in a plan: no weights are read, and a text tower that is not here
gets assumed sizes."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from unittest import mock

from torch import nn

from models.dual_encoder.config import DualConfig
from models.layers.library_towers import parse_tower, start_towers


@contextlib.contextmanager
def without_weights(script: ModuleType) -> Iterator[None]:
    """`script.build_model` builds and locks library towers, but reads no weights."""

    def lock_only(
        model: nn.Module, read_weights: Callable, lock: Sequence[str], load: bool = True
    ) -> None:
        start_towers(model, read_weights, lock, load=False)

    with mock.patch.object(script, "start_towers", lock_only):
        yield


@contextlib.contextmanager
def sized_text_tower(network: DualConfig) -> Iterator[tuple[DualConfig, str]]:
    """The recipe with its text tower's vocabulary, and a sentence that says where the sizes come from.

    Reads config.json in the tower's folder, or in the hub's cache for a name of the hub. Where there
    is none, BERT-base stands in, as wide as `tower_classes` demands; its folder lives inside the
    context. Raises UserError for a tower of another library.
    """
    import transformers

    source, _ = parse_tower(network.text_tower, "text_tower", "hf")
    with tempfile.TemporaryDirectory() as folder:
        try:
            sizes = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
            said = f"the {sizes.vocab_size:,} tokens of text_tower hf/{source}"
        except (OSError, ValueError):  # not here, or nothing that transformers knows
            sizes = bert_of_width(network.embed_dim if network.tower_classes else 768)
            sizes.save_pretrained(folder)
            network = replace(network, text_tower=f"hf/{folder}")
            said = (
                f"text_tower hf/{source} is not here: a BERT of {sizes.num_hidden_layers} layers, "
                f"width {sizes.hidden_size} and {sizes.vocab_size:,} tokens in its place"
            )
        yield replace(network, vocab_size=sizes.vocab_size), said


def bert_of_width(width: int):
    """transformers' BERT-base configuration with heads of 64 and this width."""
    import transformers

    return transformers.BertConfig(
        hidden_size=width,
        num_attention_heads=width // 64 if width % 64 == 0 else 1,
        intermediate_size=4 * width,
    )
