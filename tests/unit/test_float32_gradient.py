"""Linear layers whose weight gradient a product writes in float32, with the CPU's products in place of CUDA's."""

import pytest
import torch
from torch import Tensor, nn

from models.layers import float32_gradient
from models.layers.float32_gradient import Float32GradientLinear, has_float32_products
from models.layers.llama import FeedForward, LlamaConfig


@pytest.fixture
def card(monkeypatch):
    """Products as on a card: half precision in, float32 out. Their shapes."""
    shapes = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        if not torch.compiler.is_compiling():
            shapes.append((len(a), b.shape[1]))
        with torch.autocast("cpu", enabled=False):  # on while a compiler traces the backward pass
            return a.float() @ b.float()

    monkeypatch.setattr(float32_gradient, "float32_product", product)
    monkeypatch.setattr(float32_gradient, "has_float32_products", lambda x: True)
    return shapes


def results(layer: nn.Module, x: Tensor, precision: torch.dtype | None) -> list[Tensor]:
    """Output, and gradients of the input and the weights, of a sum of squares."""
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        output = layer(x)
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters())]


def test_gradients_are_those_of_autocast_without_its_rounding(card):
    torch.manual_seed(0)
    layer, x = Float32GradientLinear(24, 40, bias=False), torch.randn(3, 5, 24)
    plain = nn.Linear(24, 40, bias=False)
    plain.load_state_dict(layer.state_dict())
    output, of_x, of_weight = results(layer, x, torch.bfloat16)
    expected = results(plain, x, torch.bfloat16)
    assert card == [(40, 24)]
    assert torch.equal(output, expected[0]) and torch.equal(of_x, expected[1])
    assert of_weight.dtype == torch.float32 and of_weight.is_contiguous()
    assert torch.equal(of_weight.bfloat16(), expected[2].bfloat16())
    gradient = 2 * output.float().bfloat16().float().flatten(0, 1)
    exact = gradient.double().T @ x.bfloat16().double().flatten(0, 1)
    ours, theirs = (of_weight - exact).abs().max(), (expected[2] - exact).abs().max()
    assert ours < 1e-4 < theirs


@pytest.mark.slow
def test_a_compiled_block_is_the_eager_one(card):
    torch.manual_seed(0)
    block = FeedForward(LlamaConfig(dim=16, n_heads=2, ffn_dim=32))
    x = torch.randn(2, 6, 16)
    eager = results(block, x, torch.bfloat16)
    assert sorted(card) == [(16, 32), (32, 16), (32, 16)]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(compiled, x, torch.bfloat16), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["float32", "evaluation", "frozen", "bias", "half weights"])
def test_elsewhere_it_is_the_plain_layer(card, case):
    layer, x = Float32GradientLinear(4, 6, bias=case == "bias"), torch.randn(3, 4)
    layer.to(torch.bfloat16 if case == "half weights" else torch.float32)
    layer.weight.requires_grad_(case != "frozen")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=case != "float32"),
        torch.set_grad_enabled(case != "evaluation"),
    ):
        output = layer(x)
        assert torch.equal(output, nn.Linear.forward(layer, x))
    if output.requires_grad:
        output.float().sum().backward()
    assert not card


def test_the_cpu_has_no_such_products():
    assert not has_float32_products(torch.zeros(2, 2))
