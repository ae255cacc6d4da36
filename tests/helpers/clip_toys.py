"""Tiny dual encoders and batches for tests."""

from unittest import mock

import torch
from torch import nn

import main
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.layers.clip_towers import ClipViT
from models.layers.vit import ViTConfig
from runtime.optim.build import Precision

TOY = {
    "image_size": 16,
    "embed_dim": 12,
    "clip_hidden_dim": 20,
    "cl2l_hidden_dim": 20,
    "barlip_proj_dim": 24,
    "barlip_hidden_dim": 20,
    "siamlip_proj_dim": 10,
    "siamlip_hidden_dim": 20,
    "swalip_proj_dim": 10,
    "swalip_hidden_dim": 20,
    "swalip_num_proto": 9,
    "ssl_mlp_dim": 20,
    "ssl_emb_dim": 10,
    "context_length": 12,
    "vocab_size": 50,
    "text_width": 16,
    "text_heads": 2,
    "transformer_layers": 2,
}
END = TOY["vocab_size"] - 1


class ToyConvNet(nn.Module):
    """A backbone with batch norm."""

    num_features = 14

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 14, 4, stride=4), nn.BatchNorm2d(14), nn.ReLU())

    def forward(self, image):
        return self.net(image).mean((2, 3))


def toy(
    model: str = "CL2L_VITB16_CL2L", visual: nn.Module | None = None, seed: int = 0, **knobs
) -> nn.Module:
    """A dual encoder of a few thousand weights, the same for the same seed."""
    torch.manual_seed(seed)
    visual = visual or ClipViT(ViTConfig(TOY["image_size"], 8, 16, 2, 2))
    return build_dual(DualConfig(model=model, **{**TOY, **knobs}), visual)


def toy_batch(
    pairs: int = 8, views: int = 2, seed: int = 1, length: int = 12
) -> dict[str, torch.Tensor]:
    """`pairs` images with `views` local views, and 1 + views texts each."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, END, (pairs, 1 + views, length), generator=generator)
    ends = torch.randint(3, length, (pairs, 1 + views, 1), generator=generator)
    position = torch.arange(length)
    text = torch.where(position < ends, text, torch.where(position == ends, END, 0))
    size = TOY["image_size"]
    batch = {"image": torch.randn(pairs, 3, size, size, generator=generator), "text_ids": text}
    if views:
        batch["image_local"] = torch.randn(pairs, views, 3, size, size, generator=generator)
    return batch


def with_total(losses: dict, config: DualConfig) -> dict:
    """The named losses and, as `loss`, what main.py minimises."""
    return {"loss": main.total_loss(losses, config), **losses}


def losses_with_total(model: nn.Module, batch: dict) -> dict:
    """`with_total` of the losses of a batch."""
    return with_total(model(**batch), model.config)


def cached_losses(model: nn.Module, parts: list[dict]) -> dict:
    """main.py's step over micro-batches that make one contrastive batch; gradients stay in model."""
    config = main.Config(network=model.config, accumulate=len(parts), cache_features=True)
    precision = Precision("fp32", torch.device("cpu"))
    with mock.patch.object(main, "normalized", lambda batch, pixels: batch):  # images are float
        return main.train_step_cached(model, iter(parts).__next__, None, config, precision)


def losses_of(model: str, features: dict, **options) -> dict:
    """A model's losses and their weighted sum of given features, `*_momentum` the teacher's."""
    with torch.device("meta"):
        network = toy(model, **options)
    suffix = "_momentum"
    own = {name: value for name, value in features.items() if not name.endswith(suffix)}
    teacher = {k.removesuffix(suffix): v for k, v in features.items() if k.endswith(suffix)}
    return with_total(network.losses(own, teacher or None), network.config)
