"""Reading legacy pickles without running anything that is in them.

Two kinds of file still come as free-form pickles: PyTorch files that hold whole modules or
configuration objects (OpenAI's `encoder.pkl`, SIMLA's pre-training checkpoints with an OmegaConf
`config`), and plain data (REFER's `refs(unc).p`, YFCC and RedCaps metadata). A pickle acts only
through the globals it looks up, so the one gate is `find_class`: names on an explicit list become
inert stand-ins of this file, every other name is refused, and what the pickle "calls" are the few
functions below, which check their arguments and build tensors, arrays and containers.

Zip-format files of tensors and plain containers are torch's own to read (`weights_only=True`,
behind a measuring pass); only what torch refuses comes here. Registering the stand-ins with
`torch.serialization.safe_globals` would not shorten this file: legacy files and plain data need the
same stand-ins and reader, torch wants every name beforehand where here a package's prefix is enough,
and its reader sets no bounds.
"""

import io
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.addresses import missing_file
from base.errors import UserError, brief
from base.limits import MODULES, NESTED_LEVELS, check_limit
from base.pickles import BoundedUnpickler, check_size
from base.reading import read_start
from base.text import looks_like
from base.torch_files import (
    STORAGES,
    Storage,
    TorchArchive,
    fill,
    load_weights_only,
    mapped,
    storage_dtype,
    tensor_view,
)

# first pickled object of a torch file written before the zip format
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
STUB_PACKAGES = ("dall_e", "torch.nn.modules", "omegaconf")
OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "_operator": "operator"}
PLAIN_DTYPE = re.compile(r"[<>|=]?[?biufcSUO]\d*|[<>|=]?[mM]8(\[\w+\])?")


def load_plain(path: str | Path) -> Any:
    """Plain data out of a pickle: dict, list, tuple, set, str, bytes, numbers, None, numpy arrays
    and scalars.

    `.npy` files are read, too: those of numbers as `numpy.load` does, arrays of objects as the
    pickles they contain.
    Strings of Python 2 pickles are read as UTF-8, or Latin-1 where that fails. Raises `UserError`
    that names the file and the refused global for anything else, and for a damaged file; nothing in
    the pickle is ever called.
    """
    with _faults_named(path), mapped(path) as file:
        if not _skip_npy_header(file):
            return _numbers(path)
        start = file.tell()
        try:
            return _plain(file, path, "utf-8")
        except UnicodeDecodeError:
            file.seek(start)
            return _plain(file, path, "latin-1")


def _plain(file: mmap.mmap, path: str | Path, encoding: str) -> Any:
    reader = _Reader(file, path, len(file), PLAIN_GLOBALS, encoding=encoding)
    data = reader.load()
    if reader.met_numpy:
        data = _resolve(data, {})
    if reader.shares:
        check_size(data, path)
    return data


def _skip_npy_header(file) -> bool:
    """Moves to where a pickle begins: behind the header of an .npy array of objects. False for an
    array of numbers."""
    magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    file.seek(0)
    if magic != np.lib.format.MAGIC_PREFIX:
        return True
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    return read(file)[2].hasobject


def _numbers(path: str | Path) -> np.ndarray:
    """An .npy array of numbers, copied out of the mapped file: memory is taken for what is there,
    not for the shape in the header."""
    return np.array(np.load(path, allow_pickle=False, mmap_mode="r"))


