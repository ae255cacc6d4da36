"""What several loops are compared by: tensors, gradients, pixels, and values of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

TOLERANCE = 5e-3  # a ReLU behind the batch norm of a few rows may fall to the other side
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def gather(value) -> list:
    """`value` of every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def close(found: Tensor, expected: Tensor, size: Tensor, lr: float, what: str) -> None:
    """size: the length by which the difference is measured; beyond it, a two-thousandth of a full
    step of Adam's, for gradients that are 0 but for rounding. lr: the highest learning rate."""
    difference = (found.detach() - expected.detach()).float().norm().item()
    allowed = TOLERANCE * size + lr * 5e-4 * expected.numel() ** 0.5
    assert difference <= allowed, f"{what} is off by {difference:.2e}, more than {allowed:.2e}"


def check_gradients(
    found: dict[str, Tensor], grads: dict[str, Tensor], limit: float | None, what: str
) -> dict[str, Tensor]:
    """Compare the gradients that the optimizer was given; returns them as they are after the
    clipping at `limit`."""
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    if limit:
        assert norm > limit, "a limit that is not reached tests nothing"
        grads = {name: grad * limit / norm for name, grad in grads.items()}
        norm = torch.tensor(limit)
    for name, grad in grads.items():
        apart = (found[name] - grad).norm() / (grad.norm() + 1e-2 * norm)
        assert apart <= TOLERANCE, f"{what}: gradient of {name} is off by {apart:.1e}"
    return grads


def check_pixels(images: Tensor, statistics: tuple[list[float], list[float]]) -> None:
    """Images [...,3,H,W] reach the network as pixels of 0..255, less their mean, over their std."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in statistics)
    pixels = images * std + mean
    assert pixels.min() > -0.5 and 100 < pixels.max() < 255.5
    assert (pixels - pixels.round()).abs().max() < 2e-3
