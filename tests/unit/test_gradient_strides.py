"""Gradients of kernels have the strides of their weights: DDP copies, and warns of, those that have not."""

from functools import partial

import pytest
import torch

from models.dual_encoder.factory import build_backbone
from models.layers.efficientnet import SHAPES, EfficientNet
from models.layers.library_towers import TimmGrid, TimmTower
from models.layers.openai_towers import ModifiedResNet, OpenAIConfig
from models.layers.vit import ViT, ViTConfig
from runtime.parallel import match_strides

TOWERS = {
    "ResNet": lambda: build_backbone("RT", 32),
    "OpenAI's ResNet": lambda: ModifiedResNet(
        OpenAIConfig(vision_layers=(1, 1, 1, 1), vision_width=16, image_size=32)
    ),
    "EfficientNet": lambda: EfficientNet(SHAPES["NANO"]),
    "ViT with a stem": lambda: ViT(ViTConfig(32, 8, 48, 1, 4, stem=(12, 24, 48))),
}


def gradients(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tower.zero_grad()
    tower(torch.randn(16, 3, 32, 32)).square().sum().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("name", TOWERS)
def test_strides_are_those_of_the_weights(name):
    torch.manual_seed(0)
    tower = TOWERS[name]().train()
    for module in tower.modules():  # no running statistics between the two passes
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    expected = gradients(tower)
    match_strides(tower)
    found = gradients(tower)
    kernels = [name for name, gradient in found.items() if gradient.ndim == 4]
    assert len(kernels) >= 5
    for name, parameter in tower.named_parameters():
        assert found[name].stride() == parameter.stride(), name
        torch.testing.assert_close(found[name], expected[name], msg=name)


LIBRARY = "timm/test_efficientnet"


@pytest.mark.parametrize(
    "build", [TOWERS["ResNet"], partial(TimmTower, LIBRARY), partial(TimmGrid, LIBRARY)]
)
def test_convolutional_towers_compute_with_channels_last(build):
    tower, seen = build().eval(), []
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    tower(torch.randn(2, 3, 32, 32))
    assert len(seen) > 5
    wide = [out for out in seen if out.shape[1] > 1 and out[0, 0].numel() > 1]
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in wide)
