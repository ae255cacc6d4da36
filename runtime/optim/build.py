"""Parameter groups, the optimizer over them, and one of its steps under any precision."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from base import distributed
from base.errors import UserError
from base.knobs import knob
from base.libraries import POSITION_TABLES, without_decay
from base.names import did_you_mean
from runtime.optim.keras import KerasAdamW, KerasSGD
from runtime.optim.lamb import Lamb
from runtime.optim.layer_decay import layer_scales
from runtime.optim.muon import MuonAdamW, is_hidden_matrix
from runtime.optim.rows import RowsAdamW, rows_in_training
from runtime.optim.timm_optimizers import PREFIX, build_timm, is_of_timm, step_or_leave

NOT_DECAYED = (
    "cls_token",
    "pos_embed",
    "positional_embedding",
    "mask_token",
    "temp",
    "logit_scale",
    "logit_bias",
    "embeddings.",
    *POSITION_TABLES,
)
OPTIMIZERS = ("adamw", "adamW", "sgd", "lamb", "muon")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # dtypes of autocast


@dataclass
class Optimizer:
    """AdamW, SGD, LAMB, Muon, or one of timm's."""

    opt: str = knob("adamw", "adamw, sgd, lamb, muon (AdamW for all but matrices) or timm/NAME")
    lr: float = knob(
        1e-4,
        "peak learning rate, absolute (not scaled by the batch)",
        low=0,
        aliases=("learning_rate",),
    )
    weight_decay: float = knob(
        0.02, "weight decay of matrices, decoupled but in sgd", low=0, aliases=("wd",)
    )
    betas: tuple[float, float] = knob(
        (0.9, 0.999), "decay rates of Adam's two moments", low=0, high=0.999999
    )
    eps: float = knob(1e-8, "Adam's epsilon", low=0, rare=True)
    momentum: float = knob(0.9, "momentum of SGD", low=0, high=1, rare=True)
    clip_grad_norm: float | None = knob(
        None, "largest global gradient norm (L2); none or 0 = no clipping", low=0
    )
    keras: bool = knob(
        False,
        "Keras' arithmetic: learning rate in SGD's velocity, epsilon outside Adam's correction",
        rare=True,
    )
    scalar_lr_scale: float = knob(
        1.0, "learning rate of scalars (temperatures) as a multiple of lr", low=0, rare=True
    )
    lr_scales: list[str] = knob(
        [],
        "NAME=FACTOR each: parameters whose names begin with NAME, or the towers image and text of "
        "a dual encoder, learn at FACTOR times lr",
        rare=True,
    )
    layer_decay: float | None = knob(
        None,
        "learning rate of each block as a multiple of that of the block above (BEiT, MAE); none = "
        "1",
        low=0,
        high=1,
        rare=True,
    )
    decay_everything: bool = knob(
        False,
        "as the originals: also decay temperature, [CLS], mask and position embeddings and "
        "embedding tables",
        rare=True,
    )

    def __post_init__(self):
        if self.opt not in OPTIMIZERS and not is_of_timm(self.opt):
            names = [*OPTIMIZERS, f"{PREFIX}NAME"]
            raise UserError(
                f"optimizer.opt {self.opt!r} is unknown{did_you_mean(self.opt, names) or '.'} "
                f"Known: {', '.join(names)}"
            )
        if self.keras and self.opt.lower() not in ("adamw", "sgd"):
            raise UserError(
                f"optimizer.keras is the arithmetic of sgd and adamw, not of {self.opt}: set it to false"
            )


