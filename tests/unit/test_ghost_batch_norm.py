"""Ghost batch norm against one batch norm a group, in every memory layout, without a copy that joins the groups."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import UserError
from models.layers.batchnorm import GhostBatchNorm


def reference(norm: GhostBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Each group by the formula."""
    parts = []
    for group in x.split(norm.virtual_batch):
        variance, mean = torch.var_mean(group, (0, 2, 3), correction=0, keepdim=True)
        normalised = (group - mean) / torch.sqrt(variance + norm.eps)
        parts.append(normalised * norm.weight[:, None, None] + norm.bias[:, None, None])
    return torch.cat(parts)


def example(layout: torch.memory_format):
    torch.manual_seed(0)
    norm = GhostBatchNorm(5, virtual_batch=4).double().train()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64) * 2 + 1
    return norm, x.contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_one_norm_a_group(layout, compiled):
    norm, x = example(layout)
    weights = torch.randn_like(x)
    torch._dynamo.reset()
    forward = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    y = forward(x)
    own = torch.autograd.grad((y * weights).sum(), [x, norm.weight, norm.bias])
    expected = reference(norm, x)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, norm.weight, norm.bias])
    torch.testing.assert_close(y, expected)
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b)
    groups = x.detach().unflatten(0, (3, 4))
    mean = groups.mean((1, 3, 4)).mean(0)
    variance = groups.var((1, 3, 4), correction=0).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.01 * mean)
    torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * variance)
    assert norm.num_batches_tracked == 1
    assert y.is_contiguous(memory_format=layout) or compiled


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_copy_joins_the_groups():
    norm, x = example(torch.channels_last)
    with Operations() as seen:
        norm(x).square().sum().backward()
    assert not {"cat", "clone", "copy_"} & set(seen.names), seen.names
    assert seen.names.count("native_batch_norm") == 3


def test_the_compiler_gets_one_norm_for_all_groups():
    """With one a group, an EfficientNet-B7 takes it more than ten minutes."""
    captured = []

    def keep(graph, inputs):
        captured.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    norm, x = example(torch.channels_last)
    torch._dynamo.reset()
    torch.compile(norm, backend=keep, fullgraph=True)(x)
    assert captured.count(torch.var_mean) == 1
    assert not {torch.cat, torch.batch_norm, torch.nn.functional.batch_norm} & set(captured)


@pytest.mark.parametrize(("virtual_batch", "rows"), [(1, 4), (0, 1)])
def test_one_value_of_a_channel_has_no_variance(virtual_batch, rows):
    """As torch's norms, which refuse it; the running variance is not NaN."""
    norm = GhostBatchNorm(5, virtual_batch).train()
    with pytest.raises(UserError, match="virtual_batch_size or batch_size 2 or more"):
        norm(torch.randn(rows, 5, 1, 1))
    assert norm.eval()(torch.randn(rows, 5, 1, 1)).isfinite().all()
    norm.train()(torch.randn(rows, 5, 2, 1))
    assert norm.running_var.isfinite().all() and norm.num_batches_tracked == 1
