"""NumPy's files, mapped and never unpickled."""

import os
from pathlib import Path

import numpy as np

from base.errors import UserError, brief

BLOCK = 2**20  # bytes written at once


def map_array(path: str | Path, remedy: str, mode: str = "r") -> np.ndarray:
    """The array of a .npy file, memory-mapped. UserError, which ends with `remedy`, where the file
    is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no readable .npy file (no such file); {remedy}")
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # NumPy has no error of its own, and lets out those of its parser
        raise UserError(f"{path}: no readable .npy file ({brief(str(error))}); {remedy}") from None


def reserve_array(path: str | Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Make a .npy file of zeros that processes map and fill. The disk gives all of it now: on a full
    one a write to a mapped file would kill the process by SIGBUS. OSError, and no file is left."""
    try:
        made = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        made.flush()
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            else:  # macOS
                file.seek(made.offset)
                for start in range(0, made.nbytes, BLOCK):
                    file.write(bytes(min(BLOCK, made.nbytes - start)))
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise
