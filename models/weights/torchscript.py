"""Weights out of a TorchScript archive without running it: OpenAI publishes CLIP that way.

An archive is a zip of code, constants and one pickle of the module tree. Only the pickle and the
raw tensor storages are read, the pickle with a fixed list of names: classes become inert records,
tensors are built here, any other name is refused.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError
from base.limits import MODULES, NESTED_LEVELS, check_limit
from base.pickles import BoundedUnpickler
from base.torch_files import STORAGES, TorchArchive, tensor_view

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
        with zipfile.ZipFile(path) as opened:
            archive = TorchArchive(opened, path)
            content = archive.read("data.pkl")
            tree = _Reader(io.BytesIO(content), path, archive).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle makes its reader raise anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: not a readable TorchScript archive ({reason})") from error
    if not isinstance(tree, _Module):
        raise UserError(f"{path}: the archive holds no module")
    return _tensors(tree, path)


def weights_and_about(
    path: Path, read: Callable[[Path], dict[str, Tensor]], describe: Callable[[Path], dict]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file, a TorchScript archive or one that `read` reads, and what lies in or
    beside it (see `open_dual`), which `describe` tells."""
    if path.is_file() and is_jit_archive(path):
        return jit_state_dict(path), {"archive": True}
    return read(path), describe(path)


class _Module:
    """A scripted module: its attributes and nothing else."""

    def __init__(self):
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


def _tensors(tree: _Module, path: str | Path) -> dict[str, Tensor]:
    """Tensors by dotted name, in the order of the modules."""
    found: dict[str, Tensor] = {}
    pending = [("", tree)]
    modules = 0
    while pending:
        prefix, module = pending.pop()
        modules += 1
        check_limit(path, modules, MODULES, "modules")
        check_limit(path, prefix.count("."), NESTED_LEVELS, "levels of modules")
        inner = []
        for name, value in module.attributes.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                inner.append((f"{prefix}{name}.", value))
        pending += reversed(inner)
    return found


class _Reader(BoundedUnpickler):
    def __init__(self, file: io.BytesIO, path: str | Path, archive: TorchArchive):
        super().__init__(file, path, file.getbuffer().nbytes)
        self.archive = archive

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return type(name, (_Module,), {})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return _first
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return tensor_view
        if made := self.container(module, name):
            return made
        raise pickle.UnpicklingError(
            f"{module:.80}.{name:.80} has no place in an archive of weights"
        )

    def persistent_load(self, pid):
        return self.archive.storage(pid)


def _first(value, *_unused):
    return value
