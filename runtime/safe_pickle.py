"""Reading legacy pickles without running anything that is in them.

Two kinds of file still come as free-form pickles: PyTorch files that hold whole modules or
configuration objects (OpenAI's `encoder.pkl`, SIMLA's pre-training checkpoints with an OmegaConf
`config`), and plain data (REFER's `refs(unc).p`, YFCC and RedCaps metadata). A pickle acts only
through the globals it looks up, so the one gate is `find_class`: names on an explicit list become
inert stand-ins of this file, every other name is refused, and what the pickle "calls" are the few
functions below, which check their arguments and build tensors, arrays and containers.
"""

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.errors import UserError

LEGACY_MAGIC = (
    0x1950A86A20F9469CFC6C  # first pickled object of a torch file written before the zip format
)
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
    with _faults_named(path):
        for encoding in ("utf-8", "latin-1"):
            with open(path, "rb") as file:
                if not _skip_npy_header(file):
                    return np.load(path, allow_pickle=False)
                reader = _Reader(file, path, PLAIN_GLOBALS, encoding=encoding)
                try:
                    data = reader.load()
                    return _resolve(data, {}) if reader.met_numpy else data
                except UnicodeDecodeError:
                    if encoding == "latin-1":
                        raise


def _skip_npy_header(file) -> bool:
    """Moves to where a pickle begins: behind the header of an .npy array of objects. False for an
    array of numbers."""
    magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    file.seek(0)
    if magic != np.lib.format.MAGIC_PREFIX:
        return True
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)[2].hasobject


def load_torch(path: str | Path) -> Any:
    """Content of a torch file, on the CPU: `torch.load(weights_only=True)`, memory-mapped where the
    format allows it.

    Files it refuses are read through the allow-list: modules come back as `Stub` trees (see
    `module_tensors`), OmegaConf configurations and `argparse.Namespace` as plain containers,
    parameters as tensors. Raises `UserError` that names the file and the refused global; there is
    no way on to free unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with _faults_named(path):
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
        ):
            raise UserError(
                f"{path}: a TorchScript archive, which holds code; only tables of tensors are read"
            )
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError:
            pass  # more than tensors and plain containers
        return _resolve(_load_zip(path) if is_zip else _load_legacy(path), {})


def module_tensors(module: "Stub") -> dict[str, torch.Tensor]:
    """`{key: tensor}` of a pickled `nn.Module`, with the keys its `state_dict()` would have.

    Raises `UserError` where the stub is not a module.
    """
    try:
        own = module.state["_parameters"] | module.state["_buffers"]
        skipped = module.state.get("_non_persistent_buffers_set", ())
        tensors = {
            key: value
            for key, value in own.items()
            if isinstance(value, torch.Tensor) and key not in skipped
        }
        for name, child in module.state["_modules"].items():
            if child is not None:
                tensors |= {f"{name}.{key}": value for key, value in module_tensors(child).items()}
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise UserError(f"{module!r} in the file is not a PyTorch module with weights") from None
    return tensors


# ------------------------------------------------------------------------------------------- what a pickle may build


class Stub:
    """An object of an allow-listed foreign class: name of the class, arguments, state and items; no
    behaviour."""

    kind = ""  # full name of the class in the pickle

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.args, self.state, self.entries = args, {}, []
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


class _Function:
    """One of this file's functions as a pickle sees it: it can be called, nothing can be set on
    it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"the pickle tries to change a function ({name})")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("the pickle tries to change a function")


class _TypeName:
    """A type that is only mentioned, as in `defaultdict(list)`; nothing can be made of it."""

    __slots__ = ()

    def __setstate__(self, state):
        raise pickle.UnpicklingError("the pickle tries to change a type")


@dataclass(frozen=True)
class _Storage:
    untyped: torch.UntypedStorage
    dtype: torch.dtype


class _DType:
    """A numpy dtype in the making: the pickle gives its name first and the byte order
    afterwards."""

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not PLAIN_DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"numpy dtype {name!r} is not a plain one")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        _, order, subarray, names, fields = state[:5]
        if (
            subarray is not None
            or names is not None
            or fields is not None
            or order not in ("<", ">", "|", "=")
        ):
            raise pickle.UnpicklingError("structured numpy dtypes are not read")
        if len(state) > 8 and isinstance(
            state[8], tuple
        ):  # unit of datetime64 / timedelta64: ({}, ("s", 1, 1, 1))
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
        array = np.empty(len(data), dtype=object)
        for index, value in enumerate(data):
            array[index] = value
        return array.reshape(shape, order=order)
    if isinstance(data, str):  # Python 2 wrote bytes as str
        data = data.encode("latin-1")
    return np.frombuffer(bytearray(data), dtype=dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _DType, data=b""):
    return data if dtype.dtype.hasobject else _array(data, dtype, (1,))[0]


