"""Attention probabilities."""

import torch

from models.layers.attention import attention_map


def test_large_queries_of_half_precision_have_a_map():
    """Their products with keys exceed 65504, the largest fp16; scaled, they do not."""
    torch.manual_seed(0)
    query, key = (x.half() for x in (50 + torch.randn(2, 1, 2, 6, 64)).unbind())
    assert (query.float() @ key.float().mT).min() > 65504
    found = attention_map(query, key)
    assert found.dtype == torch.float32
    expected = (query.double() @ key.double().mT / 8).softmax(-1).float()
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 6))
