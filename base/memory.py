"""Will a network and a batch fit? Their memory is estimated before anything is built."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch._guards import detect_fake_mode

from base.errors import UserError

SMALLEST = 16  # side of an image in pixels where no option says it
FLOAT = 4  # bytes of a parameter, its gradient and each moment of Adam's
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that a process may still take on `device`; of the host for the CPU; None = unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_of_meminfo(), _of_cgroup("memory.max", "memory.current", "memory.stat")]
    older = ("limit_in_bytes", "usage_in_bytes", "stat")  # of cgroup v1
    found.append(_of_cgroup(*(f"memory/memory.{name}" for name in older)))
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _of_meminfo() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _of_cgroup(limit: str, used: str, statistics: str) -> int | None:
    """What a container's limit leaves. Cached files count as used there, which after a while of
    reading fill what is left, and as free here: the kernel gives them up first."""
    try:
        left = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())
        lines = (CGROUP / statistics).read_text().splitlines()
    except (OSError, ValueError):  # "max": no limit
        return None
    counts = {name: int(count) for name, _, count in (line.partition(" ") for line in lines)}
    prefix = "total_" if "total_active_file" in counts else ""  # v1: with the groups inside
    cached = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return left + cached


def takes_no_memory() -> bool:
    """Whether tensors are made without data: fakes of scripts/plan.py, or on the meta device, which
    torch.get_default_device of torch 2.6 does not know of."""
    return detect_fake_mode() is not None or torch.empty(0).device.type == "meta"


def parameter_count(make: Callable[[], nn.Module]) -> int:
    """Parameters and buffers of the network that `make` builds, without their memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = make()
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def check_fits(
    parameters: int, what: str, copies: int = 1, device: torch.device | None = None
) -> None:
    """UserError where `copies` float32 copies of the parameters exceed the free memory.

    copies: 1 for the weights alone, 4 to train (gradients and two moments), 3 where they are there.
    """
    if takes_no_memory():
        return
    free = free_memory(device)
    needed = FLOAT * copies * parameters
    if free is not None and needed > free:
        where = "host" if device is None or device.type == "cpu" else str(device)
        raise UserError(
            f"{what}: {parameters / 1e9:.3g} billion parameters need {needed / 2**30:.3g} GiB "
            f"({copies} float32 {'copy' if copies == 1 else 'copies'}), but {free / 2**30:.3g} GiB "
            f"are free on the {where}; name smaller sizes, or share them: --parallel fsdp"
        )


def build_fitting(make: Callable[[], nn.Module], what: str) -> nn.Module:
    """The network that `make` builds on the CPU. UserError, before it takes any memory, where the
    host's does not hold its weights."""
    if not takes_no_memory():
        check_fits(parameter_count(make), what)
    return make()


def check_batch(samples: int, side: int, option: str) -> None:
    """UserError where the RGB images of one batch alone, uint8 [samples,3,side,side], exceed the
    free memory of the host. option: the name of what asks for so many."""
    what = f"{option} {samples:,}: images of {side} x {side} pixels"
    larger = "" if option.endswith("_test") else " and accumulate larger"
    check_bytes(3 * samples * side**2, what, f"make it smaller{larger}")


def check_bytes(needed: int, what: str, remedy: str) -> None:
    """UserError where `needed` bytes of one tensor or batch exceed the free memory of the host."""
    free = None if takes_no_memory() else free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{what} need {needed / 2**30:,.0f} GiB, but {free / 2**30:.3g} GiB are free on the "
            f"host; {remedy}"
        )


def check_batches(config) -> None:
    """UserError where the images of a batch that the options ask for, in training or evaluation,
    cannot fit."""
    network = getattr(config, "network", config)
    side = getattr(network, "image_size", None) or getattr(network, "image_res", None) or SMALLEST
    for option in ("batch_size", "batch_size_train", "batch_size_test"):
        if isinstance(getattr(config, option, None), int):
            check_batch(getattr(config, option), side, option)
