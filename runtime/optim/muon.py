"""Muon (Jordan et al. 2024; Liu et al. 2025) for the hidden matrices, AdamW for the rest."""

import torch
from torch import Tensor

from base.errors import UserError

NOT_HIDDEN = (  # of the matrices: tables and heads, which Muon is not for
    "embed",
    "head.",
    "output.weight",
    "classifier.",
)


def check_muon() -> None:
    """UserError where torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optimizer.opt muon: torch {torch.__version__} has none, it came with 2.9; use adamw"
        )


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter."""
    return parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on the groups with `muon: True`, fused AdamW on the others, as one optimizer:
    one state, one list of groups, saved and resumed like any other.

    Updates of matrices have the size of AdamW's (`match_rms_adamw`), so that one learning rate fits
    both. `found_inf`, where set, is 1 for an update to be left out; Muon reads it on the host.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ):
        check_muon()
        hidden = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self.parts: list[tuple[bool, torch.optim.Optimizer]] = []
        if hidden:
            options = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append((True, torch.optim.Muon(hidden, lr=lr, **options)))
        if rest:
            adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
            self.parts.append((False, adamw))
        super().__init__([group for _, part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the parameters that have a gradient."""
        found_inf = getattr(self, "found_inf", None)
        for is_muon, part in self.parts:
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["muon"] == is_muon]
            if not is_muon:
                part.found_inf = found_inf
            elif found_inf is not None and found_inf.item():
                continue
            part.step()
        return None if closure is None else closure()
