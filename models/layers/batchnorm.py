"""Batch norms whose statistics are not those of a process's batch: of all processes, or of small
groups of samples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.distributed import all_reduce, gather, world_size
from base.errors import UserError


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """On several processes, every batch norm of `model` takes its statistics over all of them.

    In place; names stay. Call it before the optimizer and DistributedDataParallel are built. On one
    process nothing happens.
    """
    if world_size() == 1:
        return model
    replaced: dict[nn.Module, GlobalBatchNorm] = {}  # a norm with two names stays one
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                parent._modules[name] = replaced.setdefault(child, GlobalBatchNorm.like(child))
    return model


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all processes, as torch's SyncBatchNorm.

    One collective forward, one backward; the host never waits. Processes may have different numbers
    of rows, at least one each. timm's norms with dropout and activation behind keep both.
    """

    @classmethod
    def like(cls, norm: nn.Module) -> "GlobalBatchNorm":
        """A global norm with the parameters and buffers of a local one."""
        made = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device="meta",
        )
        made._parameters = norm._parameters
        made._buffers = norm._buffers
        made._modules = norm._modules
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,...] -> the same shape and dtype."""
        x = self.normalise(x)
        for name in ("drop", "act"):
            if name in self._modules:
                x = self._modules[name](x)
        return x

    def normalise(self, x: Tensor) -> Tensor:
        """The norm alone."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, variance, count = _GlobalNormalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, variance * (count / (count - 1).clamp(min=1)))
        return y

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions behind the channels."""

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


class _GlobalNormalise(torch.autograd.Function):
    """Normalisation by the mean and the variance over all processes; keeps the input alone.

    With n the values of a channel, g the gradient of y = w h + b and h = (x - mean) / std, the
    gradient of x is w / std (g - sum(g) / n - h sum(g h) / n): the sums are over all processes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        """x [B,C,...] -> y like x; without gradient mean [C], biased variance [C] and count [] of
        all processes."""
        mean, variance, count = global_statistics(x)
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(memory_format=_layout(x)),
            x,
            scale,
            mean,
            variance,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        sums = all_reduce(torch.stack([grad_weight, grad_bias]).to(mean.dtype))  # of g h and of g
        inverse_std = torch.rsqrt(variance + ctx.eps)
        slope = -scale * inverse_std.square() * sums[0] / count
        offset = -scale * inverse_std * sums[1] / count - slope * mean
        grad_x = direct + _affine(x, slope, offset)
        return (
            grad_x,
            None if weight is None else grad_weight,
            None if weight is None else grad_bias,
            None,
        )


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of values [] of the channels of x [B,C,...] over all
    processes; float32 (float64 of float64).

    Each process sends mean, sum of squared differences and count (Chan et al. 1979).
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(exact, dims, correction=0)
    channels = x.shape[1]
    own_count = x.numel() // channels
    row = torch.cat([mean, variance * own_count, mean.new_full((1,), own_count)])
    rows = gather(row[None])  # [P,2C+1] of all processes
    means, squares, counts = rows.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    between = counts * (means - mean).square()
    variance = (squares + between).sum(0) / count
    return mean, variance, count


