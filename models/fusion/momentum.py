"""Momentum (EMA) copies: every submodule `X_m` follows its sibling `X`."""

import copy

from torch import Tensor, nn

from base.errors import UserError
from models.fusion.compat import Compat
from models.layers.average import WeightAverage


class MomentumModel(nn.Module):
    """A network with a momentum copy `X_m` of each of its submodules X that `momentum_of` names:
    the teacher."""

    momentum_of: tuple[str, ...] = ()

    def __init__(self, compat: Compat):
        super().__init__()
        self.compat = compat

    @property
    def positions(self) -> int:
        """The most tokens of a text."""
        return self.config.bert.max_position_embeddings

    def add_momentum_copies(self) -> None:
        """Give every module of `momentum_of` its untrained copy; call at the end of the subclass's
        __init__."""
        for name in self.momentum_of:
            self.add_module(f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))

    def train(self, mode: bool = True) -> "MomentumModel":
        """The momentum copies stay in eval mode, without dropout; the originals' followed the
        student."""
        super().train(mode)
        for name in self.momentum_of:
            if hasattr(self, f"{name}_m"):  # a model without distillation has none
                getattr(self, f"{name}_m").train(mode and self.compat.teacher_dropout)
        return self


class MomentumPairs:
    """The teacher's update: every X_m of a model follows its sibling X.

    Build it after every wrapper is in place. Call `copy()` after loading weights into the online
    modules, and `update()` right before each forward pass: the momentum features of a step are
    those after its update. `update` leaves buffers alone, `copy` copies them.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.995):
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"momentum {momentum} lies outside 0..1")
        self.momentum = momentum
        self.average = WeightAverage(siblings(model))

    @property
    def teacher(self) -> list[Tensor]:
        """The parameters that follow, tied ones once."""
        return self.average.average

    def update(self) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * online, in place."""
        self.average.update(self.momentum)

    def copy(self) -> None:
        """teacher <- online, in place."""
        self.average.copy()


def siblings(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(X_m, X) of all submodules X with a sibling X_m. Raises UserError where there is none."""
    pairs = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for name, child in children.items():
            if f"{name}_m" in children:
                pairs.append((children[f"{name}_m"], child))
    if not pairs:
        raise UserError("the model has no momentum copy: no submodule X with a sibling X_m")
    return pairs
