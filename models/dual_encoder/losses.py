"""Losses of dual encoders as pure functions: InfoNCE, SigLIP, SimCLR, Barlow Twins, SimSiam / BYOL,
SwAV.

Which of them a method adds up, and over which views, is in the method's file (`clip.py`, `cl2l.py`,
`slip.py`, `align.py`); the weights of the sum are in main.py (`total_loss`).

Conventions. Features carry the sample axis first: the features [b,V,D] of this rank hold V views of
its b pairs, `all_*` [N,V,D] the same of the N pairs of the global batch in rank order, and `first`
is the row of this rank's first pair there. Each rank returns the loss of its own rows; the mean
over ranks is the loss and, after DDP, the gradient of the global batch. Nothing here normalises
unless its docstring says so.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import all_reduce, gather, gather_with_gradient, rank, world_size
from models.dual_encoder.tiled import tiled_info_nce, tiled_info_nce_both, tiled_sigmoid_loss


def normalize(features: Tensor) -> Tensor:
    """Unit length along the last axis (floor 1e-12)."""
    return F.normalize(features, dim=-1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy in percent, 0-d; logits [B,N], labels int64 [B]."""
    return 100 * (logits.detach().argmax(1) == labels).float().mean()


class Views(NamedTuple):
    """Views of unit length: V of each image and U of each text, of this rank's b pairs and of the N
    pairs of all ranks in rank order."""

    image: Tensor  # [b,V,E]
    text: Tensor  # [b,U,E]
    all_image: Tensor  # [N,V,E]
    all_text: Tensor  # [N,U,E]
    first: int  # row of this rank's first pair among all


