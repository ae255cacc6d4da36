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
    losses = []
    accuracies = []
    for rows in query.unbind(1):
        for view in keys.unbind(1):
            log_sum, guess, _, _ = TiledLogSumExp.apply(rows, view, scale, tile, False)
            target = targets(rows, view, scale, first, label_smoothing)
            losses.append((log_sum - target).mean())
            accuracies.append(hits(guess, first))
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def tiled_info_nce_both(
    image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both directions where one process holds all pairs: loss_image, loss_text, acc_image and
    acc_text of `losses.clip_loss`, 0-d, of image [N,V,E] and text [N,U,E].

    The texts' logits are the images' transposed, so this takes half the matrix products.
    """
    results = []
    for images in image.unbind(1):
        for texts in text.unbind(1):
            by_image, text_guess, by_text, image_guess = TiledLogSumExp.apply(
                images, texts, scale, tile, True
            )
            loss_image = by_image - targets(images, texts, scale, 0, label_smoothing)
            loss_text = by_text - targets(texts, images, scale, 0, label_smoothing)
            acc_image = hits(text_guess, 0)
            acc_text = hits(image_guess, 0)
            found = [loss_image.mean(), loss_text.mean(), acc_image, acc_text]
            results.append(torch.stack(found))
    return torch.stack(results).mean(0).unbind()


def targets(
    rows: Tensor, keys: Tensor, scale: Tensor, first: int, label_smoothing: float
) -> Tensor:
    """Each row's logit of its own key, [b]; with label smoothing mixed with its mean logit."""
    own = scale * paired_products(rows, keys[first : first + len(rows)])
    if not label_smoothing:
        return own
    mean = scale * (rows @ keys.mean(0)).float()
    return (1 - label_smoothing) * own + label_smoothing * mean


def hits(guess: Tensor, first: int) -> Tensor:
    """Percent of rows whose best key, `guess` [b], is their own, 0-d."""
    labels = first + torch.arange(len(guess), device=guess.device)
    return 100 * (guess == labels).float().mean()


def tiled_sigmoid_loss(
    image: Tensor, all_text: Tensor, scale: Tensor, bias: Tensor, first: int, tile: int
) -> Tensor:
    """`losses.sigmoid_loss` of image [b,E] and all_text [N,E]."""
    total = TiledSoftplus.apply(image, all_text, scale, bias, tile)
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
    products = rows.to(dtype).float() * partners.to(dtype).float()
    return products.sum(-1).to(dtype).float()


class TiledLogSumExp(torch.autograd.Function):
    """Log-sum-exp of each row of the logits scale · rows keysᵀ, tile x tile at a time, and each
    row's best key, int64; then, with `both`, the same of each column (else two empty tensors).

    Memory neither grows with the batch nor fragments: three workspaces serve all blocks. Matrix
    products run in autocast's type, where it is on, everything else in float32.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, scale: Tensor, tile: int, both: bool):
        ctx.compute = matmul_type(rows)
        ctx.tile = tile
        ctx.both = both
        by_row = RunningLogSumExp(len(rows), rows.device)
        by_column = RunningLogSumExp(len(keys) if both else 0, rows.device)
        blocks = LogitBlocks(rows, keys, scale, ctx.compute, tile)
        with torch.autocast(rows.device.type, enabled=False):
            for r, c in blocks.places:
                logits, spare = blocks.at(r, c)
                by_row.add(r, c.start, logits, spare, dim=1)
                if both:
                    by_column.add(c, r.start, logits, spare, dim=0)
        row_sums = by_row.value()
        column_sums = by_column.value()
        ctx.save_for_backward(rows, keys, scale, row_sums, column_sums)
        ctx.mark_non_differentiable(by_row.best, by_column.best)
        return row_sums, by_row.best, column_sums, by_column.best

    @staticmethod
    def backward(ctx, d_row: Tensor, _row_best, d_column: Tensor, _column_best):
        rows, keys, scale, row_sums, column_sums = ctx.saved_tensors
        gradients = FeatureGradients(rows, keys, scale, ctx.compute)
        blocks = LogitBlocks(rows, keys, scale, ctx.compute, ctx.tile)
        with torch.autocast(rows.device.type, enabled=False):
            for r, c in blocks.places:
                logits, spare = blocks.at(r, c)
                softmax = torch.sub(logits, row_sums[r, None], out=spare).exp_()
                d_logits = softmax.mul_(d_row[r, None])
                if ctx.both:
                    softmax = logits.sub_(column_sums[c]).exp_()
                    d_logits += softmax.mul_(d_column[c])
                gradients.add(r, c, d_logits)
        return *gradients.value(), None, None


class TiledSoftplus(torch.autograd.Function):
    """Sum of softplus over each row of the logits scale · rows keysᵀ + bias; memory and types as in
    `TiledLogSumExp`.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, tile: int):
        ctx.compute = matmul_type(rows)
        ctx.tile = tile
        value = rows.new_zeros(len(rows), dtype=torch.float32)
        blocks = LogitBlocks(rows, keys, scale, ctx.compute, tile)
        with torch.autocast(rows.device.type, enabled=False):
            for r, c in blocks.places:
                logits, _ = blocks.at(r, c)
                value[r] += F.softplus(logits.add_(bias)).sum(1)
        ctx.save_for_backward(rows, keys, scale, bias)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, keys, scale, bias = ctx.saved_tensors
        gradients = FeatureGradients(rows, keys, scale, ctx.compute)
        d_bias = torch.zeros_like(bias)
        blocks = LogitBlocks(rows, keys, scale, ctx.compute, ctx.tile)
        with torch.autocast(rows.device.type, enabled=False):
            for r, c in blocks.places:
                logits, _ = blocks.at(r, c)
                d_logits = logits.add_(bias).sigmoid_().mul_(grad[r, None])
                d_bias += d_logits.sum()
                gradients.add(r, c, d_logits)
        return *gradients.value(), d_bias, None


