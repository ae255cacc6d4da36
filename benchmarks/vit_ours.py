"""One measurement of benchmarks.vit: a pre-training step with our network, timm's or transformers',
under one loop.

Called by benchmarks.vit with its settings as JSON; prints the result as JSON.
"""

import json
import sys

import torch
from torch import Tensor, nn

from benchmarks.common import chosen_device, measure_training
from models.classification.classifier import ClassifierConfig, VisionClassifier, sigmoid_loss
from runtime.optim.build import Optimizer, Precision, build_optimizer
from runtime.parallel import checkpoint_blocks


class Foreign(nn.Module):
    """Another library's transformer with the tanh layer and head of COYO-ViT, and our loss."""

    def __init__(self, trunk: nn.Module, token, width: int, classes: int):
        super().__init__()
        self.trunk, self.token = trunk, token
        self.pre_logits, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -10)

    def forward(self, image: Tensor, labels: Tensor, label_weights: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.pre_logits(self.token(self.trunk, image)))).float()
        return {"loss": sigmoid_loss(logits, labels, label_weights)}


def build(options: dict) -> nn.Module:
    """The network, with random weights."""
    config = ClassifierConfig(
        model=options["model"],
        image_size=options["image_size"],
        num_classes=options["classes"],
        loss="sigmoid",
    )
    vit = config.vit
    if options["library"] == "ours":
        return VisionClassifier(
            ClassifierConfig(**vars(config) | {"representation_size": vit.width})
        )
    if options["library"] == "timm":
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": vit.image_size, "patch_size": vit.patch_size, "embed_dim": vit.width}
        sizes |= {"depth": vit.depth, "num_heads": vit.heads, "num_classes": 0}
        trunk = VisionTransformer(**sizes, act_layer=lambda: nn.GELU(approximate="tanh"))
        return Foreign(trunk, lambda trunk, image: trunk(image), vit.width, config.num_classes)
    from transformers import ViTConfig, ViTModel

    from models.weights.vit import transformers_config

    given = ViTConfig(**transformers_config(config))
    trunk = ViTModel(given, add_pooling_layer=False)
    return Foreign(trunk, lambda trunk, image: trunk(image)[0][:, 0], vit.width, config.num_classes)


def main(options: dict) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(options["threads"])
    device = chosen_device(options["device"])
    model = build(options).to(device).train()
    if options["activation_checkpointing"]:
        checkpoint_blocks(model)
    if options["compile"]:
        model.compile()
    optimizer = build_optimizer(model, Optimizer(lr=1e-4, weight_decay=0.1))
    precision = Precision(options["precision"], device, 1.0)
    size, side = options["batch"], options["image_size"]
    batch = {
        "image": torch.randn(size, 3, side, side, device=device),
        "labels": torch.randint(options["classes"], (size, 2), device=device),
        "label_weights": torch.ones(size, 2, device=device),
    }
    return measure_training(model, batch, optimizer, precision, options)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
