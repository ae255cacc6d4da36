"""LAMB (You et al. 2020) in a handful of launches, whatever the number of parameters, and without a
host sync."""

import torch
from torch import Tensor
from torch.optim.adam import adam


class Lamb(torch.optim.Optimizer):
    """Adam's direction plus decay, its length per tensor made that of the weights: w <- w - lr ρ u,
    u = adam + wd w.

    ρ = |w| / |u|, 1 where either is 0. Groups without weight decay are plain Adam, as in timm's
    LAMB, whose numbers these are. The direction comes from torch's fused kernel, by letting it
    update zeros at a learning rate of 1; norms and the rest are foreach. `found_inf`, where set, is
    1 for an update to be left out, as in torch's fused optimizers (timm's would let NaN into the
    weights).
    """

    _step_supports_amp_scaling = True  # GradScaler leaves found_inf to the step

    def __init__(
        self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0})

    def load_state_dict(self, state_dict: dict) -> None:
        """Torch leaves the count of updates where a checkpoint was read: in host memory."""
        super().load_state_dict(state_dict)
        for weight, values in self.state.items():
            if values:  # it has had a gradient
                values["step"] = values["step"].to(weight.device)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict) -> None:
        found_inf = getattr(self, "found_inf", None)
        update = self._directions(weights, group, found_inf)
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=-group["weight_decay"])
            size = torch.stack(torch._foreach_norm(weights))
            length = torch.stack(torch._foreach_norm(update))
            ratios = torch.where((size > 0) & (length > 0), size / length, 1.0)
            ratios = ratios if found_inf is None else ratios * (1 - found_inf)
            torch._foreach_mul_(update, list(ratios.unbind()))
        torch._foreach_add_(weights, update, alpha=group["lr"])

    def _directions(
        self, weights: list[Tensor], group: dict, found_inf: Tensor | None
    ) -> list[Tensor]:
        """Adam's directions -m / (sqrt(v) + eps), bias-corrected, as new tensors; zeros where
        found_inf is 1."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        update = [torch.zeros_like(weight) for weight in weights]
        beta1, beta2 = group["betas"]
        adam(
            update,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return update
