"""Optimizers of timm by name: `timm/lion`, `timm/nadamw`, …"""

import torch
from torch import Tensor

from base.distributed import say
from base.errors import UserError
from base.names import did_you_mean

PREFIX = "timm/"
WAITING = ("AdamP", "Kron", "NvNovoGrad", "SGDP")  # classes that read values on the host


def is_of_timm(opt: str) -> bool:
    return opt.startswith(PREFIX)


def build_timm(groups: list[dict], opt: str, options: dict):
    """timm's optimizer over parameter groups, with those of the options lr, weight_decay, momentum,
    betas and eps that it has.

    Those that take three betas keep their own. They know no `found_inf`: update them by
    `step_or_leave`. UserError for a name that timm does not know, and for second-order methods.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = opt.removeprefix(PREFIX).lower()
    known = list_optimizers()
    if name not in known:
        hint = did_you_mean(name, known) or " Known are " + ", ".join(known)
        raise UserError(f"optimizer.opt {opt}: timm has no such optimizer{hint}")
    about = get_optimizer_info(name)
    if about.second_order:
        raise UserError(
            f"optimizer.opt {opt} needs second derivatives, which no script computes; choose another"
        )
    given = dict(options)
    for option in ("momentum", "betas", "eps"):
        if not getattr(about, f"has_{option}"):
            given.pop(option)
    if about.num_betas != 2:
        given.pop("betas", None)
    try:
        optimizer = create_optimizer_v2(groups, opt=name, filter_bias_and_bn=False, **given)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"optimizer.opt {opt}: it needs a package that is not here ({error})"
        ) from None
    if type(optimizer).__name__ in WAITING:
        say(
            f"optimizer.opt {opt}: each update waits for the GPU, because timm reads values on the host"
        )
    optimizer.knows_no_found_inf = True
    return optimizer


@torch.no_grad()
def step_or_leave(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """One update, after which the weights are those before it where found_inf (0-d) is 1.

    The host reads nothing; a copy of the weights lives as long as the update. The optimizer's state
    is not restored: after such an update the run ends without saving.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [torch.empty_like(weight) for weight in weights]
    torch._foreach_copy_(before, weights)
    optimizer.step()
    bad = found_inf > 0
    for weight, old in zip(weights, before, strict=True):
        torch.where(bad, old, weight, out=weight)
