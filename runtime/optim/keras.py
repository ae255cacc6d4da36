"""SGD and AdamW with the arithmetic of Keras, on torch's fused kernels: for the numbers of systems
published there.

With a constant learning rate and epsilon 0 they are torch's own.
"""

import torch


class KerasSGD(torch.optim.SGD):
    """Momentum whose velocity holds the learning rate: a <- m a - lr (g + wd w); w <- w + a.

    When the learning rate changes, torch's SGD changes what earlier gradients still contribute,
    Keras' does not.
    """

    def step(self, closure=None):
        before = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (rate, decay) in zip(self.param_groups, before, strict=True):
            if grads := [p.grad for p in group["params"] if p.grad is not None]:
                torch._foreach_mul_(grads, rate)
            group["lr"] = 1.0
            group["weight_decay"] = rate * decay  # torch adds it, times w, to the gradient
        try:
            return super().step(closure)
        finally:
            for group, (rate, decay) in zip(self.param_groups, before, strict=True):
                group["lr"] = rate
                group["weight_decay"] = decay


class KerasAdamW(torch.optim.AdamW):
    """Adam with its epsilon outside the bias correction (Kingma and Ba's epsilon hat), behind the
    decoupled decay.

    w <- w - lr wd w; w <- w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): torch's with eps
    / sqrt(1 - b2^t).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, **options):
        super().__init__(params, lr, betas=betas, eps=eps, **options)
        for group in self.param_groups:
            group |= {"epsilon_hat": eps, "updates": 0}

    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = group["epsilon_hat"] / (1 - group["betas"][1] ** group["updates"]) ** 0.5
        return super().step(closure)
