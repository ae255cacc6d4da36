"""The pre-training losses as pure functions of float tensors; all arithmetic is float32 whatever
the autocast state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import mean_count

IGNORE = -100  # label of a position that carries no loss, as in torch's cross entropy


def distilled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: Tensor | float = 0.0,
) -> Tensor:
    """Cross entropy with (1-alpha) * target + alpha * softmax(teacher_logits), per row: logits
    [R,C] -> float32 [R].

    target: int64 [R] classes (IGNORE gives loss 0) or float [R,C] distributions, like torch's cross
    entropy. Both targets sum to 1, so the loss is logsumexp(s) - sum(target * s): no [R,C]
    log-softmax is kept for backward.
    """
    logits = logits.float()
    if target.dtype.is_floating_point:
        valid = None
        fit = (target * logits).sum(-1)
    else:
        valid = target != IGNORE
        fit = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if teacher_logits is not None:
        soft = teacher_logits.detach().float().softmax(-1)
        soft_fit = (soft * logits).sum(-1)
        fit = (1 - alpha) * fit + alpha * soft_fit
    loss = logits.logsumexp(-1) - fit
    return loss if valid is None else loss.masked_fill(~valid, 0.0)


def sequence_axis_soft_loss(logits: Tensor, rows: Tensor, teacher_logits: Tensor) -> Tensor:
    """SIMLA's soft masked-LM loss as published: the log-softmax runs over the text axis, padding
    included.

    logits [B,L,V] of every position, rows int64 [K] indices into B*L, teacher_logits [K,V] at those
    -> float32 [K].
    """
    soft = teacher_logits.detach().float().softmax(-1)
    log_probabilities = logits.float().log_softmax(1).flatten(0, 1).index_select(0, rows)
    return -(soft * log_probabilities).sum(-1)


def masked_patches(patch_mask: Tensor, count: int) -> Tensor:
    """Positions of the masked patches of bool [B,N] in order, filled up with others: int64 [B,count]."""
    order = patch_mask.byte().argsort(dim=1, descending=True, stable=True)
    return order[:, :count]


def masked_mean(
    loss: Tensor, valid: Tensor, over_ranks: bool = True, count: Tensor | None = None
) -> Tensor:
    """Mean of the valid entries (bool, same shape) -> 0-d; 0 where none is valid.

    over_ranks: divide by the mean count of all ranks, so that the average of the ranks' losses (and
    gradients) is the mean over the valid entries of the global batch, however they are spread over
    the ranks; `count`, where given, is that mean count, over all micro-batches, too.
    """
    if not over_ranks:
        count = valid.sum().float()
    elif count is None:
        count = mean_count([valid])
    total = torch.where(valid, loss, 0.0).sum()
    return total / torch.where(count > 0, count, 1.0)


def distilled_binary_cross_entropy(
    logits: Tensor, target: Tensor, teacher_logits: Tensor, alpha: Tensor | float
) -> Tensor:
    """Mean of BCE(logits, (1-alpha) * target + alpha * sigmoid(teacher_logits)) over all entries ->
    0-d float32.

    BCE is linear in its target, so mixing the targets is mixing the losses.
    """
    soft = teacher_logits.detach().float().sigmoid()
    mixed = (1 - alpha) * target + alpha * soft
    return F.binary_cross_entropy_with_logits(logits.float(), mixed)


def hard_negatives(similarity: Tensor, forbidden: Tensor) -> Tensor:
    """One column for each row of similarity logits [B,B], sampled with probability softmax(logits)
    among those that are not forbidden (bool [B,B]).

    Gumbel-max: a sample of the multinomial of the masked softmax, but it cannot underflow to an
    all-zero row and needs no host synchronisation. int64 [B]; a row that is all forbidden gives 0.
    """
    noisy = similarity.detach().float() + gumbel_noise(similarity)
    return noisy.masked_fill(forbidden, -torch.inf).argmax(-1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent standard Gumbel values, float32 of the same shape."""
    return -torch.empty_like(like, dtype=torch.float32).exponential_().log()


def keyword_targets(
    attention: Tensor,
    ids: Tensor,
    allowed: Tensor | None,
    vocab_size: int,
    per_head: int = 4,
    keywords: int = 5,
) -> tuple[Tensor, Tensor]:
    """SIMLA's hard keyword targets: the tokens [CLS] attends to most.

    Each head votes for its `per_head` strongest positions; the `keywords` positions with most votes
    become targets. Ties go to the earlier position.

    attention [B,H,L]: probabilities of the [CLS] query; ids int64 [B,L]. allowed: bool [B,L],
    positions that may be voted for; one without a vote is never chosen, so a short text gives fewer
    keywords. None = any position, voted for or not, as published. Returns the multi-hot targets
    float32 [B,V] and the votes int64 [B,L].
    """
    if allowed is not None:
        attention = attention.masked_fill(~allowed[:, None, :], -1.0)
    voted = attention.argsort(dim=-1, descending=True, stable=True)[..., :per_head]
    votes = torch.zeros(attention.shape, dtype=torch.int64, device=ids.device)
    votes = votes.scatter_(-1, voted, 1).sum(1)  # of all heads
    if allowed is not None:
        votes = votes * allowed
    chosen = votes.argsort(dim=-1, descending=True, stable=True)[:, :keywords]
    wanted = torch.ones_like(chosen) if allowed is None else votes.gather(1, chosen) > 0
    targets = torch.zeros(len(ids), vocab_size, device=ids.device)
    targets.scatter_reduce_(1, ids.gather(1, chosen), wanted.float(), "amax")
    return targets, votes
