"""Momentum (EMA) copies: every submodule `X_m` follows its sibling `X`."""

import copy

import torch
from torch import Tensor, nn

from base.errors import UserError


class MomentumModel(nn.Module):
    """A network with a momentum copy `X_m` of each of its submodules X that `momentum_of` names:
    the teacher."""

    momentum_of: tuple[str, ...] = ()

    def __init__(self, compat: str):
        super().__init__()
        if compat not in ("none", "original"):
            raise UserError(
                f"compat is {compat!r}: it takes 'none' (defects mended) or 'original' (the published numbers)"
            )
        self.original = compat == "original"

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
                getattr(self, f"{name}_m").train(mode and self.original)
        return self


class MomentumPairs:
    """The parameters of all X / X_m siblings of a model, tied ones once; buffers are copied but not
    followed.

    Build it after every wrapper (FSDP2, DDP, compile) is in place, since wrappers may replace
    parameters; plain tensors and FSDP2's sharded DTensors alike. Call `copy()` after loading
    weights into the online modules, and `update()` right before each forward: the momentum features
    of a step are those after its update.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.995):
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"momentum {momentum} lies outside 0..1")
        self.momentum = momentum
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.online: list[Tensor] = []
        self.teacher: list[Tensor] = []
        for parent in model.modules():
            children = dict(parent.named_children())
            for name in [name for name in children if f"{name}_m" in children]:
                self._add(name, children[name], children[f"{name}_m"])
        if not self.teacher:
            raise UserError("the model has no momentum copy: no submodule X with a sibling X_m")

    def _add(self, name: str, online: nn.Module, teacher: nn.Module) -> None:
        pairs = list(zip(online.parameters(), teacher.parameters(), strict=False))
        same_count = len(pairs) == len(list(online.parameters())) == len(list(teacher.parameters()))
        if not same_count or any(x.shape != y.shape for x, y in pairs):
            raise UserError(
                f"{name}_m is no copy of {name}: their parameters differ in number or shape"
            )
        self.online += [x for x, _ in pairs]
        self.teacher += [y for _, y in pairs]
        self.buffers += zip(online.buffers(), teacher.buffers(), strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * online, in place."""
        torch._foreach_lerp_(self.teacher, self.online, 1.0 - self.momentum)

    @torch.no_grad()
    def copy(self) -> None:
        """teacher <- online, in place."""
        torch._foreach_copy_(self.teacher, self.online)
        for online, teacher in self.buffers:
            teacher.copy_(online)
