"""The original's side of benchmarks.dual: CL2L of clip-rocket and its loss, out of a checkout.

Replaced are xformers, which the default attention does not use, and timm's table of networks.
"""

import importlib
import sys
import types

import torch
from torch import Tensor, nn

from benchmarks.inputs import random_batch
from benchmarks.peers.stand_ins import stand_in
from benchmarks.steps import ADAMW, training_step


def import_checkout(options: types.SimpleNamespace) -> tuple[types.ModuleType, types.ModuleType]:
    """The checkout's modules `models` and `losses`."""
    stand_in("xformers.ops")
    sys.path.insert(0, options.peer)
    importlib.import_module("timm.models.registry")
    vit = importlib.import_module("vit")
    models = importlib.import_module("models")

    def vit_b16(name: str, num_classes: int, attn_layer: str) -> nn.Module:
        return vit.VisionTransformer(num_classes=num_classes, attn_layer=vit.Attention)

    models.timm.create_model = vit_b16
    return models, importlib.import_module("losses")


class Network(nn.Module):
    """CL2L ViT-B/16, called with the batch's names."""

    def __init__(self, models: types.ModuleType):
        super().__init__()
        self.model = models.CL2L_VITB16(
            models.CL2L,
            "standard",  # attention
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

    def forward(self, image: Tensor, text_ids: Tensor, image_local: Tensor) -> dict:
        return self.model(image, text_ids, *image_local.unbind(1))


def step(options: types.SimpleNamespace) -> dict:
    """A training step with the checkout's loss, by our loop and optimizer."""
    torch.manual_seed(0)
    batch = random_batch(options)
    models, losses = import_checkout(options)
    nn.Module.cuda = lambda self, *args, **kwargs: self.to(options.device)
    criterion = losses.CL2LLoss("sum", 0.0)
    options.activation_checkpointing = False  # is ours

    def loss_of(outputs: dict) -> Tensor:
        return criterion(outputs)["loss"]

    return training_step(Network(models), batch, loss_of, ADAMW, options)
