"""Training steps of networks in PyTorch under one loop, their MFU and their table."""

from collections.abc import Callable, Collection
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from base.distributed import alone
from benchmarks.child import measure, measure_once
from benchmarks.runner import OURS, TrainOptions, device_of, take_turns
from benchmarks.table import FASTER, FASTER_CPU, MEMORY, Column, publish
from runtime.flops import peak_flops
from runtime.optim.build import PRECISIONS, Optimizer, Precision, build_optimizer
from runtime.parallel import ParallelOptions, parallelize

COLUMNS = [
    Column("seconds a step", "seconds", "{:.3f}", spread=True),
    Column("CPU seconds", "cpu_seconds"),
    Column("samples/s", "rate", "{:.3f}"),
    MEMORY,
    Column("MFU", "mfu", "{:.0%}"),
    FASTER,
    FASTER_CPU,
    Column("ours needs of its memory", "peak_bytes", "{:.2f} x", ratio="higher"),
]
ADAMW = Optimizer(lr=1e-4, weight_decay=0.1)  # of the dual encoders


def training_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    optimizer: Optimizer,
    options: SimpleNamespace,
    decayed: Collection[str] | None = None,
    before: Callable[[], None] | None = None,
) -> dict:
    """`measure` of forward pass, backward pass, gradient norm and update on the device, the number
    of `parameters` and the first `loss`: `loss_of`, 0-d, of what `model(**batch)` returns. decayed:
    see build_optimizer. before: what else a step does, at its start."""
    device = torch.device(options.device)
    features = ParallelOptions(
        compile=options.compile, activation_checkpointing=options.activation_checkpointing
    )
    model = parallelize(model.train(), alone(device), features)
    update = build_optimizer(model, optimizer, decayed)
    precision = Precision(options.precision, device, clip=optimizer.clip_grad_norm)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []

    def step() -> None:
        if before is not None:
            before()
        with precision.autocast():
            loss = loss_of(model(**batch))
        losses.append(loss.detach())
        precision.backward(loss)
        precision.step(update, parameters)

    for name, value in batch.items():
        batch[name] = value.to(device)
    result = measure(step, options)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {**result, "parameters": count, "loss": losses[0].item()}


def mfu(flops: float, result: dict, options: SimpleNamespace) -> float:
    """Fraction of a GPU's peak by its vendor (0 if unknown); of a CPU's rate in a matrix product,
    by processor time."""
    if options.device != "cpu":
        peak = peak_flops(torch.device(options.device), options.precision)
        return flops / result["seconds"] / peak if peak else 0.0
    size = 256 if options.tiny else 2048
    matrix = torch.randn(size, size, dtype=PRECISIONS[options.precision])
    seconds = min(measure_once(lambda: matrix @ matrix)[1]["cpu_seconds"] for _ in range(5))
    return flops / result["cpu_seconds"] * seconds / (2 * size**3)


def settings(options: TrainOptions) -> list[str]:
    """Words of a title for the options that all benchmarks of training steps have."""
    words = [f"batch {options.batch}", options.precision, device_of(options)]
    words += ["compiled"] * options.compile
    return words + ["activation checkpointing"] * options.activation_checkpointing


def compare_steps(
    options: TrainOptions, name: str, title: list[str], sides: dict[str, str]
) -> None:
    """Measure the training steps of all sides and publish their table."""
    results = take_turns(options, sides)
    remark = f"{results[OURS][0]['parameters'] / 1e6:.1f} million parameters."
    for side, runs in results.items():
        for run in runs:
            run["rate"] = options.batch / run["seconds"]
        if "library" in runs[0]:
            remark += f" {side}: {runs[0]['library']}, float32."
    publish(options, name, title, results, COLUMNS, remark)
