"""Shared by ALIGN's golden tests: the toy towers, and TensorFlow's variables under our names."""

from dataclasses import replace

import torch
from torch import Tensor

from models.dual_encoder.align import Align
from models.dual_encoder.base import DualConfig
from models.layers.efficientnet import EfficientNetShape
from models.layers.xbert import BertConfig
from models.weights.align import from_tensorflow_names

TINY_IMAGE = EfficientNetShape(0.125, 0.3, divisor=4, drop_connect=0.0)
TINY_TEXT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LOSS = {"label_smoothing": 0.1, "loss_avg_or_sum": "sum"}


def tiny_align(virtual_batch: int = 16, embed_dim: int = 12, model: str = "ALIGN_B0_MINI", **values) -> Align:
    config = DualConfig(model=model, image_size=33, embed_dim=embed_dim, **LOSS | values)
    return Align(config, replace(TINY_IMAGE, virtual_batch=virtual_batch), TINY_TEXT)


def pictures(u8_nhwc: Tensor) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W], values -1..1."""
    return (u8_nhwc.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def state_of(tensors: dict[str, Tensor], prefix: str, tower: str = "") -> dict[str, Tensor]:
    """Variables `<prefix><TF name>` (of one tower, where the names do not say) under our names and in our layout."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return from_tensorflow_names({tower + name: value for name, value in found.items()}, tensors)


def load(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Load what TensorFlow has; it counts no batches."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    assert all("pooler" in name for name in unexpected), unexpected
