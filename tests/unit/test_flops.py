"""FLOPs of convolutions, which torch 2.14 counts wrongly where they have groups; the table of GPUs."""

import pytest
import torch
from torch import nn

from base.errors import UserError
from models.layers.efficientnet import SHAPES, EfficientNet
from runtime.flops import flop_counter, training_flops
from runtime.gpus import GPUS, gpu_by_device_name, parse_gpu


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_gradients_cost_a_forward_pass_each(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 16, 3, stride=2, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 10, 10, requires_grad=True)
    with flop_counter() as counter:
        y = conv(x)
    positions = x if transposed else y
    forward = 2 * 2 * positions[0, 0].numel() * conv.weight.numel()
    assert counter.get_total_flops() == forward
    with flop_counter() as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_a_first_layer_needs_no_input_gradient():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    with flop_counter() as counter:
        y = conv(torch.randn(2, 3, 8, 8))
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * y[0, 0].numel() * conv.weight.numel())


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = EfficientNet(SHAPES["B0"])

    def forward(self, image):
        return {"loss": self.tower(image).sum()}


def test_efficientnet_b0_as_published():
    """Tan and Le 2019, table 1: 0.39 G multiply-adds at 224 px; the head convolution, absent here,
    has 0.02."""
    image = torch.zeros(16, 3, 224, 224, device="meta")
    assert training_flops(Loss().train(), {"image": image}) == pytest.approx(
        16 * 3 * 2 * 0.37e9, rel=0.08
    )


def test_gpus_by_name():
    assert gpu_by_device_name("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_by_device_name("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_by_device_name("NVIDIA A100 80GB PCIe") is GPUS["a100"]
    assert gpu_by_device_name("NVIDIA GH200 480GB") is GPUS["h200"]
    assert gpu_by_device_name("Tesla T4") is GPUS["t4"]
    assert gpu_by_device_name("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert parse_gpu("RTX 4090") is GPUS["rtx4090"]


OTHERS = ["Nobody's card", "NVIDIA A10G", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA H100 PCIe"]
OTHERS += ["NVIDIA H100 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU"]
OTHERS += ["NVIDIA A100-SXM4-40GB MIG 3g.20gb"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_card_of_other_rates_is_unknown(name):
    """Its MFU would be wrong; --peak_tflops tells the peak."""
    assert gpu_by_device_name(name) is None


def test_a_gpu_by_its_figures():
    gpu = parse_gpu("312,2.0,80")
    assert (gpu.half, gpu.bandwidth, gpu.memory) == (312e12, 2e12, 80e9)
    assert gpu.rate(2, "bf16") == 312e12


@pytest.mark.parametrize("text", ["h1000", "312,2.0", "a,b,c", "312,0,80", "nan,2,80", ""])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(UserError, match="--gpu"):
        parse_gpu(text)