def load_torch(path: str | Path) -> Any:
    """Content of a torch file: `torch.load(weights_only=True)`, memory-mapped, for checkpoints in
    the zip format.

    Their pickle is first gone through by a reader that builds nothing, so that it cannot make
    torch's hang. Files that torch refuses and those of the older format are read through the
    allow-list, on the CPU: modules come back as `Stub` trees (see `module_tensors`), OmegaConf
    configurations and `argparse.Namespace` as plain containers, parameters as tensors. Raises
    `UserError` that names the file and the refused global; there is no way on to free unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_file(path)
    with _faults_named(path):
        if not zipfile.is_zipfile(path):
            content = _resolve(_load_legacy(path), {})
        else:
            content = _load_zip(path)
        check_size(content, path)
        return content


def module_tensors(module: "Stub", path: object = None) -> dict[str, torch.Tensor]:
    """`{key: tensor}` of a pickled `nn.Module`, with the keys its `state_dict()` would have.

    Raises `UserError` where the stub is not a module.
    """
    tensors: dict[str, torch.Tensor] = {}
    pending = [("", module)]
    modules = 0
    name = path or repr(module)
    try:
        while pending:
            prefix, current = pending.pop()
            modules += 1
            check_limit(name, modules, MODULES, "modules")
            check_limit(name, prefix.count("."), NESTED_LEVELS, "levels")
            skipped = current.state.get("_non_persistent_buffers_set", ())
            for table in ("_parameters", "_buffers"):
                for key, value in current.state[table].items():
                    if isinstance(value, torch.Tensor) and key not in skipped:
                        tensors[prefix + key] = value
            for name, child in reversed(current.state["_modules"].items()):
                if child is not None:
                    pending.append((f"{prefix}{name}.", child))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{module!r} in the file is not a PyTorch module with weights") from None
    return tensors


# ---- what a pickle may build


class Stub:
    """An object of an allow-listed foreign class: name of the class, arguments, state and items; no
    behaviour."""

    kind = ""  # full name of the class in the pickle

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.args = args
        self.state = {}
        self.entries = []
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2:  # (state of __dict__, state of __slots__)
            state = (state[0] or {}) | (state[1] or {})
        self.state = state

    def __setitem__(self, key, value):
        self.entries.append((key, value))

    def append(self, value):
        self.entries.append(value)

    def extend(self, values):
        self.entries.extend(values)

    def __repr__(self):
        return f"<stub of {self.kind}>"


class _TypeName:
    """A type that is only mentioned, as in `defaultdict(list)`; nothing can be made of it."""

    __slots__ = ()


class _DType:
    """A numpy dtype in the making: the pickle gives its name first and the byte order
    afterwards."""

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not PLAIN_DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"numpy dtype {brief(name)} is not a plain one")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        _, order, subarray, names, fields = state[:5]
        is_plain = subarray is None and names is None and fields is None
        if not is_plain or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("structured numpy dtypes are not read")
        # the unit of datetime64 and timedelta64: ({}, ("s", 1, 1, 1))
        if len(state) > 8 and isinstance(state[8], tuple):
            unit, count = state[8][1][:2]
            name = unit if isinstance(unit, str) else unit.decode("ascii")
            if self.dtype.kind not in "mM" or not name.isalpha():
                raise pickle.UnpicklingError("malformed numpy dtype")
            self.dtype = np.dtype(f"{self.dtype.kind}8[{int(count)}{name}]")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """A numpy array in the making; `_resolve` puts the array itself in its place."""

    value: np.ndarray

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data, dtype: _DType, shape, order="C") -> np.ndarray:
    if dtype.dtype.hasobject:
        return _object_array(data, shape, order)
    if not isinstance(data, bytes | bytearray | str):
        raise pickle.UnpicklingError("malformed numpy array")
    if isinstance(data, str):  # Python 2 wrote bytes as str
        data = data.encode("latin-1")
    return np.frombuffer(bytearray(data), dtype=dtype.dtype).reshape(shape, order=order)


def _object_array(values, shape, order="C") -> np.ndarray:
    """One by one: NumPy would take lists among the values for further dimensions."""
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array.reshape(shape, order=order)


def _new_array(*_unused) -> _Array:
    return _Array()


def _scalar(dtype: _DType, data=b""):
    return data if dtype.dtype.hasobject else _array(data, dtype, (1,))[0]


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_unused):
    return tensor_view(storage, offset, size, stride, dtype=dtype)


def _of_type(function, _type, args, _state):
    if function not in (tensor_view, _tensor_v3):
        raise pickle.UnpicklingError("malformed tensor subclass")
    return function(*args)


def _blank(cls, _base=object, _state=None):
    """Python 2's way to make an object before its state is set."""
    if not (isinstance(cls, type) and issubclass(cls, Stub)):
        raise pickle.UnpicklingError("only stand-ins can be made this way")
    return cls()


