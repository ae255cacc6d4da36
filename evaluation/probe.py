"""Linear probe: multinomial logistic regression on frozen features, by L-BFGS over the whole
training set."""

import torch
import torch.nn.functional as F
from torch import Tensor

from base import distributed
from base.distributed import World
from evaluation.features import Bank

TILE = 65536  # features on the device at a time


def linear_probe(
    train: Bank, queries: Bank, classes: int, world: World, l2: float = 1e-4, iterations: int = 100
) -> dict[str, float]:
    """`probe` and `probe_top5`, the accuracy on `queries` in percent, and `probe_train`, that on
    `train`.

    Features are standardised by the training set's mean and std. Minimised is the mean cross
    entropy plus l2 / 2 times the squared weights. Computed by the first process alone: the same on
    any number.
    """
    return distributed.on_main(
        lambda: _probe(train, queries, classes, world.device, l2, iterations)
    )


@torch.inference_mode(False)
@torch.no_grad()
def _probe(
    train: Bank, queries: Bank, classes: int, device: torch.device, l2: float, iterations: int
) -> dict[str, float]:
    mean, std = moments(train, device)
    weight = torch.zeros(classes, train.features.shape[1], device=device)
    bias = torch.zeros(classes, device=device)

    def tiles(bank: Bank):
        for first in range(0, len(bank), TILE):
            x = (bank.rows(first, min(first + TILE, len(bank)), device) - mean) / std
            yield x, bank.labels[first : first + TILE].to(device)

    def closure() -> Tensor:
        """Loss, and its gradient by hand: tile by tile, without a graph."""
        loss = 0.5 * l2 * weight.square().sum()
        weight.grad = l2 * weight
        bias.grad = torch.zeros_like(bias)
        for x, labels in tiles(train):
            logits = x @ weight.T + bias
            loss = loss + F.cross_entropy(logits, labels, reduction="sum") / len(train)
            error = logits.softmax(1)
            error[torch.arange(len(labels), device=device), labels] -= 1
            error /= len(train)
            weight.grad += error.T @ x
            bias.grad += error.sum(0)
        return loss

    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    optimizer.step(closure)

    def accuracy(bank: Bank, k: int) -> float:
        right = 0
        for x, labels in tiles(bank):
            best = (x @ weight.T + bias).topk(min(k, classes), 1).indices
            right += int((best == labels[:, None]).sum())
        return 100 * right / len(bank)

    return {
        "probe": accuracy(queries, 1),
        "probe_top5": accuracy(queries, 5),
        "probe_train": accuracy(train, 1),
    }


def moments(bank: Bank, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float32 [D]; deviations of constant features are
    1."""
    total = torch.zeros(bank.features.shape[1], dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for first in range(0, len(bank), TILE):
        x = bank.rows(first, min(first + TILE, len(bank)), device).double()
        total += x.sum(0)
        squares += x.square().sum(0)
    mean = total / len(bank)
    variance = squares / len(bank) - mean.square()
    std = variance.clamp(min=0).sqrt()
    rounding = 1e-6 * mean.abs().clamp(min=1e-6)
    std = torch.where(std > rounding, std, 1.0)
    return mean.float(), std.float()
