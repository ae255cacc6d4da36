"""Optimizers of timm by name: `timm/lion`, `timm/nadamw`, …"""

from base.errors import UserError
from base.files import did_you_mean

PREFIX = "timm/"


def is_of_timm(opt: str) -> bool:
    return opt.startswith(PREFIX)


def build_timm(groups: list[dict], opt: str, options: dict):
    """timm's optimizer over parameter groups, with those of the options lr, weight_decay, momentum,
    betas and eps that it has.

    Its step waits for the host where an update is not finite, since it knows no `found_inf`.
    UserError for a name that timm does not know.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name, known = opt.removeprefix(PREFIX).lower(), list_optimizers()
    if name not in known:
        hint = did_you_mean(name, known) or " Known are " + ", ".join(known)
        raise UserError(f"optimizer.opt {opt}: timm has no such optimizer{hint}")
    about = get_optimizer_info(name)
    given = dict(options)
    for option in ("momentum", "betas", "eps"):
        if not getattr(about, f"has_{option}"):
            given.pop(option)
    try:
        optimizer = create_optimizer_v2(groups, opt=name, filter_bias_and_bn=False, **given)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"optimizer.opt {opt}: it needs a package that is not here ({error})"
        ) from None
    optimizer.leaves_out_on_host = True
    return optimizer
