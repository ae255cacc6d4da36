"""Gradient caching (Gao et al., 2021): gradient accumulation that enlarges the contrastive batch.

Plain accumulation contrasts each micro-batch with itself. Here all micro-batches are embedded
without a graph, the loss of the joined features gives the gradient of every feature, and each
micro-batch is embedded once more to carry its part into the weights. Memory is that of one
micro-batch; value and gradients are those of one large batch, exactly so for networks without batch
norm, whose statistics are those of a micro-batch. Costs one more forward pass of what is trained.

    cache = FeatureCache(model, batches)
    loss of cache.features and cache.targets; its backward pass
    for micro, batch in enumerate(cache.with_fixed(batches)):
        with cache.replay(micro):
            model(feature_grads=cache.gradients(micro), **batch)["surrogate"].backward()

`train_step_cached` in main.py is that loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from base.distributed import unwrap
from models.dual_encoder.base import Features, in_float32


class FeatureCache:
    """Features of all micro-batches as leaves of the graph, the momentum teacher's as `targets`, and
    what it takes to embed each micro-batch again.

    model: the wrapped DualEncoder, called as `model(features_only=True, **batch)`; call it inside
    autocast.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]]):
        self.device = next(model.parameters()).device
        self.random_states = []
        parts = []
        with torch.no_grad(), kept_statistics(model):
            for batch in batches:
                self.random_states.append(random_state(self.device))
                parts.append(model(features_only=True, **batch))
        taught = [unwrap(model).teacher_features(**batch) for batch in batches]
        self.targets = None if taught[0] is None else join_features(taught)
        self.rows = [first_length(part) for part in parts]
        joined = join_features(parts)
        self.fixed = {name: joined[name].clone() for name in unwrap(model).fixed_features()}
        self.features = {name: value.requires_grad_() for name, value in joined.items()}

    def gradients(self, micro: int) -> Features:
        """Gradients of the features of one micro-batch, after the backward pass; a scalar's go with
        the first.
        """
        start = sum(self.rows[:micro])
        found = {}
        for name, leaf in self.features.items():
            if leaf.grad is None:
                continue
            if leaf.grad.ndim:
                found[name] = leaf.grad[start : start + self.rows[micro]]
            else:
                found[name] = leaf.grad if micro == 0 else torch.zeros_like(leaf.grad)
        return found

    def with_fixed(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches with what locked towers have made of them and need not make again."""
        parts = {name: value.split(self.rows) for name, value in self.fixed.items()}
        return [
            {**batch, **{name: rows[micro] for name, rows in parts.items()}}
            for micro, batch in enumerate(batches)
        ]

    @contextmanager
    def replay(self, micro: int) -> Iterator[None]:
        """Inside, the random numbers are those of the micro-batch's first pass: the same
        dropout.
        """
        after = random_state(self.device)
        set_random_state(self.random_states[micro], self.device)
        try:
            yield
        finally:
            set_random_state(after, self.device)


def join_features(parts: list[Features]) -> Features:
    """Features of all micro-batches in float32, sample axis first, without graph; scalars (scales)
    are the same in each.
    """
    joined = {}
    for name, first in parts[0].items():
        if first.ndim:
            joined[name] = torch.cat([part[name] for part in parts]).detach()
        else:
            joined[name] = first.detach().clone()
    return in_float32(joined)


def first_length(features: Features) -> int:
    """Rows of a micro-batch."""
    return next(len(value) for value in features.values() if value.ndim)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm's running statistics do not move: a batch that is embedded twice counts
    once.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of torch's generators on the CPU and, where the model is there, on the GPU."""
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_gpu


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """The opposite of `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