def _latin1(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in encoding {brief(encoding)}")
    return text.encode("latin-1")


def _bytearray(data=b"", encoding="latin-1"):
    if not isinstance(data, bytes | str):
        raise pickle.UnpicklingError("malformed bytearray")
    return bytearray(data if isinstance(data, bytes) else data.encode("latin-1"))


def _stub_class(module: str, name: str) -> type[Stub]:
    return type(name, (Stub,), {"kind": f"{module}.{name}"})


def _first(value=None, *_unused):
    return value


def _nothing(*_unused):
    return None


def _empty_bytes():
    return b""


def _size(size=()):
    return tuple(size)


def _joined(*parts):
    return "/".join(parts)


def _device(*name):
    return ":".join(str(part) for part in name if isinstance(part, str | int))


TYPE_NAMES = "object type dict list tuple int long float str unicode bool".split()
PLAIN_GLOBALS: dict[tuple[str, str], Any] = {
    **{("builtins", name): _TypeName() for name in TYPE_NAMES},
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "bytes"): _empty_bytes,
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _TypeName(),
}
for _package in ("numpy.core", "numpy._core"):
    PLAIN_GLOBALS[f"{_package}.multiarray", "_reconstruct"] = _new_array
    PLAIN_GLOBALS[f"{_package}.multiarray", "scalar"] = _scalar
    PLAIN_GLOBALS[f"{_package}.numeric", "_frombuffer"] = _array

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
TYPING = ("Any", "Dict", "List", "Tuple", "Union", "Optional")
TORCH_GLOBALS: dict[tuple[str, str], Any] = {
    **PLAIN_GLOBALS,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("typing", name): _TypeName() for name in TYPING},
    ("operator", "getitem"): _nothing,  # typing.Dict[str, Any] in the metadata of OmegaConf
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): tensor_view,
    ("torch._utils", "_rebuild_tensor_v2"): tensor_view,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch.nn.parameter", "Parameter"): _first,
    ("copyreg", "_reconstructor"): _blank,
    ("pathlib", "PosixPath"): _joined,
    ("pathlib", "WindowsPath"): _joined,
    ("pathlib._local", "PosixPath"): _joined,  # of Python 3.13
    ("pathlib._local", "WindowsPath"): _joined,
    ("argparse", "Namespace"): _stub_class("argparse", "Namespace"),
}


class _Reader(BoundedUnpickler):
    """An unpickler whose only globals are those of the given table, and stubs for classes of
    `STUB_PACKAGES`."""

    def __init__(
        self,
        file,
        path: str | Path,
        size: int,
        allowed: dict,
        storage: Callable | None = None,
        encoding: str = "utf-8",
    ):
        super().__init__(file, path, size, encoding)
        self.path = path
        self.allowed = allowed
        self.storage = storage
        self.stubs = {}
        self.met_numpy = False

    def find_class(self, module: str, name: str):
        module = OTHER_NAMES.get(module, module)
        self.met_numpy |= module.startswith("numpy")
        key = (module, name)
        found = self.container(module, name) or self.allowed.get(key) or self.stubs.get(key)
        if found is not None:
            return found
        is_foreign = any(f"{module}.".startswith(f"{package}.") for package in STUB_PACKAGES)
        if self.storage and is_foreign and "." not in name:
            return self.stubs.setdefault(key, _stub_class(module, name))
        raise UserError(
            f"{self.path}: the pickle asks for {module:.80}.{name:.80}, which is not on the list of harmless names "
            "(runtime/safe_pickle.py), so it is not read and nothing of it was run; "
            "have its owner export the data as JSON or safetensors"
        )

    def persistent_load(self, pid):
        if self.storage is None:
            raise pickle.UnpicklingError("the pickle refers to data outside itself")
        return self.storage(pid)


