"""FLOPs of operations: torch's own formulas, and one that torch gets wrong."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def convolution_backward_flops(
    grad_shape, x_shape, weight_shape, _bias, _stride, _padding, _dilation, transposed, *rest
):
    """The gradients of the input and of the weight cost what the forward pass costs, each; groups included.

    torch 2.14's formula takes the weight gradient of a grouped convolution for a dense one: for a depthwise
    convolution that is as many times too much as there are channels.
    """
    _output_padding, _groups, wanted = rest[:3]
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    forward = 2 * grad_shape[0] * positions * math.prod(weight_shape)
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def _convolution_backward(*args, out_shape=None, **kwargs):
    return convolution_backward_flops(*args)


CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


def flop_counter() -> FlopCounterMode:
    """torch's counter with the corrected formulas."""
    return FlopCounterMode(display=False, custom_mapping=CORRECTED)


def operation_flops(packet, args: tuple, kwargs: dict, out) -> int:
    """FLOPs of one operation by its packet (such as torch.ops.aten.mm); 0 for what has no formula."""
    if packet in CORRECTED:
        shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
        return int(CORRECTED[packet](*shapes, **kwargs))
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))
