"""What both sides of a benchmark share: the batch, the clock and the memory gauge.

Imports torch alone, so that it also runs in the interpreter of an original's checkout.
"""

import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TEXT_LENGTH, IMAGE_SIZE, TOKEN_IMAGE_SIZE, GRID, MASKED_PATCHES = (
    25,
    256,
    128,
    16,
    75,
)  # as SIMLA was published
VOCABULARY, CLS, MASK = 30522, 101, 103  # bert-base-uncased
QUEUE_SIZE = 65536
ALPHA = 0.4  # weight of the teacher's soft targets after the ramp


def synthetic_batch(size: int, seed: int = 0) -> dict[str, Tensor]:
    """A pre-training batch of random images and captions on the CPU, equal for equal arguments.

    image float32 [B,3,256,256]; text_ids int64 [B,25]; text_mask bool [B,25] (captions of 8 to 25
    tokens, the first is the longest); mlm_ids int64 [B,25] and mlm_labels int64 [B,25] (-100 where
    nothing is asked; every caption has at least one masked word); token_image float32 [B,3,128,128]
    in [0,1]; patch_mask bool [B,256] with 75 True a row.
    """
    rng = torch.Generator().manual_seed(seed)
    text_ids = torch.randint(1000, VOCABULARY, (size, TEXT_LENGTH), generator=rng)
    text_ids[:, 0] = CLS
    lengths = torch.randint(8, TEXT_LENGTH + 1, (size,), generator=rng)
    lengths[0] = TEXT_LENGTH
    text_mask = torch.arange(TEXT_LENGTH) < lengths[:, None]
    text_ids *= text_mask
    chosen = torch.rand(size, TEXT_LENGTH, generator=rng) < 0.15
    chosen[:, 1] = True
    chosen &= text_mask & (text_ids != CLS)
    order = torch.rand(size, GRID * GRID, generator=rng).argsort(1)
    return {
        "image": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=rng),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "mlm_ids": text_ids.masked_fill(chosen, MASK),
        "mlm_labels": text_ids.masked_fill(~chosen, -100),
        "token_image": torch.rand(size, 3, TOKEN_IMAGE_SIZE, TOKEN_IMAGE_SIZE, generator=rng),
        "patch_mask": order < MASKED_PATCHES,
    }


def synthetic_split(images: int, captions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`(images float32 [I,3,384,384], ids int64 [T,30], mask bool [T,30])` of a retrieval test on
    the CPU.

    Captions have 9 to 16 tokens, as most of COCO's, and are padded with 0 to the 30 that the
    originals always compute.
    """
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(30) < torch.randint(9, 17, (captions, 1), generator=rng)
    ids = torch.randint(1000, VOCABULARY, (captions, 30), generator=rng)
    ids[:, 0] = CLS
    return torch.randn(images, 3, 384, 384, generator=rng), ids * mask, mask


class Stages:
    """Times of a procedure's stages, by the clock and of the processor: {name: [seconds, CPU
    seconds]}."""

    def __init__(self, device: torch.device):
        self.device, self.name, self.times = device, None, {}

    def enter(self, name: str | None) -> None:
        """From here on it is stage `name`; None ends the last. Entering the stage one is in changes
        nothing."""
        if name == self.name:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = (time.perf_counter(), time.process_time())
        if self.name is not None:
            spent = self.times.setdefault(self.name, [0.0, 0.0])
            self.times[self.name] = [
                t + n - b for t, n, b in zip(spent, now, self.begin, strict=True)
            ]
        self.name, self.begin = name, now


def chosen_device(name: str) -> torch.device:
    """`auto` is CUDA where present, else the CPU."""
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def about(device: torch.device) -> dict[str, str]:
    """What a result was measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"device": device.type, "gpu": gpu, "torch": torch.__version__}


def measure(step: Callable[[], None], device: torch.device, warmup: int, steps: int) -> dict:
    """Run `step` warmup + steps times: medians of the timed ones, and the peak memory in bytes.

    `seconds` is the clock's time, `cpu_seconds` the processor time of all threads, which other
    other work on a shared machine disturbs less.
    """
    seconds, cpu_seconds = [], []
    for i in range(warmup + steps):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
    medians = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds)}
    return medians | {"peak_bytes": peak_bytes(device)}


def measure_training(model, batch: dict[str, Tensor], optimizer, precision, options: dict) -> dict:
    """`measure` of a training step of ours on any network: `model(**batch)["loss"]`, backward,
    update."""
    device, parameters = chosen_device(options["device"]), list(model.parameters())

    def step() -> None:
        with precision.autocast():
            loss = model(**batch)["loss"]
        precision.backward(loss)
        precision.step(optimizer, parameters)

    result = measure(step, device, options["warmup"], options["steps"])
    return result | about(device) | {"parameters": sum(p.numel() for p in parameters)}


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far: of the GPU's allocator, or resident memory of this process on the
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, not the launching process's peak where that was higher
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def pin_choices() -> None:
    """From here on in this process: a drawn hard negative is the likeliest, and ties of top-k go to
    the earlier one."""

    def topk(values: Tensor, k: int, dim: int = -1) -> types.SimpleNamespace:
        first = values.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, k).contiguous()
        return types.SimpleNamespace(indices=first)

    torch.multinomial = lambda weights, num_samples: weights.argmax(-1, keepdim=True)
    torch.Tensor.topk = topk


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter off its start, momentum copies apart from their originals, so that each
    term counts."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng).to(parameter.device)
