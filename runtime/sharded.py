"""Sharded checkpoints: a folder in which every process has written its own part of the state.

    checkpoint_00000008/rank_00000.pt …   the tensors, or pieces of tensors, that a process wrote
    checkpoint_00000008/index.pt          the state with meta tensors for those, and each file's hash

All are archives as `runtime.hashed` writes them, so a sharded checkpoint has the reader, the hash
and the limits of a single file. The format of torch.distributed.checkpoint is not used: it keeps
its index in a pickle, and its hashes nowhere. Of a tensor that FSDP shards every process writes the
rows it has; tensors that all processes have are shared out by size.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base.distributed import World, unwrap
from base.errors import UserError
from base.torch_files import check_numbers
from base.writing import atomic_write
from runtime.hashed import find_file_damage, recorded_hash, write_hashed
from runtime.safe_pickle import load_torch

INDEX = "index.pt"
READERS = 8  # files verified at a time
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Key = tuple  # of a tensor: the keys of nested dicts and lists on the way to it


class Piece(NamedTuple):
    """Values of a tensor from `offsets` on, in every dimension."""

    offsets: tuple[int, ...]
    values: Tensor


def is_sharded(path: str | Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return (Path(path) / INDEX).is_file()


def index_of(path: Path) -> Path:
    """The file that has all but the tensors: of a sharded checkpoint its index, else itself."""
    return path / INDEX if is_sharded(path) else path


def rank_file(rank: int) -> str:
    """Name of the file that a process writes."""
    return f"rank_{rank:05d}.pt"


def tensors_in(tree: Any, key: Key = ()) -> Iterator[tuple[Key, Tensor]]:
    """All tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        yield key, tree
    elif isinstance(tree, Mapping | list | tuple):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in entries:
            yield from tensors_in(value, (*key, name))


