"""Memory that a training step on the CPU frees stays with the process for the next step."""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = -1
LARGEST_KEPT = 2**30  # bytes of a block
TUNED = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which users set the same


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library keep blocks of up to a GiB when they are freed; returns whether it does.

    glibc gives blocks above 32 MiB, and the end of its heap, back to the kernel, which clears their
    pages anew in every step: a tenth of a step's processor time where activations are that large.
    Memory at the peak stays nearly the same. Only for the CPU, where the library has `mallopt` and
    the environment does not set its allocator already.
    """
    tuned = any(name.startswith(TUNED) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or tuned or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, NEVER))