def _buffer_array(data, dtype: _DType, shape, order="C"):
    return _array(data, dtype, shape, order)


def _tensor(
    storage: _Storage, offset, size, stride, *_unused, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A view into a storage, inside its bounds (`set_` would silently enlarge a storage that is too
    small)."""
    dtype = dtype or storage.dtype
    if (
        not isinstance(storage, _Storage)
        or min((offset, *size, *stride)) < 0
        or len(size) != len(stride)
    ):
        raise pickle.UnpicklingError("malformed tensor")
    last = (
        offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size
        else -1
    )
    if (last + 1) * dtype.itemsize > storage.untyped.nbytes():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, offset, tuple(size), tuple(stride))


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_unused):
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _of_type(function, _type, args, _state):
    if not isinstance(function, _Function):
        raise pickle.UnpicklingError("malformed tensor subclass")
    return function(*args)


def _blank(cls, _base=object, _state=None):
    """Python 2's way to make an object before its state is set."""
    if not (isinstance(cls, type) and issubclass(cls, Stub)):
        raise pickle.UnpicklingError("only stand-ins can be made this way")
    return cls()


def _latin1(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin-1")


def _bytearray(data=b"", encoding="latin-1"):
    if not isinstance(data, bytes | str):
        raise pickle.UnpicklingError("malformed bytearray")
    return bytearray(data if isinstance(data, bytes) else data.encode("latin-1"))


def _stub_class(module: str, name: str) -> type[Stub]:
    return type(name, (Stub,), {"kind": f"{module}.{name}"})


def _functions(module: str, **calls: Callable) -> dict[tuple[str, str], _Function]:
    return {(module, name): _Function(call) for name, call in calls.items()}


PLAIN_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        ("builtins", name): _TypeName()
        for name in "object type dict list tuple int long float str unicode bool".split()
    },
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("collections", "OrderedDict"): OrderedDict,
    **_functions("builtins", bytearray=_bytearray, bytes=lambda: b""),
    **_functions("collections", defaultdict=lambda *_: {}, Counter=lambda items=(): dict(items)),
    **_functions("_codecs", encode=_latin1),
    **_functions("numpy", dtype=_DType),
    ("numpy", "ndarray"): _TypeName(),
}
for _package in ("numpy.core", "numpy._core"):
    PLAIN_GLOBALS |= _functions(
        f"{_package}.multiarray", _reconstruct=lambda *_: _Array(), scalar=_scalar
    )
    PLAIN_GLOBALS |= _functions(f"{_package}.numeric", _frombuffer=_buffer_array)

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
TORCH_GLOBALS: dict[tuple[str, str], Any] = {
    **PLAIN_GLOBALS,
    **{("torch", name): _Function(lambda: None) for name in STORAGES},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{
        ("typing", name): _TypeName()
        for name in ("Any", "Dict", "List", "Tuple", "Union", "Optional")
    },
    **_functions(
        "torch", Size=lambda size=(): tuple(size), device=lambda *name: ":".join(map(str, name))
    ),
    **_functions(
        "torch._utils",
        _rebuild_tensor=_tensor,
        _rebuild_tensor_v2=_tensor,
        _rebuild_tensor_v3=_tensor_v3,
        _rebuild_parameter=lambda data, *_: data,
        _rebuild_parameter_with_state=lambda data, *_: data,
    ),
    **_functions("torch._tensor", _rebuild_from_type_v2=_of_type),
    **_functions("torch.nn.parameter", Parameter=lambda data=None, *_: data),
    **_functions("copyreg", _reconstructor=_blank),
    **_functions(
        "operator", getitem=lambda *_: None
    ),  # typing.Dict[str, Any] in the metadata of OmegaConf
    **_functions(
        "pathlib",
        PosixPath=lambda *parts: "/".join(parts),
        WindowsPath=lambda *parts: "/".join(parts),
    ),
    ("argparse", "Namespace"): _stub_class("argparse", "Namespace"),
    ("torch.storage", "UntypedStorage"): _Function(lambda: None),
}
STORAGE_DTYPES = {TORCH_GLOBALS["torch", name]: dtype for name, dtype in STORAGES.items()}
STORAGE_DTYPES[TORCH_GLOBALS["torch.storage", "UntypedStorage"]] = torch.uint8


