"""What a compiler can fuse: memory-bound operations with no product between them become one kernel.

A group reads each tensor from outside once and writes only what another kernel reads later or what
outlives the step. Like Inductor, it follows dependencies, not the order of the program: a bias
gradient joins the kernel that made the gradient it sums, wherever the program computes it; and
autocast's copies of one tensor in one dtype are a single copy.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """Bytes that one line of the code adds to a fused kernel."""

    phase: str
    bytes: int
    line: str = ""


@dataclass
class _Kernel:
    """A fused kernel that grows: bytes by line, and the tensors that it has read."""

    phase: str
    lines: Counter = field(default_factory=Counter)
    read: dict[int, int] = field(default_factory=dict)  # number of a value -> bytes


@dataclass
class _Value:
    """What a storage holds: made after `stage` products, by `kernel` (None: by a product)."""

    number: int
    stage: int = 0
    kernel: _Kernel | None = None
    line: str = ""
    size: int = 0
    written: bool = True


class Fusion:
    """Groups the memory-bound operations of a step; tensors are (storage, bytes) pairs."""

    def __init__(self):
        self.products = self.numbers = 0
        self.values: dict[int, _Value] = {}
        self.kernels: dict[tuple[int, str], _Kernel] = {}
        self.copies: dict[tuple, _Value] = {}  # source's number and what was copied how -> copy

    def product(self, read: list[tuple[int, int]], written: list[tuple[int, int]]) -> None:
        """An operation that is a kernel of its own: what it reads must be in memory."""
        for storage, _ in read:
            _write(self._value(storage))
        self.products += 1
        for storage, _ in written:
            self.values[storage] = self._new(stage=self.products)

    def fuse(self, read, written, phase: str, line: str, copy: tuple | None = None) -> None:
        """A memory-bound operation joins the kernel that can run as soon as its inputs are there.

        copy: of a copy in another dtype, the part of the source and the dtype.
        """
        inputs = [(self._value(storage), size) for storage, size in read]
        stage = max((value.stage for value, _ in inputs), default=self.products)
        kernel = self.kernels.setdefault((stage, phase), _Kernel(phase))
        key = (inputs[0][0].number, phase, copy) if copy and inputs else None
        if key in self.copies:
            self.values[written[0][0]] = self.copies[key]
            return
        for value, size in inputs:
            if value.kernel is kernel:
                continue
            _write(value)
            known = kernel.read.get(value.number, 0)
            kernel.read[value.number] = max(known, size)
            kernel.lines[line] += max(0, size - known)
        for storage, size in written:
            old = self.values.get(storage)
            if old is not None and old.kernel is kernel:
                self.numbers += 1
                old.number, old.size = self.numbers, max(old.size, size)
                continue
            value = self._new(stage=stage, kernel=kernel, line=line, size=size, written=False)
            self.values[storage] = value
            if key:
                self.copies[key] = value

    def free(self, storage: int) -> None:
        """This storage is gone; what no kernel has read by now was never written."""
        self.values.pop(storage, None)

    def finish(self) -> list[Group]:
        """The groups of the step so far. What is still alive was written."""
        for value in self.values.values():
            _write(value)
        return [
            Group(kernel.phase, size, line)
            for kernel in self.kernels.values()
            for line, size in kernel.lines.items()
            if size
        ]

    def _value(self, storage: int) -> _Value:
        """What the storage holds; what the step did not make was there before it."""
        if storage not in self.values:
            self.values[storage] = self._new()
        return self.values[storage]

    def _new(self, **where) -> _Value:
        self.numbers += 1
        return _Value(self.numbers, **where)


def _write(value: _Value) -> None:
    """Let the kernel that made the value write it, if it has not."""
    if not value.written:
        value.written = True
        value.kernel.lines[value.line] += value.size
