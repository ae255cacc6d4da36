"""Heads whose logits evaluations compare."""

import torch
from torch import Tensor, nn


def exact(head: nn.Module, states: Tensor) -> Tensor:
    """head(states) in the type of its weights, float32 as a rule, under autocast too: rounded to
    bfloat16, the logits of near answers tie or change places."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(next(head.parameters()).dtype))