class _Reader(pickle.Unpickler):
    """An unpickler whose only globals are those of the given table, and stubs for classes of
    `STUB_PACKAGES`."""

    def __init__(
        self, file, path, allowed: dict, storage: Callable | None = None, encoding: str = "utf-8"
    ):
        super().__init__(file, encoding=encoding)
        self.path, self.allowed, self.storage, self.stubs = path, allowed, storage, {}
        self.met_numpy = False

    def find_class(self, module: str, name: str):
        module = OTHER_NAMES.get(module, module)
        self.met_numpy |= module.startswith("numpy")
        found = self.allowed.get((module, name)) or self.stubs.get((module, name))
        if found is not None:
            return found
        if (
            self.storage
            and "." not in name
            and any(f"{module}.".startswith(f"{p}.") for p in STUB_PACKAGES)
        ):
            return self.stubs.setdefault((module, name), _stub_class(module, name))
        raise UserError(
            f"{self.path}: the pickle asks for {module}.{name}, which is not on the list of harmless names "
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
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{path}: cannot be read ({reason}); it is damaged or of another format, fetch it again"
        ) from error


# ------------------------------------------------------------------------------------------------ the two torch formats


def _fill(file, storage: torch.UntypedStorage) -> None:
    view = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
    while len(view):
        count = file.readinto(view)
        if not count:
            raise EOFError("the file ends inside a tensor")
        view = view[count:]


def _load_zip(path: Path) -> Any:
    """The zip format: `ROOT/data.pkl` and one record `ROOT/data/KEY` per storage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next(
            (name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")), None
        )
        if root is None:
            raise UserError(f"{path}: a zip file, but not one of torch.save")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def storage(pid) -> _Storage:
            _, kind, key, _, _ = pid
            if key not in storages:
                record = archive.getinfo(f"{root}data/{key}")
                if record.file_size > path.stat().st_size:
                    raise pickle.UnpicklingError("malformed storage")
                untyped = torch.UntypedStorage(record.file_size)
                with archive.open(record) as file:
                    _fill(file, untyped)
                storages[key] = _Storage(untyped, STORAGE_DTYPES[kind])
            return storages[key]

        with archive.open(f"{root}data.pkl") as file:
            return _Reader(file, path, TORCH_GLOBALS, storage).load()


def _load_legacy(path: Path) -> Any:
    """The format before torch 1.6: magic number, version, machine, object, storage keys, then the
    storages' bytes."""
    size, storages = path.stat().st_size, {}

    def storage(pid):
        if pid[0] == "module":  # a class with its source code, which is of no interest
            return pid[1]
        _, kind, key, _, count, *view = pid
        dtype = STORAGE_DTYPES[kind]
        if count * dtype.itemsize > size or any(part is not None for part in view):
            raise pickle.UnpicklingError("malformed storage")
        return storages.setdefault(
            key, _Storage(torch.UntypedStorage(count * dtype.itemsize), dtype)
        )

    with open(path, "rb") as file:
        head = [_Reader(file, path, PLAIN_GLOBALS).load() for _ in range(3)]
        if head[:2] != [LEGACY_MAGIC, LEGACY_PROTOCOL]:
            raise UserError(f"{path}: not a file of torch.save")
        if not head[2].get("little_endian", True):
            raise UserError(f"{path}: written on a big-endian machine")
        content = _Reader(file, path, TORCH_GLOBALS, storage).load()
        for key in _Reader(file, path, PLAIN_GLOBALS).load():
            (count,) = struct.unpack("<q", file.read(8))
            if count * storages[key].dtype.itemsize != storages[key].untyped.nbytes():
                raise pickle.UnpicklingError("storage of another size than announced")
            _fill(file, storages[key].untyped)
    return content


# ---------------------------------------------------------------------------------------- stand-ins to plain containers


def _resolve(obj: Any, seen: dict[int, Any]) -> Any:
    """Puts arrays, dtypes and plain configurations where their stand-ins are; module stubs keep
    their tree."""
    if id(obj) in seen:
        return seen[id(obj)][1]
    if isinstance(obj, _Array):
        result = obj.value
        if result.dtype.hasobject:
            result.flat = [_resolve(value, seen) for value in result.flat]
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
        if (
            "_content" in state
        ):  # DictConfig, ListConfig; metadata and the link to the parent are left behind
            return _resolve(state["_content"], seen)
        if "_val" in state:
            return _resolve(state["_val"], seen)
        return None
    seen[id(stub)] = (stub, stub)
    stub.state = _resolve(state, seen)
    return stub
