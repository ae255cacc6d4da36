"""Files of weights: torch's two formats and safetensors, one file or the shards of an index.

Nothing in them is run, and they take the memory that their bytes need: see `base.pickles`.
"""

import io
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from base.addresses import missing_file
from base.errors import UserError
from base.pickles import BoundedUnpickler, check_size
from base.reading import read_json, read_start
from base.text import looks_like

CHUNK = 1 << 20  # bytes read at a time
REMEDY = "fetch the folder again"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# what DDP, torch.compile, FSDP and activation checkpointing put into the names of weights
WRAPPED = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
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


def storage_dtype(dtype: Any) -> torch.dtype:
    """What `find_class` gave for a storage's class, if it is one."""
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("malformed storage")
    return dtype


class Storage(NamedTuple):
    """Bytes that tensors view, and the type that the pickle gives them."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


def tensor_view(
    storage: Storage, offset, size, stride, *_unused, dtype: torch.dtype | None = None
) -> Tensor:
    """A view into a storage, inside its bounds (`set_` would silently enlarge a storage that is too
    small)."""
    if (
        not isinstance(storage, Storage)
        or min((offset, *size, *stride)) < 0
        or len(size) != len(stride)
    ):
        raise pickle.UnpicklingError("malformed tensor")
    dtype = dtype or storage.dtype
    steps = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    last = -1 if 0 in size else offset + steps
    if (last + 1) * dtype.itemsize > storage.untyped.nbytes():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, offset, tuple(size), tuple(stride))


def fill(file: Any, storage: torch.UntypedStorage) -> None:
    """Reads a storage's bytes. EOFError where the file ends before."""
    view = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
    while len(view):
        data = file.read(min(len(view), CHUNK))
        if not data:
            raise EOFError("the file ends inside a tensor")
        view[: len(data)] = data
        view = view[len(data) :]


class TorchArchive:
    """The records of a zip file of torch: the pickle `ROOT/data.pkl` and `ROOT/data/KEY` per storage.

    Together they are no longer than the file, which leaves no room for compression bombs and for
    entries that overlap. Raises pickle.UnpicklingError.
    """

    def __init__(self, archive: zipfile.ZipFile, path: str | Path):
        self.archive = archive
        self.path = path
        self.names = archive.namelist()
        self.left = Path(path).stat().st_size
        pickles = (name for name in self.names if name.endswith("/data.pkl"))
        self.root = next(pickles, "").removesuffix("data.pkl")
        self.storages: dict[str, Storage] = {}

    @property
    def is_script(self) -> bool:
        """Whether it is a TorchScript archive, which holds code."""
        return any(name.endswith("/constants.pkl") for name in self.names)

    def _take(self, name: str) -> int:
        if name not in self.archive.NameToInfo:
            raise pickle.UnpicklingError(f"no record {name:.100}")
        size = self.archive.getinfo(name).file_size
        self.left -= size
        if self.left < 0:
            raise UserError(f"{self.path}: its records expand beyond the file; fetch it again")
        return size

    def read(self, name: str) -> bytes:
        """A small record below the root."""
        size = self._take(self.root + name)
        with self.archive.open(self.root + name) as file:
            return file.read(size)

    def storage(self, pid: tuple) -> Storage:
        """The storage that a persistent id of the pickle means."""
        _, dtype, key, _, _ = pid
        if not isinstance(key, str):
            raise pickle.UnpicklingError("malformed storage")
        if key not in self.storages:
            name = f"{self.root}data/{key}"
            untyped = torch.UntypedStorage(self._take(name))
            with self.archive.open(name) as file:
                fill(file, untyped)
            self.storages[key] = Storage(untyped, storage_dtype(dtype))
        return self.storages[key]


