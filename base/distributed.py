"""One way into torch.distributed for torchrun, Slurm / submitit and a single process.

Every helper is the identity on one process, so scripts never ask how many there are.
"""

import atexit
import contextlib
import datetime
import glob
import itertools
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from base.errors import UserError
from base.flight_recorder import entering
from base.processes import end_with_parent


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def alone(device: torch.device | str) -> World:
    """A single process that computes on `device`."""
    return World(rank=0, size=1, local_rank=0, device=torch.device(device))


TIMEOUT = datetime.timedelta(minutes=30)  # of a collective
ALONE = alone("cpu")


def init(device: str = "auto") -> World:
    """Join the process group that the launcher describes, or stand alone.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; `srun` sets SLURM_PROCID,
    SLURM_LOCALID and SLURM_STEP_NUM_TASKS, from which the others are derived. `device` is `auto`
    (CUDA where present), `cuda` or `cpu`;
    the backend is nccl for tensors on CUDA and gloo for those on the CPU.

    Raises UserError where CUDA is asked for and absent, where a node has fewer GPUs than processes,
    or where the variables tell of half a launcher.
    """
    env = os.environ
    # the variable of a step: a shell inside an allocation has the job's SLURM_NTASKS, but is no
    # task of it
    if "RANK" not in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in env:
        _adopt_slurm(env)
    rank, size, local_rank = _place(env)
    chosen = _device(device, local_rank)
    if "TORCHELASTIC_RUN_ID" in env:
        end_with_parent()  # torchrun; left alone, it would hold its GPU and its output folder
    if "RANK" in env and not dist.is_initialized():
        # gloo beside nccl is for tensors in host memory: those of an offloaded optimizer
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        kwargs = {"device_id": chosen} if chosen.type == "cuda" else {}
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            kwargs |= {"store": _agents_store(rank, size), "rank": rank, "world_size": size}
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, **kwargs)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"MASTER_PORT={env['MASTER_PORT']}: another program has this port; set MASTER_PORT "
                "to another number, the same for all processes"
            ) from None
    return World(rank, size, local_rank, chosen)


def _place(env: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes and rank on this node. Without RANK the process is alone, whatever
    other variables are left over. UserError."""
    if "RANK" not in env:
        return 0, 1, 0
    lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if lacking:
        raise UserError(
            f"RANK={env['RANK']} is set, but not {', '.join(lacking)}: start with torchrun, or, for "
            "a process alone, `unset RANK`"
        )
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local_rank, port = _number(env, "LOCAL_RANK"), _number(env, "MASTER_PORT")
    if not 0 <= port <= LAST_PORT:
        raise UserError(f"MASTER_PORT={port}: ports are numbers up to {LAST_PORT}; set another")
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} of WORLD_SIZE={size}: ranks are counted from 0")
    return rank, size, local_rank


def _number(env: Mapping[str, str], name: str) -> int:
    """A whole number that a launcher sets, 0 where it does not. UserError."""
    try:
        return int(env.get(name, 0))
    except ValueError:
        raise UserError(
            f"{name}={env[name]} is no whole number: start with torchrun or srun, which set it, or, "
            f"for a process alone, `unset {name}`"
        ) from None


PAUSE = 0.1  # seconds
LAST_PORT = 65535


def _agents_store(rank: int, size: int) -> dist.Store:
    """torchrun's store under a name that rank 0 draws: torchrun keeps its store when it starts
    processes again (`--max-restarts`), and they would look for each other at the addresses that
    those before have left there.

    A process asks under its rank for the name and hears it under a word of its own, which nobody
    before can have answered. Rank 0 answers until it is heard, for the word that it finds first may
    be a dead process's.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
    meeting = dist.PrefixStore("quintet", agents)
    own = secrets.token_hex(8)
    if rank > 0:
        meeting.set(str(rank), own)
        name = meeting.get(own).decode()
        meeting.set(f"{name}/{rank}", "heard")
        return dist.PrefixStore(name, meeting)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    missing = [str(other) for other in range(1, size)]
    while missing:
        for other in missing:
            if meeting.check([other]):
                meeting.set(meeting.get(other).decode(), own)
        time.sleep(PAUSE)
        missing = [other for other in missing if not meeting.check([f"{own}/{other}"])]
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(missing)}: not there after {TIMEOUT}")
    return dist.PrefixStore(own, meeting)


def store(name: str) -> dist.Store:
    """The processes' store under a name."""
    return dist.PrefixStore(f"quintet/{name}", dist.distributed_c10d._get_default_store())