def parameter_groups(
    model: nn.Module, config: Optimizer, decayed: Collection[str] | None = None
) -> list[dict]:
    """Groups in the originals' order: without weight decay, then with it. Tied parameters appear
    once.

    Not decayed: biases and vectors (layer norms); unless `decay_everything`, also tokens,
    embeddings, tables of positions, temperatures, what timm lists, and tables of which the network
    trains some rows alone: the others are to stay as they are. With a `scalar_lr_scale`
    scalars form groups of their own, and so do the parameters that `lr_scales` names. decayed: names
    of the parameters with weight decay; if given, that group comes first, as in CLIP-rocket.
    """
    groups = {}
    scales = named_scales(model, config.lr_scales)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = layer_scales(trained, config.layer_decay) if config.layer_decay is not None else {}
    listed = without_decay(model) | {*getattr(model, "rows_in_training", ())}
    for name, parameter in trained.items():
        if decayed is not None:
            decays = name in decayed
        else:
            is_token = name in listed or any(part in name for part in NOT_DECAYED)
            is_free = parameter.ndim == 1 or name.endswith(".bias")
            decays = not (is_free or (is_token and not config.decay_everything))
        decay = config.weight_decay if decays else 0.0
        scale = config.scalar_lr_scale if parameter.ndim == 0 else layers.get(name, 1.0)
        scale *= math.prod(factor for start, factor in scales.items() if name.startswith(start))
        is_muon = config.opt == "muon" and is_hidden_matrix(name, parameter)
        # fused kernels take no mixture of sharded and whole parameters (scalars under FSDP2)
        key = (decay, scale, is_sharded(parameter), is_muon)
        groups.setdefault(key, []).append(parameter)
    found = []
    decayed_first = decayed is not None
    for key in sorted(groups, key=lambda key: (-key[0] if decayed_first else key[0], -key[1])):
        decay, scale, _, is_muon = key
        group = {"params": groups[key], "weight_decay": decay, "lr_scale": scale}
        if config.opt == "muon":
            group["muon"] = is_muon
        found.append(group)
    return found


def named_scales(model: nn.Module, written: Iterable[str]) -> dict[str, float]:
    """`lr_scales` as beginnings of names and their factors; UserError for one that is no number or
    names nothing.

    A dual encoder's `towers` (name -> beginnings of the tower's parameters) can be named, too."""
    scales = {}
    towers = getattr(model, "towers", {})
    names = [name for name, _ in model.named_parameters()]
    for entry in written:
        start, _, factor = entry.partition("=")
        try:
            scale = float(factor)
        except ValueError:
            scale = -1.0
        if not 0 <= scale < math.inf:
            raise UserError(f"lr_scales: {entry!r} is not NAME=FACTOR, such as text_model=0.1")
        starts = towers.get(start, (start,))
        if not any(name.startswith(starts) for name in names):
            parts = ", ".join(dict.fromkeys([*towers, *(name.split(".")[0] for name in names)]))
            raise UserError(
                f"lr_scales: no parameter's name begins with {start!r}; this model has {parts}"
            )
        scales |= dict.fromkeys(starts, scale)
    return scales


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is FSDP2's DTensor, found without importing torch.distributed.tensor, which takes
    half a second."""
    return hasattr(tensor, "full_tensor")


def by_kind(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Lists of tensors that one fused kernel can take: sharded ones apart from whole ones."""
    kinds: dict[bool, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(is_sharded(tensor), []).append(tensor)
    return list(kinds.values())


def build_optimizer(
    model: nn.Module, config: Optimizer, decayed: Collection[str] | None = None
) -> torch.optim.Optimizer:
    """Optimizer over the trainable parameters of `model`; call after it is wrapped, since wrappers
    may replace parameters.

    decayed: see parameter_groups; names here and in `lr_scales` are those of the network without
    its wrapper.
    """
    groups = parameter_groups(distributed.unwrap(model), config, decayed)
    if not groups:
        raise UserError(
            "nothing is left to train: every parameter is locked or frozen; leave a tower unlocked, "
            "or evaluate instead"
        )
    if config.opt == "muon" or is_of_timm(config.opt):
        return _whole_tensor_optimizer(model, groups, config)
    if config.opt == "lamb":
        return Lamb(groups, config.lr, config.betas, config.eps)
    sgd, adamw = (KerasSGD, KerasAdamW) if config.keras else (torch.optim.SGD, torch.optim.AdamW)
    if config.opt == "sgd":
        if any(is_sharded(p) for p in model.parameters()):
            raise UserError(
                "--optimizer.opt sgd: torch has no fused kernel for sharded parameters; use "
                "--parallel ddp"
            )
        return sgd(groups, config.lr, momentum=config.momentum, fused=True)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    rows = rows_in_training(distributed.unwrap(model), groups)
    if rows and not config.keras and not any(is_sharded(table) for table in rows):
        return RowsAdamW(groups, rows, **options)
    return adamw(groups, **options)


def _whole_tensor_optimizer(
    model: nn.Module, groups: list[dict], config: Optimizer
) -> torch.optim.Optimizer:
    """Muon, or timm's: they see whole tensors. UserError for sharded ones."""
    if any(is_sharded(p) for p in model.parameters()):
        raise UserError(
            f"--optimizer.opt {config.opt} needs whole tensors, and fsdp shards them; use --parallel "
            "ddp, or adamw or lamb"
        )
    if config.opt == "muon":
        return MuonAdamW(groups, config.lr, config.betas, config.eps)
    options = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "betas": tuple(config.betas),
        "eps": config.eps,
    }
    return build_timm(groups, config.opt, options)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the learning rate `value`, times the group's own `lr_scale` where it has
    one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


