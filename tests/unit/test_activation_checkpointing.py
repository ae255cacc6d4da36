"""Activation checkpointing changes memory alone: dtypes, gradients, dropout, statistics and names stay."""

import pytest
import torch
from torch import nn

from models.layers.batchnorm import GhostBatchNorm
from runtime.parallel import checkpoint_blocks
from tests.helpers.gradients import assert_same_gradients, gradients_of


class Block(nn.Module):
    """Linear, batch norms of both kinds and dropout; notes the dtype and pass of every call."""

    def __init__(self, seen: list):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.ghost = GhostBatchNorm(16, virtual_batch=4)
        self.seen = seen

    def forward(self, x):
        y = self.linear(x)
        if not torch.compiler.is_compiling():  # a side effect would break the graph
            self.seen.append(y.dtype)
        y = self.norm(torch.relu(y).float())
        y = self.ghost(y[:, :, None, None])[:, :, 0, 0]
        return x + nn.functional.dropout(y, 0.5, self.training)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.blocks = nn.ModuleList([Block(self.seen) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def one_pass(checkpointing: bool, dtype: torch.dtype | None, compiled: bool = False) -> Net:
    """A network after one forward and backward pass."""
    torch.manual_seed(0)
    net = Net().train()
    if checkpointing:
        checkpoint_blocks(net)
    if compiled:
        torch._dynamo.reset()
        net.compile(backend="aot_eager_decomp_partition")
    torch.manual_seed(1)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = net(x)
    y.float().square().sum().backward()
    return net


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_equals_the_plain_pass(dtype):
    plain, saving = one_pass(False, dtype), one_pass(True, dtype)
    assert list(saving.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(saving.state_dict()[name], value), name
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_recomputation_has_the_dtype_of_the_forward_pass():
    net = one_pass(True, torch.bfloat16)
    assert net.seen == [torch.bfloat16] * 4, "two blocks, each computed twice"


def test_compiled_recomputation():
    plain, saving = (one_pass(saves, torch.bfloat16, compiled=True) for saves in (False, True))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], value, msg=name)
    assert saving.blocks[0].norm.num_batches_tracked == 1
    assert saving.blocks[0].ghost.num_batches_tracked == 1
    assert_same_gradients(gradients_of(saving), gradients_of(plain), part=1e-5)


def test_without_gradient_nothing_is_kept():
    net = Net().eval()
    checkpoint_blocks(net)
    with torch.no_grad():
        assert net(torch.randn(8, 16)).grad_fn is None
