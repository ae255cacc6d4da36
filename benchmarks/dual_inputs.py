"""Inputs and loop of benchmarks.dual, equal for every side.

Imports torch alone: it also runs beside the originals' checkouts.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.gauge import measure

CONTEXT = 77  # tokens of CLIP's texts
END = 49407  # id of CLIP's last token


def captions(size: int, views: int, longest: int) -> Tensor:
    """Random token ids int64 [size,views,77] of captions of 8 to `longest` tokens; the first has
    all of them."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, END - 1, (size, views, CONTEXT), generator=rng)
    lengths = torch.randint(8, longest + 1, (size, views, 1), generator=rng)
    lengths[0, 0] = longest
    positions = torch.arange(CONTEXT)
    ids[positions.expand_as(ids) == lengths - 1] = END
    ids[positions.expand_as(ids) >= lengths] = 0
    return ids


def random_batch(options: SimpleNamespace, views: int) -> dict[str, Tensor]:
    """image [B,3,S,S] and text_ids [B,77]; with local views, text_ids [B,1+views,77] and
    image_local [B,views,3,S,S]."""
    size, side = options.batch, 32 if options.tiny else 224
    texts = captions(size, 1 + views, options.tokens)
    batch = {"image": torch.randn(size, 3, side, side), "text_ids": texts}
    if views:
        batch["image_local"] = torch.randn(size, views, 3, side, side)
    else:
        batch["text_ids"] = texts[:, 0]
    return {name: value.to(options.device) for name, value in batch.items()}


def measure_adamw(
    model: nn.Module, loss: Callable[[], Tensor], options: SimpleNamespace, fused: bool | None
) -> dict:
    """`measure` of a training step: forward pass by `loss`, backward pass, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, fused=fused)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    scaler = torch.amp.GradScaler(options.device, enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast(options.device, dtype=dtype, enabled=dtype is not None):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    result = measure(step, options)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return result