def _adopt_slurm(env) -> None:
    """Translate Slurm's variables into torchrun's; two jobs on a node get ports of their own, below
    those that Linux gives to connections."""
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    # empty where the batch file got no answer of scontrol
    env["MASTER_ADDR"] = env.get("MASTER_ADDR") or first_host(nodes)
    env.setdefault("MASTER_PORT", str(20000 + _number(env, "SLURM_JOB_ID") % 12000))


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-007,9],login1` gives `gpu003`; an empty list gives
    this host."""
    if not nodelist:
        return socket.gethostname()
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    ranges, _, suffix = tail.partition("]")
    return head + ranges.split(",")[0].split("-")[0] + suffix.split(",")[0]


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sign = sign_of_gpu(os.environ) if device == "cpu" and local_rank == 0 else None
        if sign is not None:
            print(
                f"warning: {sign}, but torch {torch.__version__} sees no GPU: this runs on the CPU. "
                "Look at `nvidia-smi`, and whether this torch is one for CUDA and for this driver; "
                "or say --device cpu",
                file=sys.stderr,
                flush=True,
            )
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: no device of torch; use auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):  # mps has no float64, for one
        raise UserError(
            f"--device {device}: the scripts compute on CUDA or the CPU; use auto, cpu or cuda"
        )
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: no CUDA device is visible; use --device cpu, or look at `nvidia-smi`"
        )
    count = torch.cuda.device_count()
    if count == 1 and _has_its_own_gpu(os.environ):
        local_rank = 0
    if chosen.index is not None and chosen.index >= count:
        raise UserError(f"--device {device}: this node shows {count} GPUs, counted from cuda:0")
    if chosen.index is None and local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this node shows {count}; start as many processes a "
            "node as it has GPUs (--nproc_per_node)"
        )
    chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
    torch.cuda.set_device(chosen)
    allow_tf32(False)  # until a script asks for bf16 or fp16: its Precision then allows it
    return chosen


NVIDIA = "/dev/nvidia[0-9]*"  # devices of the driver


def sign_of_gpu(env: Mapping[str, str]) -> str | None:
    """What tells that this process should have a GPU of NVIDIA's; None where nothing does, and where
    an empty or negative CUDA_VISIBLE_DEVICES hides all."""
    hidden = env.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        return None
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if env.get(name):
            return f"{name}={env[name]} names a GPU"
    found = sorted(glob.glob(NVIDIA))
    return f"{found[0]} is there" if found else None


def _has_its_own_gpu(env: Mapping[str, str]) -> bool:
    """Whether Slurm shows each task another GPU alone, by --gpus-per-task 1 or --gpu-bind."""
    binds = env.get("SLURM_GPUS_PER_TASK") == "1" or env.get("SLURM_GPU_BIND", "none") != "none"
    return binds and "TORCHELASTIC_RUN_ID" not in env


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round the factors of float32 products and convolutions to TF32, 10 bits of
    mantissa. PyTorch's own default is no for products and yes for convolutions."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def shutdown() -> None:
    """Leave the process group, so that the launcher sees a clean end."""
    if dist.is_initialized():
        # A thread of gloo frees the last tensors, for which it needs Python's lock; torch 2.6 holds
        # it while it waits for that thread, for ever. Meanwhile the lock is free:
        time.sleep(PAUSE)
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with an exit status, on any rank, whatever the others are doing.

    Of several processes none takes the interpreter's own way out: while Python is taken down, a
    thread of gloo may still let go of the last collective's tensors, for which it needs Python, and
    the process would abort with status 134. `shutdown` would wait for collectives under way. What
    Python does at its end comes first: threads are joined, functions of `atexit` called.
    """
    if world_size() > 1:
        threading._shutdown()  # type: ignore[attr-defined]  # joins them, idle pools included
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(*texts: object) -> None:
    """Print one line for each text on rank 0."""
    if rank() == 0:
        print(*texts, sep="\n", flush=True)


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        with entering("barrier"):
            dist.barrier()


# ---- tensors without gradient
def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Sum, maximum or mean (`sum`, `max`, `mean`) over the processes as a new tensor; no
    gradient."""
    result = tensor.detach().clone()
    if world_size() > 1:
        with entering("all_reduce"):
            dist.all_reduce(result, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        if op == "mean":
            result /= world_size()
    return result


def mean_count(masks: Sequence[Tensor]) -> Tensor:
    """How many entries are True, 0-d float32: the mean over these bool tensors, one of each
    micro-batch, and over the processes."""
    counts = torch.stack([mask.sum() for mask in masks])
    return all_reduce(counts.float().mean(), "mean")


def any_rank(flag: bool, device: torch.device) -> bool:
    """True where any process says so (an interrupt, a NaN): one tiny all-reduce and host sync."""
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor(int(flag), device=device), "max").item())


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[B,...] of every rank -> [world*B,...] in rank order, without gradient; B must be the same on
    all ranks."""
    if world_size() == 1:
        return x.detach()
    everyone = x.new_empty(world_size() * len(x), *x.shape[1:])
    # the second is its name until torch 2.14
    collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with entering("all_gather"):
        # all processes, in so many words: torch 2.6 compiles it no otherwise
        collect(everyone, x.detach().contiguous(), group=None)
    return everyone


def gather_rows(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    """Assemble a table whose rows were computed on different processes.

    rows [n, ...] with `indices` int64 [n] on this process -> [total, ...] on every process, each
    row written once.
    Used by evaluation: the result does not depend on the number of processes. UserError where they
    disagree about `total`.
    """
    indices = indices.to(rows.device)
    if world_size() > 1:
        sizes = torch.tensor([len(rows), total, -total], device=rows.device)
        most, largest, smallest = all_reduce(sizes, "max").tolist()
        check_same_total(largest, -smallest)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        where = indices.new_full((most,), -1)
        where[: len(rows)] = indices
        rows = gather(padded)
        indices = gather(where)
        rows, indices = rows[indices >= 0], indices[indices >= 0]
    table = rows.new_zeros(total, *rows.shape[1:])
    table[indices] = rows
    return table


def check_same_total(largest: int, smallest: int) -> None:
    """UserError where processes count different numbers of entries to evaluate, as nodes with copies of
    their own may."""
    if largest != smallest:
        raise UserError(
            f"the processes evaluate different data: one has {largest:,} entries, another "
            f"{smallest:,}; give all of them the same files"
        )


def gather_parts(
    parts: Sequence[Tensor], indices: Sequence[int], total: int, device: torch.device
) -> Tensor:
    """`gather_rows` of the parts [n,...] joined. A process without any learns shape and dtype from
    the others."""
    kinds = gather_objects((parts[0].shape[1:], parts[0].dtype) if parts else None)
    shape, dtype = next(kind for kind in kinds if kind is not None)
    rows = torch.cat(list(parts)) if parts else torch.zeros(0, *shape, dtype=dtype, device=device)
    return gather_rows(rows, torch.as_tensor(list(indices), dtype=torch.int64), total)


# ---- objects
def gather_objects(value) -> list:
    """`value` of every process in rank order. Only for our own small data (pickled between our own
    processes)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with entering("all_gather"):
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """`value` of rank 0, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    with entering("broadcast"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work, share: bool = True, patient: bool = False):
    """`work()` on rank 0 alone; the result on every process (`share=False`: None on the others).

    A failure there is raised on every process, instead of leaving the others waiting for rank 0.
    patient: for work that may take longer than the time limit of collectives; the others wait for
    it without one.
    """
    failure = None
    result = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return result
    if patient:
        wait_for_all()
    message, shared = broadcast_object(
        (None if failure is None else str(failure), result if share else None)
    )
    if message is not None:
        raise failure if failure is not None else UserError(f"rank 0: {message}")
    return result if dist.get_rank() == 0 else shared


_WAITS = itertools.count()


def wait_for_all() -> None:
    """Wait for every process, however long it takes: no collective runs, and no time limit, while
    the slowest works. Where a process dies, its launcher ends the others."""
    if not dist.is_initialized():
        return
    arrived = store("waits")
    name = str(next(_WAITS))
    arrived.add(name, 1)
    pause = 0.01
    while arrived.add(name, 0) < dist.get_world_size():
        time.sleep(pause)
        pause = min(2 * pause, 2.0)  # the store answers all processes
    barrier()  # all have seen it: the store may go away


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block, then the others do: a file is written once and read by all.

    A failure of rank 0 is raised on every process, instead of leaving the others waiting.
    """
    if not dist.is_initialized():
        yield
        return
    failure = None
    if dist.get_rank() == 0:
        try:
            yield
        except Exception as error:
            failure = error
    wait_for_all()
    message = broadcast_object(None if failure is None else str(failure))
    if message is not None:
        raise failure if failure is not None else UserError(f"rank 0: {message}")
    if dist.get_rank() != 0:
        yield


# ---- collectives with gradient, inside losses
# Gradients follow the convention of data parallelism: each rank's loss is the mean over its own
# rows, the wrapper averages gradients over ranks, and together that is the gradient of the mean
# over the global batch.


class _GatherWithGradient(torch.autograd.Function):
    """all_gather whose backward sums the ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if grad.is_cuda:  # gloo has no reduce_scatter
            own = grad.new_empty(ctx.rows, *grad.shape[1:])
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            with entering("reduce_scatter"):
                scatter(own, grad)
            return own
        return all_reduce(grad).narrow(0, rank() * ctx.rows, ctx.rows)


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`, and every rank's loss sends its gradient back to the rank whose rows it used."""
    return x if world_size() == 1 else _GatherWithGradient.apply(x)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The network inside DDP and torch.compile wrappers (FSDP2 does not wrap). For evaluation, not
    for losses."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner
