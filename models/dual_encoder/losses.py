"""Losses of dual encoders as pure functions: InfoNCE over views, SigLIP, SimCLR, Barlow Twins,
SimSiam / BYOL, SwAV.

Conventions. Features carry the sample axis first: own features [b,V,D] hold V views of the b pairs
of this process, `everyone` is the same for all N pairs of the global batch in rank order
(`base.distributed`), and `first` is the row of this process' first pair in it. Each process returns
the loss of its own rows; the mean over processes is the loss of the global batch, and with a gather
that passes gradients (its backward sums over the processes) DDP's mean of the gradients is the
gradient of that loss. Nothing here normalises unless it says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import all_reduce, gather


def normalize(features: Tensor) -> Tensor:
    """Unit length along the last axis (floor 1e-12)."""
    return F.normalize(features, dim=-1)


def info_nce(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    first: int = 0,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding one's own partner among all keys, averaged over every pair of views
    (van den Oord 2018).

    query [b,V,E] and keys [N,U,E] of unit length, scale 0-d; row i's partner is key `first + i`, in
    each key view.
    With `tile` the logits exist only in blocks of `tile` x `tile` and are computed anew in the
    backward pass: beside the features and their gradients, memory is O(tile²) instead of O(b N V
    U); same value and gradients.
    Returns the 0-d loss and the 0-d top-1 accuracy in percent.
    """
    b, views, _ = query.shape
    total, key_views, _ = keys.shape
    labels = (first + torch.arange(b, device=query.device)).repeat_interleave(views)
    if tile is not None:
        each = [
            _tiled_info_nce(query, view, scale, first, labels, label_smoothing, tile)
            for view in keys.unbind(1)
        ]
        return tuple(torch.stack(part).mean() for part in zip(*each, strict=True))
    columns = keys.transpose(0, 1).reshape(key_views * total, -1)
    logits = (scale * (query.flatten(0, 1) @ columns.T)).view(-1, total)  # [bVU,N]
    labels = labels.repeat_interleave(key_views)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing), accuracy(
        logits, labels
    )


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy in percent as a 0-d tensor; logits [B,N], labels int64 [B]."""
    return 100 * (logits.detach().argmax(1) == labels).float().mean()


def _tiled_info_nce(
    query, keys, scale, first, labels, label_smoothing, tile
) -> tuple[Tensor, Tensor]:
    """`info_nce` of query [b,V,E] and one key view [N,E], whose logits are only ever seen in
    blocks."""
    rows = query.flatten(0, 1)
    log_sum, guess = _TiledRows.apply(rows, keys, scale, scale.new_zeros(()), "logsumexp", tile)
    target = scale * _products(query, keys[first : first + len(query), None]).flatten()
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * scale * (
            rows @ keys.mean(0)
        ).float()
    return (log_sum - target).mean(), 100 * (guess == labels).float().mean()


def _products(rows: Tensor, partners: Tensor) -> Tensor:
    """Inner products over the last axis in float32, rounded as a matrix product under autocast
    would round them."""
    device = rows.device.type
    if not torch.is_autocast_enabled(device):
        return (rows * partners).sum(-1).float()
    dtype = torch.get_autocast_dtype(device)
    return (rows.to(dtype).float() * partners.to(dtype).float()).sum(-1).to(dtype).float()


class _TiledRows(torch.autograd.Function):
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
            for r, c, logits in _blocks(rows, keys, scale, bias, ctx.compute, tile):
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
        for r, c, logits in _blocks(rows, keys, scale, bias, ctx.compute, ctx.tile):
            share = (
                logits.sub_(value[r, None]).exp_() if ctx.kind == "logsumexp" else logits.sigmoid_()
            )
            share.mul_(grad[r, None])
            d_bias += share.sum()
            share = share.to(ctx.compute)
            d_rows[r] += share @ low_keys[c]
            d_keys[c] += share.T @ low_rows[r]
        d_scale = torch.dot(
            d_rows.flatten(), rows.flatten()
        )  # in place from here on: these are the large tensors
        return d_rows.mul_(scale), d_keys.mul_(scale), d_scale.to(scale.dtype), d_bias, None, None


def _blocks(rows: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype, tile: int):
    """(row slice, key slice, their logits in float32) for every block; the logits are overwritten
    by the next ones."""
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


def matched_views(
    image: Tensor,
    text: Tensor,
    everyone_image: Tensor,
    everyone_text: Tensor,
    scale: Tensor,
    first: int,
    **options,
) -> dict[str, Tensor]:
    """InfoNCE both ways over all pairs of views: `loss_image`, `loss_text`, `acc_image`, `acc_text`
    (0-d each).

    image [b,V,E], text [b,U,E] and everyone's [N,V,E], [N,U,E], unit length; `options` as in
    `info_nce`.
    """
    loss_image, acc_image = info_nce(image, everyone_text, scale, first, **options)
    loss_text, acc_text = info_nce(text, everyone_image, scale, first, **options)
    return {
        "loss_image": loss_image,
        "loss_text": loss_text,
        "acc_image": acc_image,
        "acc_text": acc_text,
    }


def sigmoid_pairs(
    image: Tensor,
    everyone_text: Tensor,
    scale: Tensor,
    bias: Tensor,
    first: int = 0,
    tile: int | None = None,
) -> Tensor:
    """SigLIP (Zhai 2023): every image-text pair is a yes/no question; sum over texts, mean over own
    images, 0-d.

    image [b,E], everyone_text [N,E] of unit length; scale and bias 0-d. `tile` as in `info_nce`.
    With logits z the sum is Σ_j softplus(z_ij) - z of the own partner, since softplus(-z) =
    softplus(z) - z.
    """
    if tile is None:
        logits = (scale * (image @ everyone_text.T) + bias).float()
        return (F.softplus(logits).sum(1) - logits.diagonal(first)).mean()
    total, _ = _TiledRows.apply(image, everyone_text, scale, bias, "softplus", tile)
    own = scale * _products(image, everyone_text[first : first + len(image)]) + bias
    return (total - own).mean()


def simclr(
    a: Tensor, b: Tensor, everyone_a: Tensor, everyone_b: Tensor, temperature: float, first: int = 0
):
    """SimCLR (Chen 2020) with local queries: two augmentations attract, all other images of either
    view repel.

    a, b [B,D] and everyone's [N,D], unit length. Returns the 0-d loss and the top-1 accuracy in
    percent of a's rows.
    """
    rows = torch.arange(len(a), device=a.device)
    labels = first + rows
    itself = F.one_hot(labels, len(everyone_a)) * 1e9

    def logits(own, everyone, other):
        return torch.cat([own @ other.T / temperature, own @ everyone.T / temperature - itself], 1)

    from_a, from_b = logits(a, everyone_a, everyone_b), logits(b, everyone_b, everyone_a)
    return (F.cross_entropy(from_a, labels) + F.cross_entropy(from_b, labels)) / 2, accuracy(
        from_a, labels
    )


def barlow_twins(
    image: Tensor,
    text: Tensor,
    everyone_image: Tensor,
    everyone_text: Tensor,
    lamb: float,
    scale_loss: float,
) -> Tensor:
    """Barlow Twins (Zbontar 2021) between modalities: cross-correlation K of each pair of views
    driven to the identity.

    scale_loss · [Σ (K_ii - 1)² + lamb Σ_{i≠j} K_ij²], K = imageᵀ text / N over the global batch,
    summed over all V·U pairs of views of image [b,V,D] and text [b,U,D]; everyone's are [N,V,D],
    [N,U,D]. 0-d, float32 whatever the autocast.

    K, D x D (8192²), is never formed: N² ‖K‖² = Σ_ij ⟨image_i, image_j⟩⟨text_i, text_j⟩, of which
    each process computes its own rows i, O(b N D) per view. The value is that of the global batch
    on every process.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, everyone_image, everyone_text = (
            x.float().transpose(0, 1) for x in (image, text, everyone_image, everyone_text)
        )
        b, total = image.shape[1], everyone_image.shape[1]
        gram_image = image @ everyone_image.transpose(1, 2)  # [V,b,N]
        gram_text = text @ everyone_text.transpose(1, 2)
        # own rows count N/b fold, so that the mean over processes is the sum over all rows
        squares = torch.einsum("vbn,ubn->", gram_image, gram_text) / (b * total)
        squares = squares + (all_reduce(squares, "mean") - squares).detach()
        diagonal = torch.einsum("vnd,und->vud", everyone_image, everyone_text) / total
        off_diagonal = squares - diagonal.square().sum()
        return scale_loss * ((diagonal - 1).square().sum() + lamb * off_diagonal)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """SimSiam / BYOL (Chen 2021, Grill 2020): Σ over all pairs of views of 2 - 2 mean_b
    cos(prediction, target), 0-d.

    prediction [B,V,D], target [B,U,D] (no gradient flows into it). The sum of cosines over pairs of
    views is the cosine sum of summed unit vectors, so nothing of size V·U arises.
    """
    predictions, targets = normalize(prediction).sum(1), normalize(target.detach()).sum(1)
    pairs = prediction.shape[1] * target.shape[1]
    return 2 * pairs - 2 * (predictions * targets).sum(-1).mean()


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Balanced soft assignments (Caron 2020): [..., b, K] scores -> [..., b, K], each sample's row
    sums to 1.

    `iterations` >= 1 times every prototype is given the same mass over the global batch, then every
    sample. Carried out on logarithms, so that no temperature makes a row vanish or overflow; the
    number of samples is the same on all ranks.
    """
    log_assignment = scores.float() / epsilon
    for _ in range(iterations):
        own_mass = log_assignment.logsumexp(-2, keepdim=True)
        log_assignment = log_assignment - gather(own_mass[None]).logsumexp(0)
        log_assignment = log_assignment.log_softmax(-1)
    return log_assignment.exp()


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all rows of -Σ_k target log softmax(logits); [...,K] each, 0-d."""
    return -(target * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def swapped_assignments(
    image: Tensor,
    text: Tensor,
    everyone_image: Tensor,
    everyone_text: Tensor,
    scale: Tensor,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """SwALIP: the other modality's gathered batch plays the prototypes, and each pair of views
    predicts the next one's.

    image, text [b,A,E], everyone's [N,A,E], unit length. The assignment that views (a, c) must
    predict comes from (a+1, c+1) modulo A, i.e. for A = 2 from the other two views. 0-d.
    """

    def one_way(own, everyone):
        scores = (
            own.transpose(0, 1)[:, None] @ everyone.transpose(0, 1).transpose(1, 2)[None]
        )  # [A,A,b,N]
        target = sinkhorn(scores, epsilon, iterations).roll((-1, -1), (0, 1))
        return soft_cross_entropy(scale * scores, target)

    return (one_way(image, everyone_text) + one_way(text, everyone_image)) / 2