class RunningLogSumExp:
    """Log-sum-exp and best key of rows whose logits come block by block."""

    def __init__(self, rows: int, device: torch.device):
        self.top = torch.full((rows,), float("-inf"), device=device)
        self.total = torch.zeros(rows, device=device)  # of exp(logit - top)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, r: slice, first: int, logits: Tensor, spare: Tensor, dim: int) -> None:
        """A block of logits, whose keys lie along `dim` and begin with key `first`; the other
        dimension are the rows `r`. `spare`, of the block's shape, is overwritten.
        """
        top, index = logits.max(dim)
        torch.where(top > self.top[r], first + index, self.best[r], out=self.best[r])
        top = torch.maximum(self.top[r], top)
        self.total[r] *= (self.top[r] - top).exp_()
        self.total[r] += torch.sub(logits, top.unsqueeze(dim), out=spare).exp_().sum(dim)
        self.top[r] = top

    def value(self) -> Tensor:
        return self.top + self.total.log()


class FeatureGradients:
    """Gradients of rows, keys and scale, of the logits' gradients block by block."""

    def __init__(self, rows: Tensor, keys: Tensor, scale: Tensor, dtype: torch.dtype):
        self.rows = rows
        self.scale = scale
        self.low_rows = rows.to(dtype)
        self.low_keys = keys.to(dtype)
        self.d_rows = torch.zeros_like(rows)
        self.d_keys = torch.zeros_like(keys)

    def add(self, r: slice, c: slice, d_logits: Tensor) -> None:
        d_logits = d_logits.to(self.low_rows.dtype)
        self.d_rows[r] += d_logits @ self.low_keys[c]
        self.d_keys[c] += d_logits.T @ self.low_rows[r]

    def value(self) -> tuple[Tensor, Tensor, Tensor]:
        d_scale = torch.dot(self.d_rows.flatten(), self.rows.flatten()).to(self.scale.dtype)
        # in place: these are the large tensors
        return self.d_rows.mul_(self.scale), self.d_keys.mul_(self.scale), d_scale


def matmul_type(rows: Tensor) -> torch.dtype:
    """Type of matrix products: autocast's, where it is on."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return rows.dtype


class LogitBlocks:
    """The logits scale · rows keysᵀ in float32, block by block in three workspaces that all share.

    No generator: torch.compile of torch 2.6 would make every block before the first is used.
    """

    def __init__(self, rows: Tensor, keys: Tensor, scale: Tensor, dtype: torch.dtype, tile: int):
        size = min(tile, len(rows)) * min(tile, len(keys))
        self.rows = rows.to(dtype)
        self.keys = keys.to(dtype)
        self.scale = scale
        self.product = self.rows.new_empty(size)
        self.logits = rows.new_empty(size, dtype=torch.float32)
        self.spare = rows.new_empty(size, dtype=torch.float32)
        # row slice and key slice of every block
        self.places = [(r, c) for r in slices(len(rows), tile) for c in slices(len(keys), tile)]

    def at(self, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """A block's logits and a spare tensor of their shape; the next block overwrites both."""
        shape = (r.stop - r.start, c.stop - c.start)
        used = shape[0] * shape[1]
        spaces = (self.product, self.logits, self.spare)
        product, logits, spare = (space[:used].view(shape) for space in spaces)
        torch.mm(self.rows[r], self.keys[c].T, out=product)
        torch.mul(product, self.scale, out=logits)
        return logits, spare


def slices(length: int, tile: int) -> list[slice]:
    """`length` positions in runs of `tile`."""
    return [slice(i, min(i + tile, length)) for i in range(0, length, tile)]
