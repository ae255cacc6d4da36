"""FLOPs of operations and of a training step, by torch's own formulas and one that torch gets wrong;
the peak of a device."""

import math
from typing import TYPE_CHECKING
from unittest import mock

import torch

from runtime.gpus import gpu_by_device_name

if TYPE_CHECKING:  # it imports Triton, for a quarter of a second and 80 MB
    from torch.utils.flop_counter import FlopCounterMode


def convolution_backward_flops(
    grad_shape, x_shape, weight_shape, _bias, _stride, _padding, _dilation, transposed, *rest
):
    """The gradients of the input and of the weight cost what the forward pass costs, each; groups
    included.

    torch 2.14's formula takes the weight gradient of a grouped convolution for a dense one: for a
    depthwise convolution that is as many times too much as there are channels.
    """
    _output_padding, _groups, wanted = rest[:3]
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    forward = 2 * grad_shape[0] * positions * math.prod(weight_shape)
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def _convolution_backward(*args, out_shape=None, **kwargs):
    return convolution_backward_flops(*args)


CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


def flop_counter() -> "FlopCounterMode":
    """torch's counter with the corrected formulas."""
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False, custom_mapping=CORRECTED)


def operation_flops(packet, args: tuple, kwargs: dict, out) -> int:
    """FLOPs of one operation by its packet, such as torch.ops.aten.mm; 0 where it has no formula."""
    from torch.utils.flop_counter import flop_registry

    if packet in CORRECTED:
        shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
        return int(CORRECTED[packet](*shapes, **kwargs))
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def peak_flops(device: torch.device, precision: str, tflops: float | None = None) -> float:
    """Peak of this device in FLOP/s: `tflops` where given, else the table by the card's name, else
    0 (unknown)."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return 0.0
    gpu = gpu_by_device_name(torch.cuda.get_device_name(device))
    if gpu is None:
        return 0.0
    return gpu.fp32 if precision == "fp32" else gpu.half


def training_flops(model: torch.nn.Module, batch: dict) -> float:
    """FLOPs of one forward and backward pass of `model(**batch)`, counted with fake tensors:
    nothing is computed.

    Call before the model is wrapped. What activation checkpointing computes again is not counted
    (MFU, not HFU).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    # collectives have no FLOPs and no fake tensors: to the count, this process is alone
    alone = mock.patch.object(torch.distributed, "is_initialized", return_value=False)
    # functional_call leaves the fakes in a module that is reachable by two names
    own = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    with alone, FakeTensorMode(allow_non_fake_inputs=True):

        def fake(tensor):
            # of the same shape and kind, on the CPU: the count is the same on every device
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            return like.requires_grad_(tensor.requires_grad)

        state = {k: fake(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
        inputs = {k: fake(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with flop_counter() as counter:
            losses = functional_call(model, state, kwargs=inputs, tie_weights=True)
            sum(loss for loss in losses.values() if loss.requires_grad).backward()
    for module, parameters, buffers in own:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
    return float(counter.get_total_flops())