class _Anything:
    """Whatever a checkpoint names, to a reader that builds nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments):
        return object.__new__(cls)

    def __init__(self, *_arguments):
        pass

    def __setstate__(self, state):
        pass


class _Measure(BoundedUnpickler):
    """Goes through a pickle within the limits and builds nothing but containers.

    storages: bytes of each storage that it mentions, together no more than the file has.
    """

    def __init__(self, file: Any, name: object, size: int, file_size: int):
        super().__init__(file, name, size)
        self.file_size = file_size
        self.storages: dict[str, int] = {}
        self.total = 0  # bytes of all of them

    def find_class(self, module: str, name: str):
        return self.container(module, name) or STORAGES.get(name, _Anything)

    def persistent_load(self, pid):
        if isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[2], str):
            itemsize = pid[1].itemsize if isinstance(pid[1], torch.dtype) else 1
            size = itemsize * pid[4] if isinstance(pid[4], int) else -1
            self.total += size - self.storages.get(pid[2], 0)
            self.storages[pid[2]] = size
            if size < 0 or self.total > self.file_size:
                raise UserError(
                    f"{self.name}: its tensors are larger than the file; fetch it again"
                )
        return _Anything()


def load_weights_only(path: str | Path) -> Any:
    """`torch.load(weights_only=True)` on the CPU, memory-mapped where the format allows it, after a reader that
    builds nothing has gone through the pickle: it cannot make torch hang, take memory that the
    file does not have, or leave tensors unfilled.

    Raises UserError where it is above a limit, and whatever torch raises for a damaged file and for
    more than tensors and plain containers.
    """
    path = Path(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as opened:
            archive = TorchArchive(opened, path)
            content = archive.read("data.pkl")
        _Measure(io.BytesIO(content), path, len(content), path.stat().st_size).load()
    else:
        _measure_legacy(path)
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    check_size(value, path)
    return value


def _measure_legacy(path: Path) -> None:
    """The five pickles in front of the tensors: magic number, version, machine, object, keys."""
    size = path.stat().st_size
    with mapped(path) as file:
        readers = [_Measure(file, path, size, size) for _ in range(5)]
        keys = [reader.load() for reader in readers][-1]
        if {*keys} != {*readers[3].storages}:
            raise UserError(f"{path}: tensors whose values are not in the file; fetch it again")


@contextmanager
def mapped(path: str | Path) -> Iterator[mmap.mmap]:
    """A file whose reads never go beyond its end. UserError for an empty one, and for a FIFO, which
    would wait for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: not a regular file; check its name")
    with open(path, "rb") as file:
        if not Path(path).stat().st_size:
            raise UserError(f"{path}: empty file; fetch it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def find_index(folder: Path) -> Path | None:
    """The list of shards of a Hugging Face folder whose weights lie in several files; a path to the
    list is itself that."""
    if folder.name in INDICES:
        folder = folder.parent
    return next((folder / name for name in INDICES if (folder / name).is_file()), None)


def read_index(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards that a Hugging Face index names, by name. UserError where a shard or
    a tensor is missing."""
    tensors: dict[str, Tensor] = {}
    shard_of = weight_map(index)
    for path in shards_of(index):
        tensors.update(read_tensors(path))
    lacking = [name for name in shard_of if name not in tensors]
    if lacking:
        raise UserError(f"{index}: no tensor {lacking[0]} in {shard_of[lacking[0]]}; {REMEDY}")
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor that an index names. UserError."""
    shard_of = read_json(index, dict, REMEDY).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: no weight_map; {REMEDY}")
    names = shard_of.values()
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: its shards must be files beside it; {REMEDY}")
    return shard_of


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, each once. UserError where one is missing."""
    paths = [index.parent / name for name in dict.fromkeys(weight_map(index).values())]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} of {len(paths)} shards are missing, e.g. {missing[0]}; {REMEDY}"
        )
    return paths


def is_safetensors(path: Path) -> bool:
    """Whether a file of weights is one of safetensors, whatever it is called: it begins with the
    length of a header in JSON, torch's as a zip file or a pickle. Others are by their name."""
    start = read_start(path, 9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and start[:2] not in (b"PK", b"\x80\2")


def unwrap_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a wrapped network under their own names: `module.` is a wrapper at the start of
    a name alone. The counter of torch's AveragedModel is left out. Names that would be one stay."""
    own = {WRAPPED.sub("", name): value for name, value in state.items() if name != "n_averaged"}
    return own if len(own) >= len(state) - ("n_averaged" in state) else dict(state)


def check_dense(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError where tensors are not plain numbers in memory: without values, sparse, quantized or
    complex. No network here has such weights."""
    for name, value in tensors.items():
        plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        if not plain or value.is_complex():
            kind = "without values" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise UserError(
                f"{path}: {name} is no plain tensor ({kind}); save the weights as plain numbers"
            )


def check_numbers(path: str | Path, name: str, value: Tensor) -> None:
    """UserError for a weight with NaN or infinity, which makes every score meaningless; masks may be
    -inf."""
    checked = value.is_floating_point() and value.element_size() > 1 and value.numel()
    if checked and not value.max() < float("inf"):
        raise UserError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors by name of one safetensors or torch file; with `wanted` those whose names it is
    true of, and of safetensors no others are read. UserError."""
    if not path.is_file():
        raise missing_file(path)
    kind = "file of weights"
    try:
        if is_safetensors(path):
            from safetensors import safe_open

            kind = "safetensors file"
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if wanted is None or wanted(name)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        content = load_weights_only(path)
    except UserError:
        raise
    except Exception as error:  # damaged files make the libraries raise anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        if isinstance(error, MemoryError) or "annot allocate memory" in reason:
            raise MemoryError(f"{path}: {reason}") from None  # the file may be as it should be
        seen = looks_like(read_start(path))
        raise UserError(f"{path}: not a readable {kind} ({reason}){seen}; fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no table of tensors; fetch it again")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if wanted is not None:
        tensors = {name: value for name, value in tensors.items() if wanted(name)}
    check_dense(path, tensors)
    return tensors
