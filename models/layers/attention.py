"""Scaled dot-product attention: the fused kernel, keys shared between query rows, and the
probabilities on demand."""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[R,L,D] -> [R,H,L,D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[R,H,L,d] -> [R,L,H*d]."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for query [R,H,L,d], key and value [R,H,N,d].

    `mask` is boolean and broadcasts to [R,H,L,N]; True = attend; every query needs at least one
    True.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attend_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of R query rows to B <= R key sets, none of which is copied for the rows that come
    in order.

    query [R,H,L,d]; key, value [B,H,N,d]; mask [B,1,1,N] bool or None. The last len(rows) query
    rows attend to the key sets `rows` names (int64); the rows before them come in whole groups of
    B, row r attending to key set r mod B.
    """
    # shapes by .shape, not len(), which torch.export would take for constants
    ordered = query.shape[0] - (0 if rows is None else rows.shape[0])
    parts = []
    if ordered:
        groups = ordered // key.shape[0]
        length = query.shape[2]
        # the groups' queries of one key set stand side by side as one long query
        grouped = query[:ordered].unflatten(0, (groups, key.shape[0]))  # [G,B,H,L,d]
        long = grouped.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B,H,G*L,d]
        context = attend(long, key, value, mask, dropout).unflatten(2, (groups, length))
        parts.append(context.permute(2, 0, 1, 3, 4).flatten(0, 1))
    if rows is not None:
        key = key.index_select(0, rows)
        value = value.index_select(0, rows)
        if mask is not None:
            mask = mask.index_select(0, rows)
        parts.append(attend(query[ordered:], key, value, mask, dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def key_set_of_rows(n_rows: int, n_sets: int, rows: Tensor | None, device: torch.device) -> Tensor:
    """The key set each query row attends to under the convention of `attend_shared`: int64 [R]."""
    ordered = n_rows - (0 if rows is None else len(rows))
    in_order = torch.arange(ordered, device=device) % n_sets
    return in_order if rows is None else torch.cat([in_order, rows])


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Probabilities softmax(q k^T / sqrt(d)) in float32, [R,H,L,N], part of the autograd graph;
    mask as in `attend`."""
    query = query * query.shape[-1] ** -0.5  # before the product, which fp16 may not hold
    scores = (query @ key.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
