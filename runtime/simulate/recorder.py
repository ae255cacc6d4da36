"""Every operation of a step on fake tensors, with its FLOPs, bytes, memory, host waits and collectives."""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from runtime.flops import operation_flops
from runtime.simulate.fusion import Fusion, Group, View

ROOT = f"{Path(__file__).resolve().parents[2]}/"
NOT_OURS = ("/runtime/simulate/", "/site-packages/")  # an environment may lie in this repository
ALIGNMENT = 512  # bytes, of CUDA's caching allocator

# operations whose result the host must see before it can continue
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "is_nonzero",
    "equal",
}
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# operations that read as much of their first tensor as they return
GATHERING = {"embedding", "gather", "index", "index_select", "_unsafe_index"}
DEVICE_OF = torch.ops.prim.device.default
VIEWS = {"detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias"}


@dataclass(frozen=True)
class Operation:
    """One kernel launch (or, of a list of tensors, a few)."""

    phase: str
    name: str
    dtype: torch.dtype | None
    flops: int
    read: int  # bytes
    written: int
    line: str  # file:line of this repository that called it; of a backward pass, its forward's
    launches: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One message to other processes: `size` bytes of the whole tensor that is reduced or gathered."""

    phase: str
    name: str
    size: int


@dataclass
class Trace:
    """What a step did."""

    operations: list[Operation] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    waits: Counter = field(default_factory=Counter)  # (phase, what, line) -> times
    copies: Counter = field(default_factory=Counter)  # the same, of copies that do not wait
    peak: int = 0
    peak_parts: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""

    @property
    def flops(self) -> int:
        return sum(o.flops for o in self.operations)

    @property
    def bytes(self) -> int:
        return sum(o.read + o.written for o in self.operations)

    @property
    def launches(self) -> int:
        return sum(o.launches for o in self.operations)


class Recorder(TorchDispatchMode):
    """Record what runs inside. Memory: each storage once, rounded as CUDA's allocator rounds it.

    with simulated_gpu(), Recorder() as recorder:
        recorder.adopt(model.parameters(), "weights")
        step(); recorder.restart(); step()
    recorder.trace
    """

    def __init__(self, fakes: bool = True):
        super().__init__()
        self.fakes = fakes  # False: real tensors, which may be read
        self.trace = Trace()
        self.phase = "setup"
        self.memory_only = False  # of a step before `restart`, whose operations nobody reads
        self.live: dict[int, tuple[int, str]] = {}  # storage -> size, part
        self.parts: Counter = Counter()
        self.now = 0
        self.lines: dict[int, str] = {}  # number of an autograd node -> line of its forward
        self.hosts: set[int] = set()  # storages in the host's memory
        self.fusion = Fusion()
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        for target, name, replacement in self._watched() if self.fakes else ():
            self.stack.enter_context(mock.patch.object(target, name, replacement))
        return super().__enter__()

    def __exit__(self, *error):
        self.stack.close()
        return super().__exit__(*error)

    def restart(self) -> None:
        """Forget the steps so far, which filled the optimizer's state; what lives stays."""
        self.trace = Trace(peak=self.now, peak_parts=dict(self.parts))
        self.fusion = Fusion()
        self.lines.clear()

    # ---- memory

    def adopt(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors' memory as `part`."""
        for tensor in tensors:
            self.track(tensor, part)
            key = _local(tensor).untyped_storage()._cdata
            size, old = self.live.get(key, (0, part))
            self.live[key] = (size, part)
            self.parts[old] -= size
            self.parts[part] += size

    def track(self, tensor: Tensor, part: str) -> None:
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.hosts:
            return
        size = -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        self.live[key] = (size, part)
        self._grow(size, part)
        weakref.finalize(storage, self._free, key)

    def resize(self, storage, size: int) -> None:
        """FSDP frees and refills its gathered parameters by resizing their storages."""
        if storage._cdata in self.live:
            old, part = self.live[storage._cdata]
            new = -(-size // ALIGNMENT) * ALIGNMENT
            self.live[storage._cdata] = (new, part)
            self._grow(new - old, part)

    def _grow(self, size: int, part: str) -> None:
        self.now += size
        self.parts[part] += size
        if self.now > self.trace.peak:
            self.trace.peak = self.now
            self.trace.peak_phase = self.phase
            self.trace.peak_parts = dict(self.parts)

    def _free(self, key: int) -> None:
        size, part = self.live.pop(key, (0, ""))
        self.hosts.discard(key)
        self.fusion.free(key)
        self.now -= size
        self.parts[part] -= size

    # ---- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE_OF:  # two of three calls: autograd asks for each tensor's device
            return args[0].device  # as `func` answers, which asks the fakes' mode
        namespace, _, name = str(func._overloadpacket).partition(".")
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if namespace in ("c10d", "_c10d_functional"):
            self._note_collective(name, args, tensors)
            given = namespace == "c10d" and self.fakes
            return _sent(func, args, kwargs) if given else func(*args, **kwargs)
        if tensors and all(self.is_host(t) for t in tensors):
            if self.fakes and name == "_local_scalar_dense":  # no data, but nothing to wait for
                return stand_in_of(args[0])
            return self._mark_host(func(*args, **kwargs))
        waited, out = self._wait(name, args, kwargs, tensors)
        if not self.fakes:
            out = func(*args, **kwargs)
        elif not waited:  # fused updates have no rule for fakes, and give nothing
            out = None if name.startswith("_fused_") else func(*args, **kwargs)
        results = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
        launched = not (getattr(func, "is_view", False) or name in VIEWS or name in ALLOCATING)
        noted = launched and namespace == "aten" and not self.memory_only
        if noted and (tensors or results):
            self._note(func, name, args, kwargs, tensors, results, out)
        for result in results:
            self.track(result, self.part())
        return out

    def part(self) -> str:
        """What the memory that is allocated now is for, until somebody adopts it."""
        return {"backward": "temporaries", "optimizer": "optimizer"}.get(self.phase, "activations")

    def _wait(self, name: str, args, kwargs, tensors: list[Tensor]) -> tuple[bool, object]:
        """(True, a stand-in for the result) where the host would wait for this operation."""
        if name == "_local_scalar_dense":
            self.wait("a value is read (.item(), float(), bool(), if)")
            return True, stand_in_of(args[0])
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and len(args) > 1:
            masks = [
                i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            ]
            if masks:
                self.wait("indexing by a boolean mask")
                return True, args[0].clone() if name == "index" else args[0]
        if name in WAITING:
            self.wait(name)
            if name == "nonzero":
                return True, args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.int64)
            if name == "masked_select":
                return True, args[0].flatten()
            if name in ("equal", "is_nonzero"):
                return True, True
        if name == "repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        return False, None

    def wait(self, what: str) -> None:
        """Note that the host waits for the card here."""
        self.trace.waits[(self.phase, what, _calling_line())] += 1

    def _note(self, func, name, args, kwargs, tensors, results, out) -> None:
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        of_lists = name.startswith(("_foreach", "_fused", "_amp_foreach"))
        filled = {id(value) for key, value in kwargs.items() if key.startswith("out")}
        inputs = [tensor for tensor in tensors if id(tensor) not in filled]
        sources = _views(inputs)
        targets = _storages(results)
        if name in GATHERING:
            rows = min(sources[0].size, sum(map(_bytes, results)))
            sources[0] = replace(sources[0], size=rows)
        read = sum(view.size for view in sources)
        written = sum(map(_bytes, results))
        if of_lists and not results:
            written = sum(map(_bytes, lists[0])) if name.startswith("_foreach") else read * 3 // 4
        floating = [t.dtype for t in [*tensors, *results] if t.is_floating_point()]
        flops = operation_flops(func._overloadpacket, args, kwargs, out)
        line = self._line()
        if flops or of_lists:
            self.fusion.product(sources, targets or _storages(inputs))
        else:
            copy = _copied(inputs[0], results[0]) if name == "_to_copy" else None
            elementwise = name == "_to_copy" or torch.Tag.pointwise in func.tags
            self.fusion.fuse(sources, targets, self.phase, line, copy, elementwise)
        self.trace.operations.append(
            Operation(
                phase=self.phase,
                name=name,
                dtype=floating[0] if floating else None,
                flops=flops,
                read=read,
                written=written,
                line=line,
                # a launch of a list takes about a hundred tensors
                launches=max(1, sum(map(len, lists)) // 100) if of_lists else 1,
                shape=_largest_shape(tensors),
            )
        )

    def _line(self) -> str:
        """The calling line; in autograd's own operations the line of the forward operation."""
        line = _calling_line()
        node = torch._C._current_autograd_node()
        if node is not None and line.startswith("runtime/optim"):
            return self.lines.get(node._sequence_nr(), line)
        if torch.is_grad_enabled():
            self.lines.setdefault(torch.autograd._get_sequence_nr() - 1, line)
        return line

    def _note_collective(self, name: str, args, tensors: list[Tensor]) -> None:
        sizes = [_bytes(t) for t in tensors]
        # of a gather and of a scatter, the largest list is the whole
        is_sum = is_all_reduce(name) or name.startswith("broadcast")
        whole = sum(sizes) if is_sum else max(sizes, default=0)
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        whole = max([whole, *(sum(map(_bytes, a)) for a in lists)])
        self.trace.collectives.append(Collective(self.phase, name, whole))
        self.fusion.product(_views(tensors), _storages(tensors))
        for tensor in tensors:
            _, part = self.live.get(_local(tensor).untyped_storage()._cdata, (0, ""))
            if part in ("activations", "temporaries"):
                self.adopt([tensor], "communication")

    def finish(self) -> Trace:
        """The trace of the steps since `restart`, with its fused groups."""
        self.trace.groups = self.fusion.finish()
        return self.trace

    # ---- the host's memory

    def is_host(self, tensor: Tensor) -> bool:
        return _local(tensor).untyped_storage()._cdata in self.hosts

    def _mark_host(self, out):
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = _local(tensor).untyped_storage()
                self.hosts.add(storage._cdata)
                weakref.finalize(storage, self.hosts.discard, storage._cdata)
        return out

    def _watched(self) -> Iterator[tuple]:
        """Python's ways between host and card, which look alike where the CPU stands in for the card."""
        yield torch, "tensor", self._watch_factory(torch.tensor)
        yield torch, "as_tensor", self._watch_factory(torch.as_tensor)
        yield torch, "zeros", self._watch_zeros(torch.zeros)
        for name in ("cpu", "numpy", "tolist"):
            yield Tensor, name, self._watch_read(getattr(Tensor, name), f".{name}()")
        yield Tensor, "to", self._watch_to(Tensor.to)
        yield torch.UntypedStorage, "resize_", self._watch_resize(torch.UntypedStorage.resize_)

    def _watch_factory(self, function):
        """The card is a torch.device here; libraries write "cpu" for the host's memory."""

        def wrapped(data, *args, **kwargs):
            if isinstance(data, Tensor):
                return function(data, *args, **kwargs)
            if kwargs.get("device") in (None, "cpu"):
                return self._mark_host(function(data, *args, **kwargs))
            self.wait(f"torch.{function.__name__}(…, device=…): a blocking copy to the card")
            return function(data, *args, **kwargs)

        return wrapped

    def _watch_zeros(self, function):
        """Optimizers count their steps in the host's memory."""

        def wrapped(*args, **kwargs):
            made = function(*args, **kwargs)
            on_host = made.ndim == 0 and kwargs.get("device") in (None, "cpu")
            return self._mark_host(made) if on_host else made

        return wrapped

    def _watch_read(self, function, what: str):
        def wrapped(tensor, *args, **kwargs):
            if not self.is_host(tensor):
                self.wait(f"{what}: a copy to the host")
            if what == ".cpu()":
                return self._mark_host(tensor.clone())
            if what == ".tolist()":
                return [0.0] * len(tensor) if tensor.ndim else 0.0
            return function(tensor, *args, **kwargs)

        return wrapped

    def _watch_to(self, function):
        def wrapped(tensor, *args, **kwargs):
            device = kwargs.get("device")
            for argument in args[:1]:
                if isinstance(argument, (str, torch.device)):
                    device = argument
            if device is None or not self.is_host(tensor):
                return function(tensor, *args, **kwargs)
            key = (self.phase, ".to(device): a copy to the card", _calling_line())
            if kwargs.get("non_blocking"):
                self.trace.copies[key] += 1
            else:
                self.trace.waits[key] += 1
            return torch.empty(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)

        return wrapped

    def _watch_resize(self, function):
        def wrapped(storage, size):
            function(storage, size)
            self.resize(storage, size)

        return wrapped


def _sent(func, args: tuple, kwargs: dict):
    """A collective of fake tensors: the fake group looks at none, and torch 2.6 takes real ones alone."""
    with unset_fake_temporarily():
        empty = tree_map_only(Tensor, lambda _: torch.empty(0), (args, kwargs))
        out = func(*empty[0], **empty[1])
    return (args[0], out[1]) if isinstance(out, tuple) else out


def is_all_reduce(name: str) -> bool:
    """Whether a collective leaves the whole, reduced, with every process."""
    return "reduce" in name and "scatter" not in name


def stand_in_of(value: Tensor) -> bool | int | float:
    """What Python reads of a fake value: true, 1, or 100.0, which counts steps far from the first."""
    if value.dtype == torch.bool:
        return True
    return 100.0 if value.dtype.is_floating_point else 1


def _local(tensor: Tensor) -> Tensor:
    """The part of an FSDP parameter that this process has."""
    return getattr(tensor, "_local_tensor", tensor)


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory that reading all of the tensor touches: an expanded one is no larger than its storage."""
    local = _local(tensor)
    return min(local.numel() * local.element_size(), local.untyped_storage().nbytes())


def _storages(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(storage, bytes) of each tensor."""
    return [(_local(tensor).untyped_storage()._cdata, _bytes(tensor)) for tensor in tensors]


def _views(tensors: list[Tensor]) -> list[View]:
    """What reading each tensor reads of its storage."""
    views = []
    for tensor in tensors:
        local = _local(tensor)
        storage = local.untyped_storage()
        offset = local.storage_offset() * local.element_size()
        views.append(View(storage._cdata, _bytes(tensor), offset, storage.nbytes()))
    return views


def _copied(source: Tensor, target: Tensor) -> tuple:
    """The part of its storage that was copied, and the dtype it has now."""
    local = _local(source)
    return local.storage_offset(), tuple(local.shape), local.stride(), target.dtype


def _largest_shape(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(max(tensors, key=Tensor.numel).shape) if tensors else ()


def _calling_line() -> str:
    """file:line of the innermost frame in this repository, this package left out."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not any(part in name for part in NOT_OURS):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
