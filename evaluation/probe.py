"""Linear probe: multinomial logistic regression on frozen features, by L-BFGS over the whole
training set; its weight decay given, or chosen on validation images as CLIP's."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base import distributed
from base.distributed import World
from base.errors import UserError
from base.knobs import knob
from evaluation.features import Bank

TILE = 65536  # features on the device at a time
SWEEP = torch.logspace(-6, 2, 97, dtype=torch.float64).tolist()  # twelve a decade
FIRST, STEPS = 16, (8, 4, 2, 1)  # every 16th value, then neighbours of the best


@dataclass
class ProbeOptions:
    """The linear probe, and its row among CLIP_benchmark's."""

    linear_probe: bool = knob(False, "also logistic regression on the features")
    probe_l2: float = knob(1e-4, "its weight decay, of standardised features", low=0)
    probe_val_data: str | None = knob(None, "labelled images to choose the weight decay by")
    probe_val_fraction: float = knob(
        0.0, "or that fraction of train_data, held out", low=0, high=0.9
    )
    probe_iterations: int = knob(100, "its most L-BFGS iterations", low=1)
    results: Path | None = knob(None, "JSON lines of CLIP_benchmark's rows [result/results.jsonl]")
    data_name: str = knob("", "how its row calls the data set [as val_data is called]")
    model_name: str = knob("", "how its row calls the model", rare=True)

    def check_probe(self) -> None:
        """Check that the options are compatible."""
        if self.probe_val_data and self.probe_val_fraction:
            raise UserError("--probe-val-data and --probe-val-fraction: give one of them")
        if (self.probe_val_data or self.probe_val_fraction) and not self.linear_probe:
            raise UserError("--probe-val-data and --probe-val-fraction need --linear-probe")
        if (self.results or self.data_name) and not self.linear_probe:
            raise UserError("--results and --data-name are of the probe's row: add --linear-probe")


class Selection(NamedTuple):
    """Some images of a bank: those of `kept`, bool [N], or all."""

    bank: Bank
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.bank) if self.kept is None else int(self.kept.sum())

    def tiles(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Features float32 [n,D] and labels int64 [n], a tile at a time."""
        for first in range(0, len(self.bank), TILE):
            last = min(first + TILE, len(self.bank))
            x = self.bank.rows(first, last, device)
            labels = self.bank.labels[first:last].to(device)
            if self.kept is not None:
                rows = self.kept[first:last].to(device)
                x, labels = x[rows], labels[rows]
            yield x, labels


class Probe(NamedTuple):
    """Linear classifier [C,D] with bias [C], of features standardised by mean and std [D]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """Features [N,D] -> logits [N,C]."""
        return (x - self.mean) / self.std @ self.weight.T + self.bias


def linear_probe(
    train: Bank,
    queries: Bank,
    classes: int,
    world: World,
    l2: float = 1e-4,
    iterations: int = 100,
    val: Bank | None = None,
    val_fraction: float = 0.0,
) -> dict[str, float]:
    """`probe`, `probe_top5` and `probe_mean_per_class`, accuracies on `queries` in percent, and
    `probe_train`, that on what it was fitted to.

    Features are standardised by the fitted images' mean and std. Minimised is the mean cross
    entropy plus l2 / 2 times the squared weights. With `val`, or `val_fraction` of the training
    images held out, l2 is chosen on those (see `sweep`) and the probe fitted to both; the result
    then has `probe_l2` and `probe_val` too. Computed by the first process alone: the same on any
    number.
    """
    device = world.device

    def fitted_to(parts: Sequence[Selection], value: float) -> Probe:
        return fit(parts, classes, device, value, iterations)

    @torch.inference_mode(False)
    @torch.no_grad()
    def figures() -> dict[str, float]:
        found = {}
        parts = [Selection(train)]
        chosen = l2
        if val is not None or val_fraction:
            parts = (
                split(train, val_fraction) if val is None else [Selection(train), Selection(val)]
            )

            def on_held_out(value: float) -> float:
                return accuracy(fitted_to(parts[:1], value), parts[1:], 1, device)

            chosen, found["probe_val"] = sweep(on_held_out)
            found["probe_l2"] = chosen
        probe = fitted_to(parts, chosen)
        test = [Selection(queries)]
        return found | {
            "probe": accuracy(probe, test, 1, device),
            "probe_top5": accuracy(probe, test, 5, device),
            "probe_mean_per_class": mean_of_classes(probe, test, device),
            "probe_train": accuracy(probe, parts, 1, device),
        }

    return distributed.on_main(figures)


def split(bank: Bank, fraction: float) -> tuple[Selection, Selection]:
    """The bank without a random fraction of its images, and that fraction; always the same one."""
    count = round(fraction * len(bank))
    if not 0 < count < len(bank):
        raise UserError(
            f"--probe-val-fraction {fraction:g} of {len(bank)} images leaves none to "
            f"{'choose by' if count == 0 else 'train on'}; take another fraction"
        )
    held_out = torch.zeros(len(bank), dtype=torch.bool)
    held_out[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:count]] = True
    return Selection(bank, ~held_out), Selection(bank, held_out)