class NonFinite(UserError):
    """The loss or its gradient became NaN or infinite; the weights are those before that step."""


class LossScaler(torch.amp.GradScaler):
    """torch's, also where some parameters are sharded and others, as temperatures, are whole."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        """As torch's, for each kind by itself; where one is not finite says `found_inf` on all."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        found: dict[torch.device, torch.Tensor] = {}
        for part in by_kind(weights):
            group = SimpleNamespace(param_groups=[{"params": part}])
            flags = super()._unscale_grads_(group, inv_scale, found_inf, allow_fp16)
            for device, flag in flags.items():
                found[device] = torch.maximum(flag, found.get(device, flag))
        return found


class Precision:
    """Autocast, loss scaling and the update, for `fp32`, `bf16` and `fp16`.

    with precision.autocast():            # forward in the chosen type, parameters stay fp32
        losses = model(**batch)
    precision.backward(loss)
    grad_norm = precision.step(optimizer, parameters)      # 0-d tensor, no host sync

    A step whose gradient is not finite is skipped on the device, and so is every later one, until
    `check` reads the flag at a log point and raises: NaN never reaches the weights, and no step
    waits for the host. With fp16, where loss scaling skips a step now and then, the flag looks at
    the loss instead.
    """

    def __init__(self, precision: str, device: torch.device, clip: float | None = None):
        if precision == "fp16" and device.type != "cuda":
            raise UserError("--precision fp16 needs a CUDA device; on the CPU use fp32 or bf16")
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError("--precision bf16: this GPU has no bfloat16; use fp16 or fp32")
        self.dtype = PRECISIONS[precision]
        self.device = device
        self.clip = clip or None  # a norm of 0 would leave nothing of any gradient
        self.scaler = LossScaler(device.type, enabled=precision == "fp16")
        self.found_inf = torch.zeros((), device=device)  # sticky: 1 from the first bad step on
        self.good_steps = torch.zeros((), device=device)
        if device.type == "cuda":
            distributed.allow_tf32(precision != "fp32")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of the (scaled) loss."""
        if self.scaler.is_enabled():
            self.found_inf = torch.maximum(self.found_inf, (~loss.detach().isfinite()).float())
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        """Unscale, clip, update, clear. Returns the gradient norm before clipping, a 0-d tensor on
        the device."""
        self.scaler.unscale_(optimizer)
        with_grad = [p for p in parameters if p.grad is not None]
        norm = total_norm([p.grad for p in with_grad], self.device)
        if self.clip is not None:
            for part in by_kind(with_grad):
                torch.nn.utils.clip_grads_with_norm_(part, self.clip, norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.found_inf = torch.maximum(self.found_inf, (~norm.isfinite()).float())
            if getattr(optimizer, "knows_no_found_inf", False):
                step_or_leave(optimizer, self.found_inf)
            else:  # our optimizers and fused kernels leave the weights alone where it is 1
                optimizer.found_inf = self.found_inf
                optimizer.step()
        self.good_steps += 1 - self.found_inf
        optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self, first_step: int, remedy: str = "") -> None:
        """Raise NonFinite if a step since `first_step` (of this process) was bad. One host sync:
        call at log points."""
        if self.found_inf.item():
            step = first_step + int(self.good_steps.item()) + 1
            raise NonFinite(
                f"the loss or its gradient is not finite at step {step}; nothing was updated. {remedy}"
            )

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.scaler.load_state_dict(state)


def total_norm(grads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """L2 norm over all gradients as a 0-d tensor on the device, where offloaded gradients are not;
    sharded (FSDP2) ones are reduced over the processes."""
    norms = [torch.nn.utils.get_total_norm(part, foreach=True) for part in by_kind(grads)]
    norms = [n.full_tensor() if is_sharded(n) else n for n in norms]
    return torch.stack([n.to(device, non_blocking=True) for n in norms]).norm()
