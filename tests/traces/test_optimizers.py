"""Every optimizer of timm that is installed: its update waits for the card only where the start says so."""

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from base.errors import UserError
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.timm_optimizers import WAITING
from runtime.simulate.recorder import Recorder
from runtime.simulate.stand_ins import simulated_gpu
from tests.helpers.traces import call_in_worker

NEEDS_CUDA = ("bnb", "fused")  # bitsandbytes' and APEX's
CLASSES = {
    get_optimizer_info(name).opt_class: name
    for name in list_optimizers()
    if not name.startswith(NEEDS_CUDA)
}  # one name a class


def waits_of_updates() -> dict[str, int | str]:
    """Host waits of the second update of a small network, or why there is none, by optimizer."""
    found = {}
    for name in CLASSES.values():
        try:
            found[name] = waits_of(name)
        except UserError as error:
            found[name] = str(error)
    return found


def waits_of(name: str) -> int:
    with simulated_gpu(), torch.compiler.set_stance("force_eager"), Recorder() as recorder:
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 32), nn.LayerNorm(32)
        )
        optimizer = build_optimizer(network, Optimizer(opt=f"timm/{name}"))
        precision = Precision("bf16", torch.device("cpu"))
        for _ in range(2):
            recorder.restart()
            set_learning_rate(optimizer, 1e-3)
            loss = network(torch.zeros(2, 3, 8, 8)).square().mean()
            precision.backward(loss)
            precision.step(optimizer, network.parameters())
        assert len(recorder.trace.operations) > 50
        return sum(recorder.trace.waits.values())


@pytest.mark.slow
def test_updates_wait_only_where_the_start_says_so():
    found = call_in_worker(waits_of_updates)
    second_order = {name for name in found if get_optimizer_info(name).second_order}
    assert all("needs second derivatives" in found.pop(name) for name in second_order)
    waiting = {kind.__name__ for kind, name in CLASSES.items() if found.get(name, 0)}
    assert waiting == set(WAITING), found
    assert len(found) > 25
