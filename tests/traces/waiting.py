"""A step that waits for the card in every way that the recorder must find."""

import torch

from runtime.simulate.recorder import Recorder, Trace
from runtime.simulate.stand_ins import simulated_gpu


def waiting_step() -> Trace:
    with simulated_gpu(), Recorder() as recorder:
        card = torch.device("cpu")
        x = torch.zeros(8, 4, device=card)
        recorder.phase = "forward"
        x.sum().item()
        x[x[:, 0] > 0]
        x.nonzero()
        x.cpu()
        torch.tensor([1.0, 2.0], device=card)
        torch.tensor([1.0, 2.0]).to(card)
        torch.tensor([1.0, 2.0]).to(card, non_blocking=True)
        steps = torch.tensor(0.0, device="cpu") + torch.zeros(())  # of the host: no wait
        assert steps.item() == 100
        x + torch.full((), 0.5, device=card)
    return recorder.trace
