"""InfoNCE and SigLIP in blocks: the b x N logits exist a tile at a time and are recomputed in the
backward pass.

Beside the features and their gradients, memory is O(tile^2); values and gradients are those of the
dense forms in `losses.py`, which is where the equations are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tiled_info_nce(
    query: Tensor, keys: Tensor, scale: Tensor, first: int, label_smoothing: float, tile: int
) -> tuple[Tensor, Tensor]:
    """One direction of `losses.clip_loss`: 0-d loss and accuracy in percent of query [b,V,E] among
    keys [N,U,E].
    """
    rows = query.flatten(0, 1)
    labels = (first + torch.arange(len(query), device=query.device)).repeat_interleave(
        query.shape[1]
    )
    losses, accuracies = [], []
    for view in keys.unbind(1):
        log_sum, guess = TiledRows.apply(rows, view, scale, scale.new_zeros(()), "logsumexp", tile)
        target = scale * paired_products(query, view[first : first + len(query), None]).flatten()
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing * scale * (
                rows @ view.mean(0)
            ).float()
        losses.append((log_sum - target).mean())
        accuracies.append(100 * (guess == labels).float().mean())
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def tiled_sigmoid_loss(
    image: Tensor, all_text: Tensor, scale: Tensor, bias: Tensor, first: int, tile: int
) -> Tensor:
    """`losses.sigmoid_loss` of image [b,E] and all_text [N,E]."""
    total, _ = TiledRows.apply(image, all_text, scale, bias, "softplus", tile)
    own = scale * paired_products(image, all_text[first : first + len(image)]) + bias
    return (total - own).mean()


def paired_products(rows: Tensor, partners: Tensor) -> Tensor:
    """Inner products over the last axis in float32, rounded as a matrix product under autocast
    would round them.
    """
    device = rows.device.type
    if not torch.is_autocast_enabled(device):
        return (rows * partners).sum(-1).float()
    dtype = torch.get_autocast_dtype(device)
    return (rows.to(dtype).float() * partners.to(dtype).float()).sum(-1).to(dtype).float()


class TiledRows(torch.autograd.Function):
    """Each row's log-sum-exp, or sum of softplus, of the logits scale · rows keysᵀ + bias, tile x
    tile at a time.

    One workspace serves all blocks, so memory neither grows with the batch nor fragments. Matrix
    products run in autocast's type, where it is on, everything else in float32. Also returns each
    row's best key, int64.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, kind: str, tile: int):
        device = rows.device.type
        ctx.compute = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        )
        ctx.kind, ctx.tile = kind, tile
        value = rows.new_zeros(len(rows), dtype=torch.float32)
        top = torch.full_like(value, float("-inf"))
        guess = torch.zeros_like(value, dtype=torch.int64)
        total = torch.zeros_like(value)  # of exp(logit - top)
        with torch.autocast(device, enabled=False):
            for r, c, logits in logit_blocks(rows, keys, scale, bias, ctx.compute, tile):
                best, index = logits.max(1)
                torch.where(best > top[r], c.start + index, guess[r], out=guess[r])
                if kind == "softplus":
                    value[r] += F.softplus(logits).sum(1)
                    torch.maximum(top[r], best, out=top[r])
                    continue
                best = torch.maximum(top[r], best)
                total[r] *= (top[r] - best).exp_()
                total[r] += logits.sub_(best[:, None]).exp_().sum(1)
                top[r] = best
        if kind == "logsumexp":
            value = top + total.log()
        ctx.save_for_backward(rows, keys, scale, bias, value)
        ctx.mark_non_differentiable(guess)
        return value, guess

    @staticmethod
    def backward(ctx, grad: Tensor, _guess):
        rows, keys, scale, bias, value = ctx.saved_tensors
        d_rows, d_keys = (
            torch.zeros_like(rows),
            torch.zeros_like(keys),
        )  # without their factor `scale` yet
        d_bias = torch.zeros_like(bias)
        low_rows, low_keys = rows.to(ctx.compute), keys.to(ctx.compute)
        for r, c, logits in logit_blocks(rows, keys, scale, bias, ctx.compute, ctx.tile):
            probability = (
                logits.sub_(value[r, None]).exp_() if ctx.kind == "logsumexp" else logits.sigmoid_()
            )
            probability.mul_(grad[r, None])
            d_bias += probability.sum()
            probability = probability.to(ctx.compute)
            d_rows[r] += probability @ low_keys[c]
            d_keys[c] += probability.T @ low_rows[r]
        d_scale = torch.dot(
            d_rows.flatten(), rows.flatten()
        )  # in place from here on: these are the large tensors
        return d_rows.mul_(scale), d_keys.mul_(scale), d_scale.to(scale.dtype), d_bias, None, None


def logit_blocks(
    rows: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype, tile: int
):
    """(row slice, key slice, their logits in float32) for every block; the logits are overwritten
    by the next ones.
    """
    workspace = torch.empty(
        min(tile, len(rows)) * min(tile, len(keys)), dtype=dtype, device=rows.device
    )
    rows, keys = rows.to(dtype), keys.to(dtype)
    for i in range(0, len(rows), tile):
        r = slice(i, min(i + tile, len(rows)))
        for j in range(0, len(keys), tile):
            c = slice(j, min(j + tile, len(keys)))
            shape = r.stop - r.start, c.stop - c.start
            product = torch.mm(rows[r], keys[c].T, out=workspace[: shape[0] * shape[1]].view(shape))
            yield r, c, product.float().mul_(scale).add_(bias)
