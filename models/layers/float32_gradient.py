"""A linear layer whose weight gradient the matrix product itself writes in float32.

Autocast computes it in half precision, writes it, reads it and writes it again in float32. On CUDA
`torch.mm` has `out_dtype`: it rounds nothing, and saves 4 bytes of memory traffic for each
weight and step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """[M,K] times [K,N], both of one half precision -> float32 [M,N]."""
    return torch.mm(a, b, out_dtype=torch.float32)


# whether torch.compile, too, knows such products; to try one would import sympy, half a second
KNOWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def has_float32_products(x: Tensor) -> bool:
    """Whether torch has them on the device of x."""
    return KNOWN and x.is_cuda


class Product(torch.autograd.Function):
    """x [...,D] in half precision times the transpose of weight [F,D] float32 -> [...,F]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        return F.linear(x, half)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, half = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ half
        if ctx.needs_input_grad[1]:
            of_weight = float32_product(gradient.flatten(0, -2).t(), x.flatten(0, -2))
        return of_x, of_weight


class Float32GradientLinear(nn.Linear):
    """nn.Linear whose weight gradient is a `float32_product` under autocast, where there are any."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,F]."""
        device = x.device.type
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if (
            trains
            and self.bias is None
            and self.weight.dtype == torch.float32
            and torch.is_autocast_enabled(device)
            and has_float32_products(x)
        ):
            return Product.apply(x.to(torch.get_autocast_dtype(device)), self.weight)
        return super().forward(x)