class InfoNCE(NamedTuple):
    """Loss and top-1 accuracy in percent of both directions, 0-d each."""

    loss_image: Tensor  # images as queries, texts as keys
    loss_text: Tensor
    acc_image: Tensor
    acc_text: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean of both directions."""
        return (self.loss_image + self.loss_text) / 2


def clip_loss(
    views: Views, scale: Tensor, label_smoothing: float = 0.0, tile: int | None = None
) -> InfoNCE:
    """InfoNCE in both directions (van den Oord 2018; CLIP: Radford 2021, figure 3), over all pairs
    of views.

        loss_image = - mean_{i,v,u} log softmax_j (scale <image_iv, text_ju>) at j = first + i
        loss_text likewise

    scale: 0-d, the inverse temperature. label_smoothing: fraction of the target spread evenly over
    the N keys. With `tile` the logits exist only in blocks of tile x tile and are recomputed in the
    backward pass: O(tile^2) memory instead of O(b N V U), same values and gradients.
    """
    image, text, all_image, all_text, first = views
    if tile is not None and image is all_image and text is all_text:  # one process has all pairs
        return InfoNCE(*tiled_info_nce_both(image, text, scale, label_smoothing, tile))
    if tile is not None:
        loss_image, acc_image = tiled_info_nce(image, all_text, scale, first, label_smoothing, tile)
        loss_text, acc_text = tiled_info_nce(text, all_image, scale, first, label_smoothing, tile)
        return InfoNCE(loss_image, loss_text, acc_image, acc_text)
    logits_image = view_logits(image, all_text, scale)
    logits_text = view_logits(text, all_image, scale)
    rows = first + torch.arange(len(image), device=image.device)
    labels = rows.repeat_interleave(image.shape[1] * text.shape[1])
    return InfoNCE(
        loss_image=F.cross_entropy(logits_image, labels, label_smoothing=label_smoothing),
        loss_text=F.cross_entropy(logits_text, labels, label_smoothing=label_smoothing),
        acc_image=accuracy(logits_image, labels),
        acc_text=accuracy(logits_text, labels),
    )


def view_logits(query: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """scale <query, key> of each pair of views, [b,V,E] and [N,U,E] -> [b V U, N]."""
    total, key_views, _ = keys.shape
    columns = keys.transpose(0, 1).reshape(key_views * total, -1)
    logits = scale * (query.flatten(0, 1) @ columns.T)  # [b V, U N]
    return logits.view(-1, total)


def sigmoid_loss(
    image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    bias: Tensor,
    first: int = 0,
    tile: int | None = None,
) -> Tensor:
    """SigLIP (Zhai 2023, equation 1): every image-text pair is a yes/no question.

        z_ij = scale <image_i, text_j> + bias
        L = mean_i [ sum_j softplus(z_ij) - z_{i,first+i} ]

    which is -log sigmoid(z) of the own pair and -log sigmoid(-z) of all others, since softplus(-z)
    = softplus(z) - z. image [b,E], all_text [N,E] of unit length; scale, bias 0-d; `tile` as in
    `clip_loss`. 0-d.
    """
    if tile is not None:
        return tiled_sigmoid_loss(image, all_text, scale, bias, first, tile)
    logits = (scale * (image @ all_text.T) + bias).float()
    return (F.softplus(logits).sum(1) - logits.diagonal(first)).mean()


def simclr(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """SimCLR (Chen 2020, equation 1) of two augmentations, which attract; all other images of
    either repel.

        L = - mean_i log softmax([<a_i, b_j> for all j, <a_i, a_j> for j != i] / temperature) at b_i

    averaged with that of b_i the other way. a, b [b,D] of this rank, normalised here and gathered
    with gradient in one collective. Returns the 0-d loss and the top-1 accuracy of a in percent.
    """
    own = torch.stack([normalize(a), normalize(b)], 1)
    a, b = own.unbind(1)
    all_a, all_b = gather_with_gradient(own).unbind(1)
    labels = rank() * len(a) + torch.arange(len(a), device=a.device)
    itself = F.one_hot(labels, len(all_a)) * 1e9
    a_to_a = a @ all_a.T / temperature - itself
    a_to_b = a @ all_b.T / temperature
    b_to_a = b @ all_a.T / temperature
    b_to_b = b @ all_b.T / temperature - itself
    from_a = torch.cat([a_to_b, a_to_a], 1)
    from_b = torch.cat([b_to_a, b_to_b], 1)
    loss = (F.cross_entropy(from_a, labels) + F.cross_entropy(from_b, labels)) / 2
    return loss, accuracy(from_a, labels)


def barlow_twins(image: Tensor, text: Tensor, lamb: float, scale_loss: float) -> Tensor:
    """Barlow Twins (Zbontar 2021, equation 1) between modalities: the cross-correlation goes to the
    identity.

        L = scale_loss [ sum_i (K_ii - 1)^2 + lamb sum_{i != j} K_ij^2 ],    K = image^T text / N

    K is taken over the global batch of N pairs; L is summed over all V U pairs of views of this
    rank's image [b,V,D] and text [b,U,D]. 0-d, float32 whatever the autocast; the value is that of
    the global batch on every rank. Of the two ways to compute it the one that holds less is taken:
    the features of all ranks (N x D a view), or K (D x D, a pair of views at a time).
    """
    with torch.autocast(image.device.type, enabled=False):
        image = image.float()
        text = text.float()
        if len(image) * world_size() <= image.shape[-1]:
            return _from_features(image, text, lamb, scale_loss)
        pairs = []
        for v in range(image.shape[1]):
            for u in range(text.shape[1]):
                pairs.append(_FromCorrelation.apply(image[:, v], text[:, u], lamb))
        return scale_loss * torch.stack(pairs).sum()


def _from_features(image: Tensor, text: Tensor, lamb: float, scale_loss: float) -> Tensor:
    """K is never formed: N^2 |K|^2 = sum_ij <image_i, image_j> <text_i, text_j>, of which each rank
    computes its own rows i, O(b N D) per view."""
    all_image = gather_with_gradient(image).transpose(0, 1)  # [V,N,D]
    all_text = gather_with_gradient(text).transpose(0, 1)
    image = image.transpose(0, 1)  # [V,b,D]
    text = text.transpose(0, 1)
    b = image.shape[1]
    total = all_image.shape[1]
    gram_image = image @ all_image.transpose(1, 2)  # [V,b,N]
    gram_text = text @ all_text.transpose(1, 2)
    # own rows count N/b fold, so that the mean over ranks is the sum over all rows
    squares = torch.einsum("vbn,ubn->", gram_image, gram_text) / (b * total)
    squares = squares + (all_reduce(squares, "mean") - squares).detach()
    diagonal = torch.einsum("vnd,und->vud", all_image, all_text) / total
    off_diagonal = squares - diagonal.square().sum()
    return scale_loss * ((diagonal - 1).square().sum() + lamb * off_diagonal)


class _FromCorrelation(torch.autograd.Function):
    """The loss of one pair of views from K, which is summed over the ranks instead of their
    features. image, text [b,D] of this rank; K and its gradient, 2 D^2 numbers, are gone when the
    forward pass is over: what is kept is the gradient of the own rows."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, lamb: float) -> Tensor:
        ranks = world_size()
        total = len(image) * ranks
        correlation = all_reduce(image.T @ text / total)
        diagonal = correlation.diagonal()
        unlike_one = diagonal - 1
        loss = unlike_one.square().sum()
        loss = loss + lamb * (correlation.square().sum() - diagonal.square().sum())
        slope = correlation.mul_(2 * lamb)
        slope.diagonal().copy_(2 * unlike_one)
        # every rank returns the loss of all, and the wrapper averages over ranks: the own share is
        # `ranks` times as large
        share = ranks / total
        ctx.save_for_backward(share * (text @ slope.T), share * (image @ slope))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        image, text = ctx.saved_tensors
        return grad * image, grad * text, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """SimSiam (Chen 2021, equation 1) / BYOL (Grill 2020, equation 2), over all pairs of views.

        L = sum_{v,u} (2 - 2 mean_b cos(prediction_bv, target_bu))

    prediction [B,V,D], target [B,U,D]; no gradient reaches the target. The sum of cosines over
    pairs of views is the cosine sum of summed unit vectors, so nothing of size V U arises. 0-d.
    """
    predictions = normalize(prediction).sum(1)
    targets = normalize(target.detach()).sum(1)
    pairs = prediction.shape[1] * target.shape[1]
    return 2 * pairs - 2 * (predictions * targets).sum(-1).mean()


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Balanced soft assignments (SwAV: Caron 2020, equation 3): scores [...,b,K] -> [...,b,K], rows
    sum to 1.

    `iterations` >= 1 times every prototype gets the same mass over the global batch, then every
    sample. Carried out on logarithms, so that no temperature makes a row vanish or overflow; b is
    the same on all ranks.
    """
    log_assignment = scores.float() / epsilon
    for _ in range(iterations):
        own_mass = log_assignment.logsumexp(-2, keepdim=True)
        log_assignment = log_assignment - gather(own_mass[None]).logsumexp(0)
        log_assignment = log_assignment.log_softmax(-1)
    return log_assignment.exp()


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all rows of - sum_k target_k log softmax(logits)_k; [...,K] each, 0-d."""
    return -(target * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def swapped_assignments(
    own: Tensor, everyone: Tensor, scale: Tensor, epsilon: float, iterations: int
) -> Tensor:
    """SwALIP (Fini 2023): the gathered batch of the other modality plays SwAV's prototypes, in one
    direction.

    own [b,A,E], everyone [N,A,E] of the other modality, unit length. The assignment that views (a,
    c) must predict is that of views (a + 1, c + 1) modulo A: for A = 2, of the other two views.
    0-d.
    """
    queries = own.transpose(0, 1)[:, None]  # [A,1,b,E]
    keys = everyone.permute(1, 2, 0)[None]  # [1,A,E,N]
    scores = queries @ keys  # [A,A,b,N]
    target = sinkhorn(scores, epsilon, iterations).roll((-1, -1), (0, 1))
    return soft_cross_entropy(scale * scores, target)
