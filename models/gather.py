"""What a loss needs from the other ranks. Every function is the identity on one process.

Gradients follow the convention of data parallelism: each rank's loss is the mean over its own samples and the wrapper
averages gradients over ranks, which together is the gradient of the mean over the global batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[B,...] of every rank -> [world*B,...] in rank order, without gradient; B must be the same on all ranks."""
    if world_size() == 1:
        return x.detach()
    everyone = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.detach().contiguous())
    return everyone


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradient; the input stays as it is."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


class _GatherWithGradient(torch.autograd.Function):
    """all_gather whose backward sums the ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if dist.get_backend() == "nccl":
            own = grad.new_empty(ctx.rows, *grad.shape[1:])
            dist.reduce_scatter_tensor(own, grad)
            return own
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.rows, ctx.rows)


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`, and every rank's loss sends its gradient back to the rank whose rows it used."""
    return x if world_size() == 1 else _GatherWithGradient.apply(x)
