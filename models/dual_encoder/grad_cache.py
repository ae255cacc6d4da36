"""Gradient accumulation that enlarges the contrastive batch: features are cached, gradients travel
back in pieces.

Plain accumulation contrasts each micro-batch with itself. Here all micro-batches are embedded
without a graph, the loss of the joined features gives the gradient of every feature, and each
micro-batch is then embedded again to carry its share into the weights (Gao 2021). Memory is that of
one micro-batch, value and gradients are those of one large batch - exactly so for networks without
batch norm, whose statistics are those of a micro-batch. Costs one more forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from models.dual_encoder.objectives import Features


def cached_step(
    model: nn.Module,
    losses: Callable[..., Features],
    batches: list[dict[str, Tensor]],
    backward: Callable[[Tensor], None],
    forward_context: Callable[[], AbstractContextManager] = nullcontext,
    sync_context: Callable[[bool], AbstractContextManager] = lambda last: nullcontext(),
    teacher: nn.Module | None = None,
) -> Features:
    """One forward and backward pass over `batches` as if they were one; gradients are left in the
    parameters.

    model: the wrapped DualEncoder, called as `model(features_only=True, **batch)`.
    losses: the bare model's `losses`, a function of features alone.
    backward: as `Precision.backward`; is called once, with the loss of the joined features. What it
    scales stays scaled. forward_context: autocast. sync_context(last): gradients need to travel
    between processes only where last is True. teacher: momentum model, whose features (without
    gradient) are the losses' second argument. Returns the losses of the joined batch.
    """
    device = next(model.parameters()).device
    states = []
    cached, targets = [], []
    with torch.no_grad(), forward_context(), kept_statistics(model):
        for batch in batches:
            states.append(_random_state(device))
            cached.append(model(features_only=True, **batch))
    if teacher is not None:
        with torch.no_grad(), forward_context():
            targets = [teacher(features_only=True, **batch) for batch in batches]
    after = _random_state(device)
    joined = {name: leaf.requires_grad_() for name, leaf in _join(cached).items()}
    with forward_context():
        result = losses(joined, _join(targets)) if targets else losses(joined)
    backward(result["loss"])
    grads = [
        _share(joined, i, [_rows(features) for features in cached]) for i in range(len(batches))
    ]
    for i, batch in enumerate(batches):
        _set_random_state(states[i], device)
        with sync_context(i == len(batches) - 1):
            with forward_context():
                surrogate = model(feature_grads=grads[i], **batch)["loss"]
            # the gradients of the features carry backward's loss scale already
            surrogate.backward()
    _set_random_state(after, device)
    return {name: value.detach() for name, value in result.items()}


@contextmanager
def kept_statistics(model: nn.Module):
    """Inside, batch norm's running statistics do not move: a batch that is embedded twice counts
    once."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def _rows(features: Features) -> int:
    return next(len(value) for value in features.values() if value.ndim)


def _join(parts: list[Features]) -> Features:
    """Features of all micro-batches, sample axis first; scalars (scales) are the same in each."""
    return {
        name: torch.cat([part[name] for part in parts]).detach()
        if first.ndim
        else first.detach().clone()
        for name, first in parts[0].items()
    }


def _share(joined: Features, index: int, rows: list[int]) -> Features:
    """Gradients of one micro-batch's features; a scalar's go with the first."""
    start = sum(rows[:index])
    grads = {name: leaf.grad for name, leaf in joined.items() if leaf.grad is not None}
    return {
        name: grad[start : start + rows[index]]
        if grad.ndim
        else grad
        if index == 0
        else torch.zeros_like(grad)
        for name, grad in grads.items()
    }


def _random_state(device: torch.device):
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


def _set_random_state(state, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
