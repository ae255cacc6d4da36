"""A step that waits for the card in every way that the recorder must find."""

import torch

from runtime.simulate.recorder import Recorder, Trace
from runtime.simulate.stand_ins import simulated_gpu


def waiting_step() -> Trace:
    with simulated_gpu(), Recorder() as recorder:
        x = torch.zeros(8, 4, device="cpu")
        recorder.phase = "forward"
        x.sum().item()
        x[x[:, 0] > 0]
        x.nonzero()
        x.cpu()
        torch.tensor([1.0, 2.0], device=torch.device("cpu"))
        torch.tensor([1.0, 2.0]).to(torch.device("cpu"))
        torch.tensor([1.0, 2.0]).to(torch.device("cpu"), non_blocking=True)
        x + torch.full((), 0.5, device="cpu")
    return recorder.trace
