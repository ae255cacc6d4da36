"""Batch norm over all processes: values, gradients and running statistics are those of the whole batch on one."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from models.layers.batchnorm import GlobalBatchNorm, synchronise_batch_norm
from tests.helpers.processes import spawn

SHARES = [(4, 4), (7, 1)]  # rows of each process


class Net(nn.Module):
    """A convolution with its norm, and a head whose norm has no weights and a second name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6, momentum=0.3)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False))
        self.same = self.head[1]

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


def case(layout: torch.memory_format):
    """A network, inputs [8,3,6,6] far from mean 0, and the weights [8,5] of the outputs in the loss."""
    torch.manual_seed(0)
    net = Net().train().double()
    nn.init.normal_(net.norm.weight)
    x = (torch.randn(8, 3, 6, 6).double() * 2 + 5).to(memory_format=layout).requires_grad_()
    return net, x, torch.randn(8, 5).double()


def one_process(layout):
    net, x, weights = case(layout)
    y = net(x)
    (y * weights).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return y.detach(), x.grad, gradients, net.state_dict()


def compare(rank: int, shares: tuple[int, int], layout, compiled: bool = False) -> None:
    y, grad_x, gradients, state = one_process(layout)
    net, x, weights = case(layout)
    names = list(net.state_dict())
    assert synchronise_batch_norm(net) is net
    assert isinstance(net.norm, GlobalBatchNorm) and net.same is net.head[1]
    assert list(net.state_dict()) == names
    start = sum(shares[:rank])
    own = slice(start, start + shares[rank])
    mine = x.detach()[own].contiguous(memory_format=layout).requires_grad_()
    if compiled:  # a norm alone: tracing it twice, and what is around it, takes seconds
        net.norm.compile(backend="aot_eager", fullgraph=True)
    result = net(mine)
    (result * weights[own]).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(result.detach(), y[own], **close)
    torch.testing.assert_close(mine.grad, grad_x[own], **close)
    for name, parameter in net.named_parameters():
        total = parameter.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, gradients[name], **close, msg=name)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], **close, msg=name)


def all_cases(rank: int) -> None:
    for shares in SHARES:
        for layout in (torch.contiguous_format, torch.channels_last):
            compare(rank, shares, layout)
    compare(rank, SHARES[0], torch.channels_last, compiled=True)
    half_precision()


def half_precision() -> None:
    """Bfloat16 in and out, statistics float32: within the rounding of one bfloat16 operation of float32's result."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(16, 4, 3, 3) + 3
    full = synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(4))).train()
    half = copy.deepcopy(full)
    y = full(x.bfloat16().float())
    z = half(x.bfloat16())
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), y, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(half[0].running_var, full[0].running_var)


def test_two_processes_equal_one():
    spawn(all_cases, 2)


def test_an_activation_behind_timms_norm_stays():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    norm = BatchNormAct2d(4, act_layer=nn.ReLU6)
    made = GlobalBatchNorm.like(norm)
    x = 4 * torch.randn(3, 4, 5, 5)
    for training in (True, False):
        expected = copy.deepcopy(norm).train(training)(x)
        found = copy.deepcopy(made).train(training)(x)
        torch.testing.assert_close(found, expected)
        assert found.min() == 0
    assert made.state_dict().keys() == norm.state_dict().keys()