def _layout(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """x * slope + offset by channel, like x: one kernel, float32 inside, that of evaluation."""
    mean = torch.zeros_like(slope)
    variance = torch.ones_like(slope)
    return F.batch_norm(x, mean, variance, slope, offset, training=False, eps=0.0)


class GhostBatchNorm(nn.Module):
    """Batch norm whose training statistics are those of `virtual_batch` samples in a row (Hoffer
    2017), as Keras'.

    One update a step: the running mean and variance follow the mean over groups of the group means
    and of the biased group variances. Statistics are of this process alone; `average_statistics`
    makes the running ones the mean over processes.

    virtual_batch: 0 = the whole batch of the process. `synchronise_batch_norm` leaves it alone.
    """

    def __init__(
        self, channels: int, virtual_batch: int = 16, eps: float = 1e-3, momentum: float = 0.01
    ):
        super().__init__()
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> the same shape; B is a multiple of the virtual batch (see
        virtual_batches). UserError where a group has one value of a channel: it has no variance."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        groups = 1 if self.virtual_batch == 0 else len(x) // self.virtual_batch
        count = x.numel() // (groups * len(self.weight))  # values of a channel in a group
        if count == 1:
            raise UserError(
                "a virtual batch of one image whose map is 1 x 1 has no variance: make "
                "virtual_batch_size or batch_size 2 or more, or image_size larger"
            )
        if groups > 1 and torch.compiler.is_compiling():
            y, mean, variance = self._normalise_groups(x.unflatten(0, (groups, -1)))
        else:
            mean, variance = self.running_mean.new_zeros(2, groups, len(self.weight))
            if groups > 1:
                y = _GhostNormalise.apply(x, self.weight, self.bias, mean, variance, self.eps)
            else:  # the running statistics that it writes are those of this batch
                y = F.batch_norm(
                    x, mean[0], variance[0], self.weight, self.bias, True, 1.0, self.eps
                )
        if torch.is_grad_enabled():  # a cached contrastive step runs once without and once with
            self._follow(mean, variance, count)
        return y

    def _normalise_groups(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[G,B/G,C,H,W] -> normalised [B,C,H,W]; mean and unbiased variance [G,C].

        For the compiler, which needs ten minutes for a B7 with a norm for each of the groups.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, (1, 3, 4), keepdim=True)
        count = x.numel() // mean.numel()
        slope = torch.rsqrt(variance * ((count - 1) / count) + self.eps)
        slope = slope * self.weight[:, None, None]
        y = (exact - mean) * slope + self.bias[:, None, None]
        return y.to(x.dtype).flatten(0, 1), mean[:, 0, :, 0, 0], variance[:, 0, :, 0, 0]

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """mean, unbiased variance [G,C] of `count` values each."""
        self.num_batches_tracked.add_(1)  # in place, which the compiler can trace
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(variance.mean(0) * ((count - 1) / count), self.momentum)


class _GhostNormalise(torch.autograd.Function):
    """Batch norm of each of G groups, written where it belongs: no copy joins the groups."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, eps: float
    ) -> Tensor:
        """x [B,C,H,W] -> the same shape; means and (unbiased) variances [G,C] are written."""
        y = torch.empty_like(x)
        saved_mean = torch.empty_like(means)
        inverse_std = torch.empty_like(means)
        groups = zip(x.chunk(len(means)), y.chunk(len(means)), strict=True)
        for i, (rows, target) in enumerate(groups):
            out = (target, saved_mean[i], inverse_std[i])
            torch.native_batch_norm(
                rows, weight, bias, means[i], variances[i], True, 1.0, eps, out=out
            )
        ctx.save_for_backward(x, weight, saved_mean, inverse_std)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, saved_mean, inverse_std = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(x))
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty_like(saved_mean)
        grad_bias = torch.empty_like(saved_mean)
        parts = [tensor.chunk(len(saved_mean)) for tensor in (x, grad, grad_x)]
        for i, (rows, grad_rows, target) in enumerate(zip(*parts, strict=True)):
            torch.ops.aten.native_batch_norm_backward.out(
                grad_rows,
                rows,
                weight,
                None,
                None,
                saved_mean[i],
                inverse_std[i],
                True,
                ctx.eps,
                [True, True, True],
                out0=target,
                out1=grad_weight[i],
                out2=grad_bias[i],
            )
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, None


def virtual_batches(rows: int, size: int) -> int:
    """Number of virtual batches of `size` (0: all) in a batch. Raises UserError where it does not
    come out even."""
    if size and rows % size:
        raise UserError(
            f"a batch of {rows} a process does not divide into virtual batches of {size}: make "
            f"batch_size a multiple of {size}, or set virtual_batch_size to a divisor of {rows} (0 = "
            "the whole batch)"
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
