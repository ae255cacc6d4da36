"""DistributedDataParallel on fake tensors: torch's reducer reads data, this one notes what it would send."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from runtime.simulate.recorder import Collective, Recorder

BUCKET = 25 * 2**20  # bytes, torch's default


class SimulatedDDP(nn.Module):
    """Gradients are views of buffers that stay, and a bucket is reduced as soon as it is full."""

    def __init__(self, module: nn.Module, device_ids=None, gradient_as_bucket_view=True, **options):
        super().__init__()
        self.module = module
        self.recorder = None
        self.sync = True
        self.waiting = 0
        trained = [p for p in module.parameters() if p.requires_grad]
        self.buffer = torch.zeros(sum(p.numel() for p in trained))
        parts = self.buffer.split([p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            view = part.view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self._reducer(view))

    def attach(self, recorder: Recorder) -> None:
        self.recorder = recorder
        recorder.adopt([self.buffer], "gradients")

    def _reducer(self, view: torch.Tensor):
        def hook(parameter) -> None:
            parameter.grad = view
            if self.sync:
                self.waiting += view.numel() * view.element_size()
                if self.waiting >= BUCKET:
                    self._reduce()

        return hook

    def _reduce(self) -> None:
        collective = Collective(self.recorder.phase, "allreduce_", self.waiting)
        self.recorder.trace.collectives.append(collective)
        self.waiting = 0

    def finish(self) -> None:
        """Send what is left in the last bucket; call it at the end of a backward pass."""
        if self.sync and self.waiting:
            self._reduce()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.sync = False
        try:
            yield
        finally:
            self.sync = True

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)
