"""Training steps of networks in PyTorch under one loop, and their model FLOPs utilisation."""

import time
from collections.abc import Collection
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.gauge import measure
from runtime.log import peak_flops
from runtime.optim.build import Optimizer, Precision, build_optimizer
from runtime.parallel import checkpoint_blocks


def training_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: Optimizer,
    options: SimpleNamespace,
    decayed: Collection[str] | None = None,
    flops: float | None = None,
) -> dict:
    """`measure` of forward pass, backward pass, gradient norm and update on the device, and the
    first step's `loss`.

    `model(**batch)` returns the loss, 0-d. decayed: see build_optimizer. flops: of the step, for
    `mfu` in the result.
    """
    device = torch.device(options.device)
    model = model.to(device).train()
    if options.activation_checkpointing:
        checkpoint_blocks(model)
    if options.compile:
        model.compile()
    update = build_optimizer(model, optimizer, decayed)
    precision = Precision(options.precision, device, clip=optimizer.clip_grad_norm)
    batch = {name: value.to(device) for name, value in batch.items()}
    parameters = list(model.parameters())
    losses = []

    def step() -> None:
        with precision.autocast():
            loss = model(**batch)
        losses.append(loss.detach())
        precision.backward(loss)
        precision.step(update, parameters)

    result = measure(step, options)
    result["parameters"] = sum(parameter.numel() for parameter in parameters)
    result["loss"] = losses[0].item()
    if flops is not None:
        result["mfu"] = mfu(flops, result, options)
    return result


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP per second of processor time in a matrix product [size,size] on the CPU: the peak that
    its MFU is measured against."""
    matrix = torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(5):
        begin = time.process_time()
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.process_time() - begin))
    return best


def mfu(flops: float, result: dict, options: SimpleNamespace) -> float:
    """Fraction of the vendor's peak on a GPU (0 if unknown), of a matrix product's rate on the
    CPU."""
    if options.device == "cpu":
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        size = 256 if options.tiny else 2048
        return flops / result["cpu_seconds"] / matmul_rate(dtypes[options.precision], size)
    peak = peak_flops(torch.device(options.device), options.precision)
    return flops / result["seconds"] / peak if peak else 0.0