def with_tensors(tree: Any, replace: Callable[[Key, Tensor], Tensor], key: Key = ()) -> Any:
    """A copy of nested dicts and lists with `replace(key, tensor)` for each tensor."""
    if isinstance(tree, Tensor):
        return replace(key, tree)
    if isinstance(tree, Mapping):
        return {name: with_tensors(value, replace, (*key, name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(with_tensors(v, replace, (*key, i)) for i, v in enumerate(tree))
    return tree


# ---- writing
def own_pieces(state: Any, world: World, buffers: Collection[Key] = ()) -> dict[Key, Piece]:
    """What this process writes of a state whose tensors are whole (equal on all processes) or
    DTensors.

    buffers: keys of tensors that count as rank 0 has them, such as running statistics.
    """
    from torch.distributed.tensor import DTensor

    pieces, loads = {}, [0] * world.size  # bytes that each rank writes of whole tensors
    for key, value in tensors_in(state):
        if isinstance(value, DTensor):
            local = value.to_local()
            if local.numel() and _is_first_replica(value):
                pieces[key] = Piece(_offsets(value), local)
            continue
        writer = 0 if key in buffers else loads.index(min(loads))
        loads[writer] += value.nbytes
        if writer == world.rank:
            pieces[key] = Piece((0,) * value.ndim, value)
    return pieces


def _offsets(value: Any) -> tuple[int, ...]:
    """Where the part of a DTensor on this process begins."""
    [chunk] = value.__create_chunk_list__()
    return tuple(chunk.offsets)


def _is_first_replica(value: Any) -> bool:
    """Whether no process before this one has the same part of a DTensor."""
    position = value.device_mesh.get_coordinate()
    if position is None:
        return False
    placed = zip(position, value.placements, strict=True)
    return all(at == 0 for at, placement in placed if placement.is_replicate())


class Staging:
    """Copies in host memory of what a process writes, so that training continues meanwhile.

    The buffers are kept for the next copy: pinned pages are slow to get.
    """

    def __init__(self):
        self.buffers: dict[Key, Tensor] = {}

    def copy(self, pieces: Mapping[Key, Piece]) -> dict[Key, Piece]:
        """The pieces in host memory; valid until the next call."""
        copies = {}
        on_gpu = False
        for key, (offsets, values) in pieces.items():
            pinned = values.device.type == "cuda"
            buffer = self.buffers.get(key)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
                self.buffers[key] = buffer
            buffer.copy_(values.detach(), non_blocking=True)
            copies[key] = Piece(offsets, buffer)
            on_gpu = on_gpu or pinned
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def write_part(folder: Path, rank: int, pieces: Mapping[Key, Piece], own: dict, remedy: str) -> str:
    """Write the file of one process; own: what it keeps for itself. Returns the file's hash."""
    content = {
        "tensors": {key: piece.values for key, piece in pieces.items()},
        "offsets": {key: piece.offsets for key, piece in pieces.items()},
        "own": own,
    }
    with atomic_write(folder / rank_file(rank), remedy) as temporary:
        return write_hashed(content, temporary)


def outline(state: Any) -> Any:
    """The state with meta tensors for its tensors: shapes and dtypes without values."""
    return with_tensors(
        state, lambda _, value: torch.empty(value.shape, dtype=value.dtype, device="meta")
    )


def write_index(folder: Path, index: dict, hashes: Sequence[str], remedy: str) -> None:
    """Write what makes the files of a folder one checkpoint. UserError where one is not there."""
    files = {rank_file(rank): found for rank, found in enumerate(hashes)}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder.parent}: {name}, which another node wrote, is not here; sharded "
                "checkpoints need a folder that all nodes see, or --checkpoint_format single"
            )
    with atomic_write(folder / INDEX, remedy) as temporary:
        write_hashed({**index, "files": files}, temporary)


# ---- reading
def find_folder_damage(folder: Path) -> str | None:
    """None if a sharded checkpoint is exactly what was written, else what is wrong with it."""
    if not (folder / INDEX).is_file():
        return f"{INDEX} is missing"
    if damage := find_file_damage(folder / INDEX):
        return f"{INDEX}: {damage}"
    files = _index(folder)["files"]
    with ThreadPoolExecutor(READERS) as pool:
        damages = pool.map(lambda name: _part_damage(folder / name, files[name]), files)
        return next(filter(None, damages), None)


def _part_damage(path: Path, expected: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if damage := find_file_damage(path):
        return f"{path.name}: {damage}"
    if recorded_hash(path) != expected:
        return f"{path.name} is of another checkpoint"
    return None


class OwnParts(Sequence):
    """What each process kept for itself, read when it is asked for."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rank):
        return load_torch(self.files[rank])["own"]


def load_index(folder: Path) -> dict[str, Any]:
    """A verified checkpoint with meta tensors for its tensors; `per_rank` is read when asked for."""
    index = _index(folder)
    return {**index, "per_rank": OwnParts([folder / name for name in index["files"]])}


def _index(folder: Path) -> dict[str, Any]:
    index = load_torch(folder / INDEX)
    names = index.get("files") if isinstance(index, dict) else None
    weights = index.get("model") if isinstance(index, dict) else None
    plain = isinstance(names, dict) and all(Path(name).name == name for name in names)
    if not plain or not isinstance(weights, dict):
        raise UserError(f"{folder / INDEX}: no index of a checkpoint; use another one")
    return index


class PieceReader:
    """The tensors of a sharded checkpoint, memory-mapped. first: the file that is looked into first,
    which has all that the same process needs again."""

    def __init__(self, folder: Path, files: Collection[str], first: int = 0):
        self.folder = folder
        names = list(files)
        self.waiting = names[first:] + names[:first] if first < len(names) else names
        self.opened: list[dict] = []

    def _parts(self) -> Iterator[dict]:
        yield from self.opened
        while self.waiting:
            path = self.folder / self.waiting.pop(0)
            part = load_torch(path)
            if not isinstance(part, dict) or not {"tensors", "offsets"} <= part.keys():
                raise UserError(f"{path}: no part of a checkpoint; use another one")
            self.opened.append(part)
            yield part

    def read(self, key: Key, like: Tensor, offsets: Sequence[int] = (), shape=None) -> Tensor:
        """Values of a tensor, all or a box from `offsets` on; a view of the file where one piece has
        just these. like: a meta tensor of its shape and dtype."""
        shape = tuple(like.shape if shape is None else shape)
        offsets = tuple(offsets) or (0,) * len(shape)
        missing = math.prod(shape)
        found = []
        for part in self._parts():
            if not missing:
                break
            if key not in part["tensors"]:
                continue
            values, begin = part["tensors"][key], part["offsets"][key]
            if begin == offsets and values.shape == shape:
                return values
            overlap = _overlap(begin, values.shape, offsets, shape)
            if overlap is not None:
                source, target = overlap
                found.append((values[source], target))
                missing -= values[source].numel()
        if missing:
            name = ".".join(map(str, key))
            raise UserError(f"{self.folder}: not all of {name} is there; use another checkpoint")
        result = torch.empty(shape, dtype=like.dtype)
        for values, target in found:
            result[target] = values
        return result


def _overlap(begin, size, wanted_begin, wanted_size) -> tuple[tuple, tuple] | None:
    """Slices of what two boxes share, in the first and in the second; None where that is nothing."""
    first = []
    second = []
    for a, n, b, m in zip(begin, size, wanted_begin, wanted_size, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        first.append(slice(low - a, high - a))
        second.append(slice(low - b, high - b))
    return tuple(first), tuple(second)


def read_state(folder: Path, index: dict, model: nn.Module, rank: int) -> dict[str, Any]:
    """`model` and `optimizer` of a checkpoint as this process needs them: its own part of what FSDP
    shards, all of the rest."""
    from torch.distributed.tensor import DTensor

    reader = PieceReader(folder, index["files"], first=rank)
    weights = unwrap(model).state_dict()

    def read(key: Key, meta: Tensor) -> Tensor:
        like = None
        if key[0] == "model":  # ("model", weight)
            like = weights.get(key[1])
        elif key[1] == "state":  # ("optimizer", "state", weight, name)
            like = weights.get(key[2])
        if not isinstance(like, DTensor) or like.shape != meta.shape:
            return reader.read(key, meta)
        local = like.to_local()
        own = reader.read(key, meta, _offsets(like), local.shape).to(local.device)
        return DTensor.from_local(
            own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    return with_tensors({"model": index["model"], "optimizer": index["optimizer"]}, read)


def weights_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a verified checkpoint by name, one after the other. UserError."""
    index = _index(folder)
    reader = PieceReader(folder, index["files"])
    for name, meta in index["model"].items():
        yield name, reader.read(("model", name), meta)


def merge_weights(folder: Path, path: Path) -> int:
    """Write the weights of a verified checkpoint as one safetensors file, one tensor in memory at a
    time; returns how many. UserError for NaN. The format: length of the header, header (JSON), the
    tensors' bytes."""
    index = _index(folder)
    # wide types first, so that every tensor begins at a multiple of its element's size
    metas = dict(sorted(index["model"].items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, meta in metas.items():
        begin, end = end, end + meta.nbytes
        about = {"dtype": SAFETENSORS_DTYPES[meta.dtype], "shape": list(meta.shape)}
        header[name] = {**about, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    reader = PieceReader(folder, index["files"])
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, meta in metas.items():
            values = reader.read(("model", name), meta).contiguous()
            check_numbers(folder, name, values)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
    return len(metas)
