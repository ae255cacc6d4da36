"""Batch norm over other sets than the batch of a process: over all processes' (on any device), over
small groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.distributed import all_reduce, all_reduce_with_gradient, world_size
from base.errors import UserError


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """On several processes, every batch norm of `model` takes its statistics over all of them;
    names stay. In place.

    GPUs get torch's SyncBatchNorm, other devices the one below. Call it after the model is on its
    device and before DistributedDataParallel. On one process nothing happens.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        for kind, replacement in (
            (nn.BatchNorm1d, GlobalBatchNorm1d),
            (nn.BatchNorm2d, GlobalBatchNorm2d),
        ):
            if isinstance(module, kind):
                module.__class__ = (
                    replacement  # the same object, so that a head with two names stays one
                )
    return model


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all processes; equal numbers of rows on
    each."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,...] -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world_size()
        mean = all_reduce_with_gradient(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = all_reduce_with_gradient(centred.square().sum(dims)) / count
        self._follow(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        return (
            scaled
            if self.weight is None
            else scaled * self.weight.view(shape) + self.bias.view(shape)
        )

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class GlobalBatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d):
    """For [B,C]."""


class GlobalBatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d):
    """For [B,C,H,W]."""


class GhostBatchNorm(nn.Module):
    """Batch norm whose training statistics are those of `virtual_batch` samples in a row (Hoffer
    2017), as Keras'.

    One update a step: the running mean and variance follow the mean over groups of the group means
    and of the biased group variances. Statistics are of this process alone; `average_statistics`
    makes the running ones the mean over processes.

    virtual_batch: 0 = the whole batch of the process. Neither torch's SyncBatchNorm nor ours
    replaces it.
    """

    def __init__(
        self, channels: int, virtual_batch: int = 16, eps: float = 1e-3, momentum: float = 0.01
    ):
        super().__init__()
        self.virtual_batch, self.eps, self.momentum = virtual_batch, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> the same shape; B is a multiple of the virtual batch (see
        virtual_batches)."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        alone = self.virtual_batch in (0, len(x))
        groups = (x,) if alone else x.split(self.virtual_batch)
        mean, variance = self.running_mean.new_zeros(2, len(groups), len(self.weight))
        parts = [
            F.batch_norm(
                group, *running, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
            )
            for group, *running in zip(groups, mean, variance, strict=True)
        ]
        if torch.is_grad_enabled():  # activation checkpointing runs once without and once with
            self._follow(mean, variance, groups[0].numel() // len(self.weight))
        return parts[0] if alone else torch.cat(parts)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """mean, unbiased variance [G,C] of `count` values each."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(variance.mean(0) * ((count - 1) / count), self.momentum)


def virtual_batches(rows: int, size: int) -> int:
    """Number of virtual batches of `size` (0: all) in a batch. Raises UserError where it does not
    come out even."""
    if size and rows % size:
        raise UserError(
            f"a batch of {rows} a process does not divide into virtual batches of {size}: make batch_size a multiple "
            f"of {size}, or set virtual_batch_size to a divisor of {rows} (0 = the whole batch)"
        )
    return rows // size if size else 1


def deal(x: Tensor, hands: int) -> Tensor:
    """[B,...] -> the same rows, those whose number is 0 modulo `hands` first, then 1 and so on.
    `collect` undoes it."""
    return x if hands == 1 else x.unflatten(0, (-1, hands)).transpose(0, 1).flatten(0, 1)


def collect(x: Tensor, hands: int) -> Tensor:
    """Inverse of `deal`."""
    return x if hands == 1 else x.unflatten(0, (hands, -1)).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Running statistics of ghost batch norms become their mean over processes, in one collective;
    all must call it.

    Following the batches is linear, so that it does not matter how often this is done.
    """
    if world_size() == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, GhostBatchNorm)]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    means = all_reduce(torch.cat(buffers), "mean").split([len(buffer) for buffer in buffers])
    torch._foreach_copy_(buffers, list(means))