def sweep(score: Callable[[float], float]) -> tuple[float, float]:
    """The weight decay of the highest score, and the score: 1e-6 ... 100, in steps of a twelfth
    decade, by the search of CLIP (Radford et al. 2021, appendix A.3): every 16th value, then those
    8, 4, 2 and 1 steps beside the best. Of equal ones the smaller is taken, as in CLIP_benchmark.
    """
    scores: dict[int, float] = {}

    def best_of(numbers: Sequence[int]) -> int:
        for number in numbers:
            if number not in scores:
                scores[number] = score(SWEEP[number])
        return max(numbers, key=scores.__getitem__)  # the first of equal ones

    best = best_of(range(0, len(SWEEP), FIRST))
    for step in STEPS:
        best = best_of([max(best - step, 0), best, min(best + step, len(SWEEP) - 1)])
    if best in (0, len(SWEEP) - 1):
        message = f"linear probe: the best weight decay is {SWEEP[best]:g}, the end of the sweep"
        warnings.warn(message, stacklevel=2)
    return SWEEP[best], scores[best]


def fit(
    parts: Sequence[Selection], classes: int, device: torch.device, l2: float, iterations: int
) -> Probe:
    """The probe of the least loss."""
    mean, std = moments(parts, device)
    weight = torch.zeros(classes, len(mean), device=device)
    bias = torch.zeros(classes, device=device)
    probe = Probe(weight, bias, mean, std)
    total = sum(map(len, parts))

    def closure() -> Tensor:
        """Loss, and its gradient by hand: tile by tile, without a graph."""
        loss = 0.5 * l2 * weight.square().sum()
        weight.grad = l2 * weight
        bias.grad = torch.zeros_like(bias)
        for part in parts:
            for x, labels in part.tiles(device):
                logits = probe.scores(x)
                loss = loss + F.cross_entropy(logits, labels, reduction="sum") / total
                error = logits.softmax(1)
                error[torch.arange(len(labels), device=device), labels] -= 1
                error /= total
                weight.grad += error.T @ ((x - mean) / std)
                bias.grad += error.sum(0)
        return loss

    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    optimizer.step(closure)
    return probe


def accuracy(probe: Probe, parts: Sequence[Selection], k: int, device: torch.device) -> float:
    """Top-k accuracy in percent; with fewer than k classes all are among the best k."""
    right = 0
    k = min(k, len(probe.bias))
    for part in parts:
        for x, labels in part.tiles(device):
            best = probe.scores(x).topk(k, 1).indices
            right += int((best == labels[:, None]).sum())
    return 100 * right / sum(map(len, parts))


def mean_of_classes(probe: Probe, parts: Sequence[Selection], device: torch.device) -> float:
    """Accuracy of every class that occurs, averaged, in percent."""
    shown = torch.zeros(len(probe.bias), dtype=torch.float64, device=device)
    right = torch.zeros_like(shown)
    for part in parts:
        for x, labels in part.tiles(device):
            hits = labels[probe.scores(x).argmax(1) == labels]
            shown += labels.bincount(minlength=len(shown))
            right += hits.bincount(minlength=len(shown))
    return 100 * (right / shown)[shown > 0].mean().item()


def moments(parts: Sequence[Selection], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of each feature, float32 [D]; the std of a constant feature is 1."""
    width = parts[0].bank.features.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for part in parts:
        for x, _ in part.tiles(device):
            total += x.double().sum(0)
            squares += x.double().square().sum(0)
    count = sum(map(len, parts))
    mean = total / count
    variance = squares / count - mean.square()
    std = variance.clamp(min=0).sqrt()
    rounding = 1e-6 * mean.abs().clamp(min=1e-6)
    std = torch.where(std > rounding, std, 1.0)
    return mean.float(), std.float()
