"""Batch norm over the global batch on any device: torch's SyncBatchNorm knows GPUs only."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.gather import world_size


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """On several processes, every batch norm of `model` takes its statistics over all of them; names stay. In place.

    GPUs get torch's SyncBatchNorm, other devices the one below. Call it after the model is on its device and before
    DistributedDataParallel. On one process nothing happens.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        for kind, replacement in ((nn.BatchNorm1d, GlobalBatchNorm1d), (nn.BatchNorm2d, GlobalBatchNorm2d)):
            if isinstance(module, kind):
                module.__class__ = replacement  # the same object, so that a head with two names stays one
    return model


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all processes; equal numbers of rows on each."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,...] -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world_size()
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        self._follow(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        return scaled if self.weight is None else scaled * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class GlobalBatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d):
    """For [B,C]."""


class GlobalBatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d):
    """For [B,C,H,W]."""


class _Sum(torch.autograd.Function):
    """Sum over processes, of the values forward and of the gradients backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
