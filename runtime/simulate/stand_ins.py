"""A GPU that is not there: fake CPU tensors stand in for a card's, with CUDA's kernels and autocast rules.

torch refuses a backward pass on fake CUDA tensors where no card is present. Inside `simulated_gpu()`
fake CPU tensors behave as CUDA's would where that changes memory, dtypes or operations: attention
is the kernel that a card picks, dropout is the fused one, and autocast computes in float32 what it
computes in float32 on CUDA. Only the functions that this repository calls are covered.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

# of torch's list for CUDA (docs: "CUDA Ops that can autocast to float32"), what F and Tensor offer
FLOAT32_FUNCTIONS = (
    "layer_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "softplus",
    "cross_entropy",
    "nll_loss",
    "normalize",
    "binary_cross_entropy_with_logits",
)
READABLE = 256  # numbers of a constant that its fake keeps beside it
FLOAT32_METHODS = ("softmax", "log_softmax", "exp", "log", "pow", "rsqrt", "norm", "cumsum", "prod")


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Fake tensors with CUDA's kernels and autocast."""
    with _replaced(_kernels()), simulated_cpu():
        yield


@contextlib.contextmanager
def simulated_cpu() -> Iterator[None]:
    """Fake tensors with the CPU's own kernels, to compare with a real step."""
    with _replaced(_fallbacks()), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def _replaced(stand_ins: Iterator[tuple]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for target, name, replacement in stand_ins:
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _kernels() -> Iterator[tuple]:
    """(object, attribute, stand-in): what CUDA computes otherwise."""
    yield F, "scaled_dot_product_attention", attention
    yield F, "dropout", _dropout
    yield F, "rms_norm", _rms_norm
    for name in FLOAT32_FUNCTIONS:
        yield F, name, _in_float32(getattr(F, name))
    for name in FLOAT32_METHODS:  # torch's functions: TorchDynamo 2.6 fails at Tensor.exp(x)
        yield Tensor, name, _in_float32(getattr(torch, name))


def _fallbacks() -> Iterator[tuple]:
    """(object, attribute, stand-in): what torch does by looking at a tensor's data."""
    yield nn.init, "_no_grad_trunc_normal_", _unchanged  # torch's asks the data of its samples
    yield nn.Module, "_apply", _apply  # torch's swaps tensors, which fakes refuse
    yield Tensor, "__deepcopy__", _deepcopy  # torch's copies a storage
    # timm reads its rates of stochastic depth, a number for each block
    yield torch, "linspace", _linspace(torch.linspace)
    yield fake_tensor, "CONSTANT_NUMEL_LIMIT", READABLE


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch picks on a card: flash for half precision without mask, else the
    memory-efficient one; the math path where neither takes the inputs."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (
            x.repeat_interleave(repeats, 1, output_size=query.shape[1]) for x in (key, value)
        )
    width = query.shape[-1]
    if query.dtype == torch.float64 or width > 256:
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )[0]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and width % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, keep, dropout_p, is_causal, scale=scale)[0]


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as torch hands it to the kernel: added, rows aligned to 16 values, expanded."""
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        bias.masked_fill_(mask.logical_not(), float("-inf"))
    length = bias.shape[-1]
    if length % 16:
        bias = F.pad(bias, (0, 16 - length % 16))[..., :length]
    return bias.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _rms_norm(x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """CUDA's fused kernel reads, keeps and writes what layer norm's does; the CPU has none."""
    return F.layer_norm(x, shape, weight, None, eps)


def _in_float32(function):
    """`function` under CUDA's autocast: half-precision tensors become float32 first."""

    def wrapped(x, *args, **kwargs):
        half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        if not (half and torch.is_autocast_enabled("cpu")):
            return function(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = [_to_float32(a) for a in args]
            kwargs = {name: _to_float32(a) for name, a in kwargs.items()}
            return function(x.float(), *args, **kwargs)

    return wrapped


def _to_float32(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _unchanged(tensor=None, *args, **kwargs):
    return tensor


def _linspace(function):
    """`function` with values that can be read, as far as `READABLE` goes."""

    def wrapped(*args, **kwargs):
        with unset_fake_temporarily():
            values = function(*args, **{**kwargs, "device": "cpu"})
        return torch.tensor(values.tolist(), dtype=values.dtype, device="cpu")

    return wrapped


def _deepcopy(self: Tensor, memo: dict) -> Tensor:
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def _apply(self: nn.Module, function, recurse: bool = True) -> nn.Module:
    """nn.Module._apply that overwrites each tensor; a tied one once."""
    done: dict[int, tuple] = {}
    for module in self.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in done:
                        done[id(tensor)] = tensor, _applied(function, tensor)
                    table[name] = done[id(tensor)][1]
    return self


def _applied(function, tensor: Tensor) -> Tensor:
    with torch.no_grad():
        new = function(tensor)
    if not isinstance(tensor, nn.Parameter):
        return new
    if new.device == tensor.device and new.dtype == tensor.dtype and new.shape == tensor.shape:
        return tensor
    return nn.Parameter(new, tensor.requires_grad)
