"""What a compiler can fuse: memory-bound operations with no product between them become one kernel.

A group reads each tensor from outside once and writes only what another kernel reads later or what
outlives the step. Like Inductor, it follows dependencies, not the order of the program: a bias
gradient joins the kernel that made the gradient it sums, wherever the program computes it; and
autocast's copies of one tensor in one dtype are a single copy. An elementwise result is computed
again where it is needed if what it is made of is no more to read, as Inductor does inside a graph
and AOTAutograd's partitioner for the backward pass.
"""

from collections import Counter
from dataclasses import dataclass, field

DEPTH = 8  # elementwise operations in a row that are computed again


@dataclass(frozen=True)
class Group:
    """Bytes that one line of the code adds to a fused kernel."""

    phase: str
    bytes: int
    line: str = ""


@dataclass(frozen=True)
class View:
    """The part of a storage that an operation reads, in bytes."""

    storage: int
    size: int
    offset: int
    whole: int  # size of the storage


@dataclass
class _Kernel:
    """A fused kernel that grows: bytes by line, and the tensors that it has read."""

    phase: str
    lines: Counter = field(default_factory=Counter)
    # number of a value -> offset of a part of it -> bytes
    read: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass
class _Value:
    """What a storage holds: made after `stage` products, by `kernel` (None: by a product)."""

    number: int
    stage: int = 0
    kernel: _Kernel | None = None
    line: str = ""
    size: int = 0
    written: bool = True
    freed: bool = False
    # of an elementwise result: what it was made of, the number of each then, and which part
    sources: list[tuple["_Value", int, View]] | None = None


class Fusion:
    """Groups the memory-bound operations of a step; what is written are (storage, bytes) pairs."""

    def __init__(self):
        self.products = self.numbers = 0
        self.values: dict[int, _Value] = {}
        self.kernels: dict[tuple[int, str], _Kernel] = {}
        self.copies: dict[tuple, _Value] = {}  # source's number and what was copied how -> copy

    def product(self, read: list[View], written: list[tuple[int, int]]) -> None:
        """An operation that is a kernel of its own: what it reads must be in memory."""
        for view in read:
            _write(self._value(view.storage))
        self.products += 1
        for storage, _ in written:
            self.values[storage] = self._new(stage=self.products)

    def fuse(
        self,
        read: list[View],
        written: list[tuple[int, int]],
        phase: str,
        line: str,
        copy: tuple | None = None,
        elementwise: bool = False,
    ) -> None:
        """A memory-bound operation joins the kernel that can run as soon as its inputs are there.

        copy: of a copy in another dtype, the part of the source and the dtype. elementwise: cheap to
        compute again.
        """
        inputs = [(self._value(view.storage), view) for view in read]
        stage = max((value.stage for value, _ in inputs), default=self.products)
        kernel = self.kernels.setdefault((stage, phase), _Kernel(phase))
        key = (inputs[0][0].number, phase, copy) if copy and inputs else None
        if key in self.copies:
            self.values[written[0][0]] = self.copies[key]
            return
        for value, view in inputs:
            if value.kernel is not kernel:
                _bring(value, view, kernel, line)
        sources = [(v, v.number, view) for v, view in inputs] if elementwise else None
        for storage, size in written:
            old = self.values.get(storage)
            if old is not None and old.kernel is kernel:
                self.numbers += 1
                old.number, old.size = self.numbers, max(old.size, size)
                old.sources = None
                continue
            if old is not None:
                old.freed = True  # overwritten
            value = self._new(
                stage=stage, kernel=kernel, line=line, size=size, written=False, sources=sources
            )
            self.values[storage] = value
            if key:
                self.copies[key] = value

    def free(self, storage: int) -> None:
        """This storage is gone; what no kernel has read by now was never written."""
        value = self.values.pop(storage, None)
        if value is not None:
            value.freed = True

    def finish(self) -> list[Group]:
        """The groups of the step so far. What is still alive was written."""
        for value in self.values.values():
            _write(value)
        groups = []
        for kernel in self.kernels.values():
            for line, size in kernel.lines.items():
                if size:
                    groups.append(Group(kernel.phase, size, line))
        return groups

    def _value(self, storage: int) -> _Value:
        """What the storage holds; what the step did not make was there before it."""
        if storage not in self.values:
            self.values[storage] = self._new()
        return self.values[storage]

    def _new(self, **where) -> _Value:
        self.numbers += 1
        return _Value(self.numbers, **where)


def _bring(value: _Value, view: View, kernel: _Kernel, line: str) -> None:
    """Let the kernel read the value, or what it is made of where that is no more to read."""
    wanted = [(value, view)]
    if not value.written:
        again = _ancestors(value)
        if again is not None and sum(_unread(v, part, kernel) for v, part in again) <= view.size:
            wanted = again
    for needed, part in wanted:
        _write(needed)
        kernel.lines[line] += _unread(needed, part, kernel)
        parts = kernel.read.setdefault(needed.number, {})
        parts[part.offset] = max(parts.get(part.offset, 0), part.size)


def _ancestors(value: _Value, depth: int = DEPTH) -> list[tuple[_Value, View]] | None:
    """What is in memory, as it was, and gives the value by elementwise operations alone; or None."""
    if value.sources is None or depth == 0:
        return None
    found = []
    for source, number, view in value.sources:
        if source.number != number:
            return None
        if source.written and not source.freed:
            found.append((source, view))
            continue
        behind = _ancestors(source, depth - 1)
        if behind is None:
            return None
        found += behind
    return found


def _unread(value: _Value, view: View, kernel: _Kernel) -> int:
    """Bytes of this part that the kernel has not read yet; all parts are no more than the whole."""
    parts = kernel.read.get(value.number, {})
    before = sum(parts.values())
    more = max(0, view.size - parts.get(view.offset, 0))
    return min(before + more, view.whole) - min(before, view.whole)


def _write(value: _Value) -> None:
    """Let the kernel that made the value write it, if it has not."""
    if not value.written:
        value.written = True
        value.kernel.lines[value.line] += value.size
