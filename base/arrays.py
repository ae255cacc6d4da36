"""NumPy's files, mapped and never unpickled."""

from pathlib import Path

import numpy as np

from base.errors import UserError, brief


def map_array(path: str | Path, remedy: str, mode: str = "r") -> np.ndarray:
    """The array of a .npy file, memory-mapped. UserError, which ends with `remedy`, where the file
    is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no readable .npy file (no such file); {remedy}")
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # NumPy has no error of its own, and lets out those of its parser
        raise UserError(f"{path}: no readable .npy file ({brief(str(error))}); {remedy}") from None
