"""Wrap a network: activation checkpointing, FSDP2 or DDP, torch.compile.

Transformer blocks, the children of a network's `nn.ModuleList`s, are the units that are
checkpointed and sharded.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from base import distributed
from base.distributed import World
from base.errors import UserError

GRAPHS = 64  # that torch.compile makes at most of the code of one kind of block


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Children of every outermost nn.ModuleList and of every outermost nn.Sequential of one class,
    each once."""
    if isinstance(model, nn.ModuleList) or is_stage(model):
        return list(model)
    return list(
        dict.fromkeys(block for child in model.children() for block in transformer_blocks(child))
    )


def is_stage(model: nn.Module) -> bool:
    """Whether this is a sequence of two or more modules of one class, with weights."""
    alike = isinstance(model, nn.Sequential) and len(model) > 1 and len(set(map(type, model))) == 1
    return alike and next(model.parameters(), None) is not None


@dataclass(frozen=True)
class ParallelOptions:
    """The knobs of `parallelize`, under the names that every script's configuration has."""

    # ddp, or fsdp: parameters, gradients and optimizer state sharded over the processes (FSDP2)
    parallel: str = "ddp"
    compile: bool = False
    compile_mode: str = "default"
    activation_checkpointing: bool = False
    precision: str = "fp32"
    shard_group: int = 0  # processes that share one copy under fsdp; 0 = all
    offload: bool = False  # fsdp: parameters, gradients and optimizer state in host memory


def parallelize(model: nn.Module, world: World, features) -> nn.Module:
    """Move `model` to the device and wrap it; `model(**batch)` stays the only way in.

    features: a script's configuration, or `ParallelOptions`. Parameter names do not change, so
    checkpoints are the same under every combination.
    """
    strategy = features.parallel
    check_compile_mode(features)
    model = model.to(world.device)
    structure = without_weights(model) if strategy == "fsdp" else None
    if features.activation_checkpointing:
        checkpoint_blocks(model)
    if strategy == "fsdp":
        model = shard(model, world, features)
        # for whole_model; in a tuple, or it would be a submodule
        model.structure = (structure, world.device)
    elif strategy != "ddp":
        raise UserError(f"parallel: {strategy!r} is unknown; use ddp or fsdp")
    if features.compile:
        compile_parts(model, features)
    if strategy == "ddp" and world.size > 1:
        match_strides(model)
        # the queues are equal on every process by construction: broadcasting 128 MB a step would
        # buy nothing
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        options = {"gradient_as_bucket_view": True}
        if "forward_sync_buffers" in known:
            options["forward_sync_buffers"] = False
        else:  # its older name
            options["broadcast_buffers"] = False
        model = DistributedDataParallel(model, device_ids, **options)
    return model


def check_compile_mode(features) -> None:
    """UserError for reduce-overhead where tensors of a CUDA graph would be overwritten in use."""
    if not features.compile or features.compile_mode != "reduce-overhead":
        return
    if features.parallel == "fsdp" or getattr(features, "accumulate", 1) > 1:
        raise UserError(
            "compile_mode: reduce-overhead goes with parallel: ddp and accumulate: 1 alone, for "
            "its CUDA graphs reuse the memory of gradients and weights; use default or blocks"
        )


def compile_parts(model: nn.Module, features) -> None:
    """torch.compile in place, so that names in checkpoints stay.

    By blocks where `compile_mode` says so, and under FSDP, whose gathers break a graph of the whole.
    """
    if torch.__version__ < (2, 7):
        from torch._inductor import config as inductor

        # its vectors on the CPU lose gradients of tokens that a batch repeats
        inductor.cpp.simdlen = 1
    mode = features.compile_mode
    parts = [model]
    if mode == "blocks" or features.parallel == "fsdp":
        parts = transformer_blocks(model)
        # Blocks share code, which has a graph for every shape, mask and pass without gradients;
        # beyond torch's limit of 8 the others would stay eager.
        limits = torch._dynamo.config
        name = "recompile_limit"
        if not hasattr(limits, name):  # before torch 2.7
            name = "cache_size_limit"
        setattr(limits, name, max(GRAPHS, getattr(limits, name)))
    for part in parts:
        # of one class, but not of one size: torch would take sizes of maps for variable ones
        convolves = any(isinstance(module, nn.Conv2d) for module in part.modules())
        dynamic = False if convolves and part is not model else None
        part.compile(mode=None if mode in ("default", "blocks") else mode, dynamic=dynamic)


