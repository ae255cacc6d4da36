"""Moving averages of weights: momentum teachers (SIMLA, ALBEF, BYOLIP) and EMA (Classification.py)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from base.errors import UserError


class WeightAverage:
    """average <- decay * average + (1 - decay) * online, in place, by a few fused kernels.

    pairs: (average, online) modules; each average is a copy of its online module, which may hold
    more. Tied parameters are averaged once. Build it after every wrapper (FSDP2, DDP, compile) is in
    place, since wrappers may replace parameters; sharded DTensors are averaged shard by shard.
    average_buffers: floating-point buffers (statistics of batch norms) are averaged like weights;
    otherwise they stay the average's own, and only `copy` copies them.

    Raises UserError where an average is no copy of its online module.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]], average_buffers: bool = False):
        self.average: list[Tensor] = []
        self.online: list[Tensor] = []
        self.buffers: list[tuple[Tensor, Tensor]] = []  # not averaged
        for average, online in pairs:
            for mine, theirs in matching(average.named_parameters(), online.named_parameters()):
                self.average.append(mine)
                self.online.append(theirs)
            for mine, theirs in matching(average.named_buffers(), online.named_buffers()):
                if average_buffers and mine.is_floating_point():
                    self.average.append(mine)
                    self.online.append(theirs)
                else:
                    self.buffers.append((mine, theirs))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One step of the average; decay in 0..1."""
        torch._foreach_lerp_(self.average, self.online, 1.0 - decay)

    @torch.no_grad()
    def copy(self) -> None:
        """average <- online, buffers included."""
        torch._foreach_copy_(self.average, self.online)
        for mine, theirs in self.buffers:
            mine.copy_(theirs)


def matching(
    average: Iterable[tuple[str, Tensor]], online: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(average, online) tensors by name. Raises UserError where one is missing or has another shape."""
    known = dict(online)
    pairs = []
    for name, tensor in average:
        if name not in known or known[name].shape != tensor.shape:
            raise UserError(
                f"the average's {name} {list(tensor.shape)} has no counterpart to follow"
            )
        pairs.append((tensor, known[name]))
    return pairs
