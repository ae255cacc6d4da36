"""Training steps of networks in PyTorch under one loop, and their model FLOPs utilisation."""

import time
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.gauge import measure
from runtime.log import peak_flops
from runtime.optim.build import Precision


def measure_training(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    options: SimpleNamespace,
) -> dict:
    """`measure` of forward pass, backward pass and update; the model's only loss is `loss`."""
    parameters = list(model.parameters())

    def step() -> None:
        with precision.autocast():
            loss = model(**batch)["loss"]
        precision.backward(loss)
        precision.step(optimizer, parameters)

    result = measure(step, options)
    result["parameters"] = sum(parameter.numel() for parameter in parameters)
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
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if options.device == "cpu":
        size = 256 if options.tiny else 2048
        return flops / result["cpu_seconds"] / matmul_rate(dtypes[options.precision], size)
    peak = peak_flops(
        torch.device(options.device), "fp32" if options.precision == "fp32" else "bf16"
    )
    return flops / result["seconds"] / peak if peak else 0.0
