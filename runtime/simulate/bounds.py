"""From a trace to time, traffic, data and money: lower bounds, with every constant in one place."""

from collections import Counter
from dataclasses import dataclass

from runtime.gpus import Gpu
from runtime.simulate.recorder import Collective, Operation, Trace, is_all_reduce

# Fraction of the data sheet's memory bandwidth that good kernels reach: copies 0.85 to 0.9 (0.87 on
# an H200). What products reach of the peak is in runtime/gpus.py, by card.
BANDWIDTH = 0.85
# Seconds that Python and the dispatcher take to launch an operation in eager mode: 4 to 10 us on
# current hosts (9.7 beside an H200), of which a bound takes the lower end.
LAUNCH = 5e-6
# Bytes beside the tensors: CUDA context, cuBLAS and cuDNN workspaces; NCCL's buffers; and the
# fraction of the peak that the caching allocator loses to fragments.
CONTEXT, NCCL, FRAGMENTS = 1.2e9, 1.5e9, 0.06
# Fraction of a card that a recipe should take at most.
FILL = 0.9
GPUS_PER_NODE = 8
# Samples of 256 pixels that a loader core decodes and augments in a second (JPEG, RandAugment).
SAMPLES_PER_CORE = 180.0
# Bytes a second that a parallel file system takes from one writer.
DISK = 1.5e9


@dataclass(frozen=True)
class Place:
    """Time of the operations that one line of the code causes."""

    seconds: float
    count: int
    name: str
    dtype: str
    phase: str
    line: str


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of a step in seconds, and what they are made of."""

    device: float  # eager: every operation by itself, at the attainable rates
    host: float  # launches of eager mode
    fused: float  # the same where memory-bound operations that need no product between them are one
    products: float  # of `device`, those with FLOPs
    communication: float
    exposed: float  # communication that no backward pass can hide

    @property
    def eager(self) -> float:
        return max(self.device, self.host) + self.exposed

    @property
    def compiled(self) -> float:
        return self.fused + self.exposed


def seconds(operation: Operation, gpu: Gpu, precision: str) -> float:
    """Lower bound of one operation: the longer of its arithmetic and its memory traffic."""
    traffic = (operation.read + operation.written) / (gpu.bandwidth * BANDWIDTH)
    if not operation.flops:
        return traffic
    size = operation.dtype.itemsize if operation.dtype is not None else 4
    return max(operation.flops / (gpu.rate(size, precision) * gpu.attained), traffic)


def bounds(trace: Trace, gpu: Gpu, precision: str, world_size: int, network: float) -> Bounds:
    """network: bytes/s of one GPU between nodes."""
    device = fused = products = 0.0
    for operation in trace.operations:
        time = seconds(operation, gpu, precision)
        device += time
        if operation.flops:
            products += time
        if stands_alone(operation):
            fused += time
    fused += sum(group.bytes for group in trace.groups) / (gpu.bandwidth * BANDWIDTH)
    backward = sum(seconds(o, gpu, precision) for o in trace.operations if o.phase == "backward")
    overlapped = exposed = 0.0
    for collective in trace.collectives:
        time = collective_seconds(collective, gpu, world_size, network)
        if collective.phase == "backward":
            overlapped += time
        else:
            exposed += time
    host = trace.launches * LAUNCH
    exposed += max(0.0, overlapped - backward)
    return Bounds(device, host, fused, products, overlapped + exposed, exposed)


def stands_alone(operation: Operation) -> bool:
    """Products and updates of lists of tensors: kernels of their own in compiled code, too."""
    return bool(operation.flops) or operation.name.startswith(("_foreach", "_fused"))


def traffic(collective: Collective, world_size: int) -> float:
    """Bytes that a process sends: rings move (n-1)/n of the whole once, a reduction of all twice."""
    once = collective.size * (world_size - 1) / world_size
    return once * (2 if is_all_reduce(collective.name) else 1)


def collective_seconds(c: Collective, gpu: Gpu, world_size: int, network: float) -> float:
    """Over NVLink in a node, over the network where there are more GPUs than a node has."""
    rate = gpu.link if world_size <= GPUS_PER_NODE else min(network, gpu.link)
    return traffic(c, world_size) / rate


def memory_needed(trace: Trace, world_size: int) -> float:
    """Bytes of the card that a run takes."""
    return trace.peak * (1 + FRAGMENTS) + CONTEXT + (NCCL if world_size > 1 else 0)


def places(trace: Trace, gpu: Gpu, precision: str) -> list[Place]:
    """Where the time of an eager step goes, largest first."""
    time: Counter = Counter()
    count: Counter = Counter()
    for o in trace.operations:
        key = (o.name, str(o.dtype).removeprefix("torch."), o.phase, o.line)
        time[key] += seconds(o, gpu, precision)
        count[key] += 1
    return [Place(value, count[key], *key) for key, value in time.most_common()]


def compiled_places(trace: Trace, gpu: Gpu, precision: str) -> list[Place]:
    """Where the time of a compiled step goes, largest first; fused kernels by the lines that read
    from or write to memory."""
    alone = [operation for operation in trace.operations if stands_alone(operation)]
    found = places(Trace(operations=alone), gpu, precision)
    time: Counter = Counter()
    count: Counter = Counter()
    for group in trace.groups:
        key = ("fused", "", group.phase, group.line)
        time[key] += group.bytes / (gpu.bandwidth * BANDWIDTH)
        count[key] += 1
    found += [Place(value, count[key], *key) for key, value in time.items()]
    return sorted(found, key=lambda place: -place.seconds)
