"""Muon (Jordan et al. 2024; Liu et al. 2025) for the hidden matrices, AdamW for the rest."""

import torch
from torch import Tensor

from base.libraries import POSITION_TABLES

NOT_HIDDEN = (  # of the matrices: tables and heads, which Muon is not for
    "embed",
    "head.",
    "output.weight",
    "classifier.",
    *POSITION_TABLES,
)
# of a group, under the names that torch.optim.Muon saves: checkpoints have all of them
OPTIONS = {
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.775, 2.0315),  # of the quintic iteration, Jordan et al.
    "ns_steps": 5,
    "eps": 1e-7,  # smallest norm to divide by
    "adjust_lr_fn": "match_rms_adamw",
}
TOGETHER = 2**26  # elements of matrices of one shape that are updated at once: bounds the memory


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter."""
    return parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups with `muon: True`, torch's fused AdamW on the others, as one optimizer: one
    state, one list of groups, saved and resumed like any other.

    Updates of matrices have the size of AdamW's (Liu et al. 2025, equation 4), so that one learning
    rate fits both. The arithmetic is torch.optim.Muon's; matrices of one shape are updated together.
    `found_inf`, where set, is 1 for an update to be left out, as in torch's fused optimizers: the
    host reads nothing.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves found_inf to the step

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        hidden = [{**group, "lr": lr, **OPTIONS} for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self.adamw = None
        if rest:
            self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
            rest = self.adamw.param_groups
        super().__init__([*hidden, *rest], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["muon"]:
                for matrices in of_one_shape(group["params"]):
                    self._update(matrices, group, found_inf)
        if self.adamw is not None:
            self.adamw.state = self.state
            self.adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
            self.adamw.found_inf = found_inf
            self.adamw.step()
        return loss

    def _update(self, matrices: list[Tensor], group: dict, found_inf: Tensor | None) -> None:
        """w <- (1 - lr wd) w - 0.2 lr sqrt(max(O, I)) orthogonalized(g + m (b - g)), for weights w
        [O, I], gradients g and their running means b <- g + m (b - g)."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradients = torch.stack([matrix.grad for matrix in matrices])
        before = torch.stack(buffers)
        means = before.lerp(gradients, 1 - group["momentum"])
        updates = orthogonalized(gradients.lerp(means, group["momentum"]), group).to(means.dtype)
        kept = 1 - group["lr"] * group["weight_decay"]
        if found_inf is not None:
            bad = found_inf > 0
            means = torch.where(bad, before, means)
            updates = torch.where(bad, 0.0, updates)
            kept = torch.where(bad, 1.0, kept)
        rate = 0.2 * group["lr"] * max(matrices[0].shape) ** 0.5
        torch._foreach_copy_(buffers, list(means.unbind()))
        torch._foreach_mul_(matrices, kept)
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-rate)


def of_one_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Those with a gradient, in lists of one shape and of at most TOGETHER elements."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    lists = []
    for shape, alike in shapes.items():
        size = max(1, TOGETHER // shape.numel())
        lists += [alike[start : start + size] for start in range(0, len(alike), size)]
    return lists


def orthogonalized(matrices: Tensor, group: dict) -> Tensor:
    """[N, O, I] -> the same, singular values of each between about 0.7 and 1.2; in bfloat16, on the
    CPU in float32: one without bfloat16 units takes ten times as long for it.

    Newton-Schulz iterations X <- a X + (b XX' + c (XX')²) X of each matrix by its Frobenius norm.
    """
    a, b, c = group["ns_coefficients"]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
