"""Shared by ALIGN's golden tests: the towers in the sizes of a case, and TensorFlow's variables
under our names."""

import torch
from torch import Tensor

from models.dual_encoder.align import Align
from models.dual_encoder.config import DualConfig
from models.layers.efficientnet import EfficientNetShape
from models.layers.xbert import BertConfig
from models.weights.align import from_tensorflow_names
from tests.helpers.golden import golden_json

BERT_NAMES = {
    "vocab": "vocab_size",
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "num_hidden_layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "num_attention_heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}


def image_shape(**changes) -> EfficientNetShape:
    """The image tower of the case `efficientnet_tiny`, which `train_steps` has too."""
    case = golden_json("align", "efficientnet_tiny.json")
    given = {
        "width": case["width_coefficient"],
        "depth": case["depth_coefficient"],
        "divisor": case["depth_divisor"],
        "drop_connect": case["drop_connect_rate"],
        "virtual_batch": case["bn"]["virtual_batch_size"],
        "eps": case["bn"]["epsilon"],
        "momentum": 1 - case["bn"]["keras_momentum"],
    }
    return EfficientNetShape(**{**given, **changes})


def text_shape(case: dict | None = None) -> BertConfig:
    """The text tower of a case's sizes; without one that of `text_tiny`, which `train_steps` has
    too."""
    case = case or golden_json("align", "text_tiny.json")
    sizes = {BERT_NAMES[name]: value for name, value in case.items() if name in BERT_NAMES}
    return BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def loss_options() -> dict:
    """What COYO-ALIGN minimises: the sum of both directions."""
    smoothing = golden_json("align", "contrastive_loss.json")["label_smoothing"]
    return {"label_smoothing": smoothing, "loss_avg_or_sum": "sum"}


def tiny_align(embed_dim: int, model: str = "ALIGN_B0_MINI", **values) -> Align:
    """The system of `train_steps`, or of the sizes given."""
    image = values.pop("image", None) or image_shape()
    text = values.pop("text", None) or text_shape()
    config = DualConfig(model=model, embed_dim=embed_dim, **{**loss_options(), **values})
    return Align(config, image, text)


def pixels(u8_nhwc: Tensor) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W], values -1..1."""
    return nchw(u8_nhwc.float() / 127.5 - 1)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def padded_ids(t: dict[str, Tensor], prefix: str = "") -> Tensor:
    """Token ids int64 [B,L] with 0 where the mask says padding."""
    mask = t[f"{prefix}attention_mask"].bool()
    return torch.where(mask, t[f"{prefix}input_ids"], 0).long()


def state_of(tensors: dict[str, Tensor], prefix: str, tower: str = "") -> dict[str, Tensor]:
    """Variables `<prefix><TF name>` (of one tower, where the names do not say) under our names and
    in our layout."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return from_tensorflow_names({tower + name: value for name, value in found.items()}, tensors)


def load(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Load what TensorFlow has; it counts no batches."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    assert all("pooler" in name for name in unexpected), unexpected
