"""The original's side of benchmarks.dual: CL2L of clip-rocket and its loss, out of a checkout.

Networks and losses run as they are. Replaced are xformers' attention (by PyTorch's) and the
library's look-up of weights to download.
"""

import importlib
import sys
import types

import torch
from torch import Tensor, nn

from benchmarks.inputs import random_batch
from benchmarks.steps import training_step
from runtime.optim.build import Optimizer


def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
    """xformers' attention [B,N,H,d] by PyTorch's, which has the heads before the tokens."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def import_checkout(options: types.SimpleNamespace) -> tuple[types.ModuleType, types.ModuleType]:
    """The checkout's modules `models` and `losses`."""
    operations = types.ModuleType("xformers.ops")
    operations.memory_efficient_attention = attention
    operations.unbind = torch.unbind
    sys.modules["xformers"] = types.ModuleType("xformers")
    sys.modules["xformers.ops"] = operations
    sys.path.insert(0, options.peer)
    importlib.import_module("timm.models.registry")
    vit = importlib.import_module("vit")

    def transformer(variant: str, pretrained: bool = False, attn_layer=None, **more) -> nn.Module:
        """Its VisionTransformer with random weights."""
        flash = attn_layer == "flash"
        return vit.VisionTransformer(
            attn_layer=vit.MemEffAttention if flash else vit.Attention, **more
        )

    def vit_b16(name: str, num_classes: int, attn_layer: str) -> nn.Module:
        return transformer(
            name,
            attn_layer=attn_layer,
            patch_size=16,
            embed_dim=768,
            depth=12,
            num_heads=12,
            num_classes=0,
        )

    vit._create_vision_transformer = transformer
    models = importlib.import_module("models")
    models.timm.create_model = vit_b16
    return models, importlib.import_module("losses")


class Network(nn.Module):
    """CL2L ViT-B/16 with the checkout's loss, 0-d."""

    def __init__(self, options: types.SimpleNamespace):
        super().__init__()
        models, losses = import_checkout(options)
        nn.Module.cuda = lambda self, *args, **kwargs: self.to(options.device)
        self.model = models.CL2L_VITB16(
            models.CL2L,
            options.peer_attention,
            embed_dim=512,
            transformer_layers=12,
            separate_proj=True,
            detach_proj=False,
            text_dropout_prob=0.0,
            text_drop_path_prob=0.0,
            clip_proj_type="linear",
            clip_hidden_dim=4096,
            label_smoothing=0.0,
        )
        self.criterion = losses.CL2LLoss("sum", 0.0)

    def forward(self, image: Tensor, text_ids: Tensor, image_local: Tensor) -> Tensor:
        return self.criterion(self.model(image, text_ids, *image_local.unbind(1)))["loss"]


def step(options: types.SimpleNamespace) -> dict:
    """A training step, by our loop and optimizer."""
    torch.manual_seed(0)
    batch = random_batch(options, views=2)
    options.activation_checkpointing = False  # is ours
    adamw = Optimizer(lr=1e-4, weight_decay=0.1)
    return training_step(Network(options), batch, adamw, options)
