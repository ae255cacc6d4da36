"""Steps for the recorder: what waits for the card, and messages to other processes."""

import torch
import torch.distributed as dist

from runtime.simulate.recorder import Recorder, Trace
from runtime.simulate.stand_ins import simulated_gpu
from scripts.planning.simulate import _join_fake_group


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


def talking_step() -> Trace:
    """Collectives of fake tensors, among them a coalesced sum, which torch 2.14 does not know on them."""
    _join_fake_group(8)
    try:
        with simulated_gpu(), Recorder() as recorder:
            part, whole = torch.zeros(4), torch.zeros(32)
            dist.all_reduce(part)
            dist.all_gather_into_tensor(whole, part)
            dist.reduce_scatter_tensor(part, whole)
            dist.all_reduce_coalesced([part, part])
            dist.broadcast(part, 0, async_op=True).wait()
            dist.barrier()
            assert (len(part), len(whole)) == (4, 32)
    finally:
        dist.destroy_process_group()
    return recorder.trace