@contextmanager
def _faults_named(path):
    """Turns whatever a damaged or hostile file provokes inside the reader into an `UserError` that
    names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise missing_file(path) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        seen = looks_like(read_start(path))
        raise UserError(
            f"{path}: cannot be read ({reason}){seen}; it is damaged or of another format, fetch "
            "it again"
        ) from error


# ---- the two torch formats


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as opened:
        archive = TorchArchive(opened, path)
        if archive.is_script:
            raise UserError(
                f"{path}: a TorchScript archive, which holds code; only tables of tensors are read"
            )
        if not archive.root:
            raise UserError(f"{path}: a zip file, but not one of torch.save")
        if f"{archive.root}byteorder" in archive.names and archive.read("byteorder") != b"little":
            raise UserError(f"{path}: written on a big-endian machine")
        try:
            return load_weights_only(path)
        except pickle.UnpicklingError:  # more than tensors and plain containers
            content = archive.read("data.pkl")
        reader = _Reader(io.BytesIO(content), path, len(content), TORCH_GLOBALS, archive.storage)
        return _resolve(reader.load(), {})


def _load_legacy(path: Path) -> Any:
    """The format before torch 1.6: magic number, version, machine, object, storage keys, then the
    storages' bytes."""
    storages: dict[str, Storage] = {}
    size = path.stat().st_size
    left = size  # bytes that the storages may have together

    def storage(pid) -> Any:
        nonlocal left
        if pid[0] == "module":  # a class with its source code, which is of no interest
            return pid[1]
        _, dtype, key, _, count, *view = pid
        if not isinstance(key, str) or any(part is not None for part in view):
            raise pickle.UnpicklingError("malformed storage")
        if key not in storages:
            needed = count * storage_dtype(dtype).itemsize
            left -= needed
            if needed < 0 or left < 0:
                raise pickle.UnpicklingError("storages larger than the file")
            storages[key] = Storage(torch.UntypedStorage(needed), dtype)
        return storages[key]

    with mapped(path) as file:
        head = [_Reader(file, path, size, PLAIN_GLOBALS).load() for _ in range(3)]
        if head[:2] != [LEGACY_MAGIC, LEGACY_PROTOCOL]:
            raise UserError(f"{path}: not a file of torch.save")
        if not head[2].get("little_endian", True):
            raise UserError(f"{path}: written on a big-endian machine")
        content = _Reader(file, path, size, TORCH_GLOBALS, storage).load()
        keys = _Reader(file, path, size, PLAIN_GLOBALS).load()
        if not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
            raise pickle.UnpicklingError("tensors whose values are not in the file")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            if count * storages[key].dtype.itemsize != storages[key].untyped.nbytes():
                raise pickle.UnpicklingError("storage of another size than announced")
            fill(file, storages[key].untyped)
    return content


# ---- stand-ins to plain containers


def _resolve(obj: Any, seen: dict[int, Any]) -> Any:
    """Puts arrays, dtypes and plain configurations where their stand-ins are; module stubs keep
    their tree."""
    if id(obj) in seen:
        return seen[id(obj)][1]
    if isinstance(obj, _Array):
        result = obj.value
        if result.dtype.hasobject:
            values = [_resolve(value, seen) for value in result.flat]
            result = _object_array(values, result.shape)
    elif isinstance(obj, _DType):
        result = obj.dtype
    elif isinstance(obj, Stub):
        return _resolve_stub(obj, seen)
    elif isinstance(obj, dict):
        result = obj if type(obj) is dict else {}
        seen[id(obj)] = (obj, result)
        entries = [(_resolve(key, seen), _resolve(value, seen)) for key, value in dict.items(obj)]
        dict.clear(result)
        result.update(entries)
    elif isinstance(obj, list):
        seen[id(obj)] = (obj, obj)
        obj[:] = [_resolve(value, seen) for value in obj]
        result = obj
    elif isinstance(obj, tuple):
        result = tuple(_resolve(value, seen) for value in obj)
    else:
        return obj
    seen[id(obj)] = (obj, result)  # the object itself is kept too, so that its id stays its own
    return result


def _resolve_stub(stub: Stub, seen: dict[int, Any]) -> Any:
    state = stub.state
    if stub.kind == "argparse.Namespace":
        return _resolve(dict(state), seen)
    if stub.kind.startswith("omegaconf.") and isinstance(state, dict):
        # of DictConfig and ListConfig; metadata and the link to the parent are left behind
        if "_content" in state:
            return _resolve(state["_content"], seen)
        if "_val" in state:
            return _resolve(state["_val"], seen)
        return None
    seen[id(stub)] = (stub, stub)
    stub.state = _resolve(state, seen)
    return stub
