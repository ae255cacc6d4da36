"""Weights out of a TorchScript archive without running it: OpenAI publishes CLIP that way.

An archive is a zip of code, constants and one pickle of the module tree. Only the pickle and the
raw tensor storages are read, the pickle with a fixed list of names: classes become inert records,
tensors are built here, any other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError

STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
LISTS = (
    "build_intlist",
    "build_tensorlist",
    "build_doublelist",
    "build_boollist",
    "restore_type_tag",
)


def is_jit_archive(path: str | Path) -> bool:
    """Whether the file is a TorchScript archive (a zip that holds constants.pkl)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def jit_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the archived module under its dotted name, on the CPU, in its stored
    precision.

    Raises UserError that names the file where it is no such archive, is damaged, or holds anything
    but a module tree.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(member) as file:
                tree = _Reader(file, archive, member.removesuffix("data.pkl")).load()
    except (
        zipfile.BadZipFile,
        StopIteration,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path}: not a readable TorchScript archive ({error or type(error).__name__})"
        ) from error
    if not isinstance(tree, _Module):
        raise UserError(f"{path}: the archive holds no module")
    return dict(_tensors(tree, ""))


class _Module:
    """A scripted module: its attributes and nothing else."""

    def __init__(self):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


def _tensors(module: _Module, prefix: str):
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Reader(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return type(name, (_Module,), {})
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return _first
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an archive of weights")

    def persistent_load(self, saved):
        kind, dtype, key, _device, count = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("malformed storage")
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            if len(raw) < count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is shorter than declared")
            self.storages[key] = (
                torch.frombuffer(raw, dtype=dtype, count=count)
                if count
                else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_unused) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.as_strided(storage, size, stride, offset)


def _first(value, *_unused):
    return value
