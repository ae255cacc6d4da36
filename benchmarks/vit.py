"""Speed and memory of a multi-label pre-training step of ViT-B/16, beside timm and transformers.

    python -m benchmarks.vit
    python -m benchmarks.vit --peer PATH/TO/coyo-vit --peer-python PATH  # and TensorFlow's COYO-ViT

A step is forward, backward, global-norm clipping and AdamW of ViT-B/16 with the tanh layer and
21,841 classes, on random images of 224 px. Loss, optimizer, loop, --precision, --compile and
--activation-checkpointing are ours for the three in PyTorch; the original runs its own, in float32
and as one graph.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.runner import OURS, TrainOptions, check_peer
from benchmarks.steps import compare_steps, settings, training_step
from models.classification.classifier import ClassifierConfig, VisionClassifier, sigmoid_loss
from models.weights.vit import transformers_config
from runtime.config.cli import knob, run_script
from runtime.optim.build import Optimizer


@dataclass
class Config(TrainOptions):
    model: str = knob("vit-b/16", "network", choices=("vit-b/16", "vit-l/16"))
    image_size: int = knob(224, "side of the images in pixels", low=16)
    classes: int = knob(21841, "classes", low=2)


class Foreign(nn.Module):
    """A library's transformer under our loss. trunk: images [B,3,S,S] -> features [B,D] behind
    COYO-ViT's tanh layer, or an output of transformers that has them."""

    def __init__(self, trunk: nn.Module, width: int, classes: int):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -10)

    def forward(self, image: Tensor, labels: Tensor, label_weights: Tensor) -> dict[str, Tensor]:
        found = self.trunk(image)
        logits = self.head(getattr(found, "pooler_output", found)).float()
        return {"loss": sigmoid_loss(logits, labels, label_weights)}


def build_model(options: SimpleNamespace) -> nn.Module:
    """The network of one side, with random weights; tiny: 2 blocks of width 32."""
    torch.manual_seed(0)
    name = "vit-mu/16" if options.tiny else options.model
    sizes = {"image_size": options.image_size, "num_classes": options.classes}
    config = ClassifierConfig(model=name, loss="sigmoid", **sizes)
    vit = config.vit
    if options.side == OURS:
        return VisionClassifier(replace(config, representation_size=vit.width))
    if options.side == "timm":
        from timm.models.vision_transformer import VisionTransformer

        trunk = VisionTransformer(
            img_size=vit.image_size,
            patch_size=vit.patch_size,
            embed_dim=vit.width,
            depth=vit.depth,
            num_heads=vit.heads,
            num_classes=vit.width,  # the tanh layer
            act_layer=lambda: nn.GELU(approximate="tanh"),
        )
        return Foreign(nn.Sequential(trunk, nn.Tanh()), vit.width, options.classes)
    from transformers import ViTConfig, ViTModel

    return Foreign(ViTModel(ViTConfig(**transformers_config(config))), vit.width, options.classes)


def step(options: SimpleNamespace) -> dict:
    """A step of one side in PyTorch."""
    model = build_model(options)
    size, side = options.batch, options.image_size
    batch = {
        "image": torch.randn(size, 3, side, side),
        "labels": torch.randint(options.classes, (size, 2)),
        "label_weights": torch.ones(size, 2),
    }
    adamw = Optimizer(lr=1e-4, weight_decay=0.1, clip_grad_norm=1.0)
    return training_step(model, batch, lambda losses: losses["loss"], adamw, options)


def main(config: Config) -> None:
    check_peer(config, "backbones/vit/vit_model.py", "coyo-vit", tensorflow=True)
    sides = dict.fromkeys((OURS, "timm", "transformers"), "benchmarks.vit:step")
    if config.peer:
        sides["original (TensorFlow)"] = "benchmarks.peers.tensorflow:vit"
    title = ["Classification step", config.model, f"{config.classes:,} classes"]
    compare_steps(config, "vit", title + settings(config), sides)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