def match_strides(model: nn.Module) -> None:
    """Let gradients of kernels [O,I,h,w] have the strides of their weights, which DDP's buckets want.

    Convolutions give them channels last. Where I or h and w are 1, memory is the same and only the
    strides that nobody uses differ; of other kernels autograd makes a copy itself.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 4 and 1 in parameter.shape[1:]:
            parameter.register_hook(_with_plain_strides)


def _with_plain_strides(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.flatten(1).view(gradient.shape)


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute each transformer block in the backward pass instead of keeping its activations.

    In place; parameter names stay. The recomputation has the dtypes and the random numbers of the
    forward pass.
    """
    for block in transformer_blocks(model):
        block.forward = functools.partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable, *args, **kwargs):
    """`forward(*args, **kwargs)`, kept by its inputs alone."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # the compiler updates a buffer once, and takes no contexts
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = functools.partial(_forward_and_recomputation, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _forward_and_recomputation(block: nn.Module):
    """The contexts of the two passes: running statistics follow the batch in the first alone."""
    return contextlib.nullcontext(), _frozen_statistics(block)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module):
    """Batch norms update buffers that are thrown away; their own running statistics stay."""
    norms = [module for module in block.modules() if "running_mean" in module._buffers]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            for name, buffer in norm._buffers.items():
                norm._buffers[name] = None if buffer is None else torch.empty_like(buffer)
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def knows_fsdp() -> bool:
    """Whether this torch's FSDP2 leaves given parameters whole: from 2.7 on."""
    from torch.distributed.fsdp import fully_shard

    return "ignored_params" in inspect.signature(fully_shard).parameters


def shard(model: nn.Module, world: World, features) -> nn.Module:
    """FSDP2: each block is a unit, what remains is the root unit. In place; `whole_model` gathers it
    again.

    In bf16 the blocks' weights travel as bf16 and the gradients are reduced in float32; the
    parameters themselves stay float32. The root unit computes heads and losses in float32 and batch
    norms take float32 weights, so these travel whole. With a `shard_group` smaller than the number
    of processes, each group holds a whole copy (HSDP): gathers stay within a group, gradients are
    averaged between groups.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        raise UserError(
            "parallel: fsdp needs a launcher; start with torchrun (one process is enough)"
        )
    if not knows_fsdp():
        raise UserError(
            f"parallel: fsdp needs torch 2.7 or newer, this is {torch.__version__}; use ddp"
        )
    # FSDP2 takes no scalars (temperatures): they stay whole, and their gradients are averaged here
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)
    options = {"ignored_params": scalars, "mesh": device_mesh(world, features.shard_group)}
    if features.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    half = MixedPrecisionPolicy()
    if features.precision == "bf16":  # of what comes in autocast chooses the type
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in transformer_blocks(model):
        if any(True for _ in block.parameters()):
            whole = any("running_mean" in module._buffers for module in block.modules())
            fully_shard(block, mp_policy=MixedPrecisionPolicy() if whole else half, **options)
            if world.device.type == "cpu" and half.param_dtype and not whole:
                _norms_in_float32(block)
    return fully_shard(model, **options)


def _norms_in_float32(block: nn.Module) -> None:
    """Layer norms in float32, weights as they travel.

    CUDA's autocast casts the operands of layer_norm to float32, so there this would change nothing.
    The CPU's does not: a float32 input beside FSDP's bf16 weights would be an error.
    """

    def forward(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        bias = None if norm.bias is None else norm.bias.float()
        return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), bias, norm.eps)

    for module in block.modules():
        if type(module) is nn.LayerNorm and module.elementwise_affine:
            module.forward = functools.partial(forward, module)


def device_mesh(world: World, shard_group: int):
    """Processes of FSDP2: one line of all, or for HSDP a table with a row for each whole copy.
    UserError where groups of this size do not come out even."""
    from torch.distributed.device_mesh import init_device_mesh

    size = shard_group or world.size
    if size > world.size or world.size % size:
        raise UserError(
            f"shard_group: {world.size} processes are no whole number of groups of {size}; take a "
            f"number that divides {world.size}, usually the GPUs of a node"
        )
    kind = world.device.type
    if size == world.size:
        return init_device_mesh(kind, (world.size,))
    shape = (world.size // size, size)
    names = ("replicate", "shard")
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def _average_gradient(parameter: torch.Tensor) -> None:
    """Mean over the processes; averaging an accumulated gradient again changes nothing, so every
    pass may do it."""
    parameter.grad.copy_(distributed.all_reduce(parameter.grad, "mean"))


def share_matrices(world: World) -> None:
    """Tensor parallelism over all processes: fairscale's layers share their matrices from here on."""
    if world.size == 1:
        raise UserError("--tensor-parallel needs several processes: start with torchrun")
    from fairscale.nn.model_parallel import initialize_model_parallel

    initialize_model_parallel(world.size)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device and take no memory; buffers are the model's."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def whole_model(model: nn.Module) -> nn.Module:
    """The network to evaluate: itself without wrappers, or under FSDP2 a copy with all the weights
    (collective)."""
    if not hasattr(model, "structure"):
        return distributed.unwrap(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    structure, device = model.structure
    whole = without_weights(structure)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(weights, assign=True)
    return whole.to(device)  # offloaded weights are in host memory


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool):
    """Around a forward and backward pass of gradient accumulation: gradients travel only in the
    last one."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch's tensors on `device`; copies from pinned memory do not wait."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }
