"""TensorFlow's object-based checkpoints, read without TensorFlow: `<prefix>.index` and
`<prefix>.data-?????-of-?????`.

The index is a table in LevelDB's format, uncompressed: blocks of sorted entries, their keys
shortened by what they share with the key before, an index block over the blocks, and a footer.
Values are protocol-buffer messages that tell dtype, shape and place of a tensor in the data files.
"""

import mmap
import struct
from collections.abc import Iterator
from glob import escape
from pathlib import Path

import torch

from base.errors import UserError
from dataset.sources.protobuf import fields, varint
from dataset.sources.tfrecord import masked_crc

FOOTER, MAGIC = 48, 0xDB4775248B80FB57
TRAILER = 5  # bytes behind a block: its compression and its checksum
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
NO_NUMBERS = (7, 20, 21)  # strings, and handles of what is not stored
ENDIANNESS = 2  # a field of the header, which lies under the empty key; 0, and left out: little
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
TYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}


def read_checkpoint(
    prefix: str | Path, slot: str | None = None
) -> dict[str, tuple[str, torch.Tensor]]:
    """Checkpoint key (without `/.ATTRIBUTES/VARIABLE_VALUE`) -> (full name of the variable,
    tensor).

    prefix: the path without `.index`, or with it. Optimizer slots are left out, but for those named
    `slot`, as are tensors of strings and handles. Raises UserError where the files are missing, damaged or of
    another kind.
    """
    prefix = str(prefix).removesuffix(".index")
    if not Path(prefix + ".index").is_file():
        raise UserError(
            f"{prefix}.index: no such file; give the prefix of a TensorFlow checkpoint, such as FOLDER/model-weights"
        )
    try:
        rows = dict(_table(Path(prefix + ".index").read_bytes()))
        if dict(fields(memoryview(rows.pop(b"", b"")))).get(ENDIANNESS):
            raise UserError(
                f"{prefix}.index: written on a big-endian machine; save it again on another"
            )
        entries = {key.decode(): _entry(value) for key, value in rows.items()}
        shards = _shards(prefix)
        names = (
            _full_names(_bytes(entries[OBJECT_GRAPH], shards)) if OBJECT_GRAPH in entries else {}
        )
        kept = f"/{slot}{SUFFIX}"
        wanted = [
            key for key in entries if ".OPTIMIZER_SLOT" not in key or (slot and key.endswith(kept))
        ]
        wanted = [key for key in wanted if entries[key]["dtype"] not in NO_NUMBERS]
        for key in wanted:
            if (number := entries[key]["dtype"]) not in TYPES:
                raise UserError(
                    f"{prefix}.index: {key} is of TensorFlow's dtype {number}, which is not read; "
                    "save the variables as float32"
                )
        return {
            key.removesuffix(SUFFIX): (names.get(key, ""), _tensor(key, entries[key], shards))
            for key in wanted
        }
    except (ValueError, KeyError, IndexError, struct.error, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{prefix}.index: damaged, or no TensorFlow checkpoint ({error!r}); fetch it again"
        ) from None


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All entries of a table, in order."""
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ValueError("no magic number at its end")
    footer = memoryview(data)[-FOOTER:]
    _, at = varint(footer, 0)  # the place of a block of remarks
    _, at = varint(footer, at)
    for _, handle in _block(data, *_handle(footer, at)):
        yield from _block(data, *_handle(memoryview(handle), 0))


def _handle(data: memoryview, at: int) -> tuple[int, int]:
    offset, at = varint(data, at)
    return offset, varint(data, at)[0]


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = data[offset : offset + size]
    trailer = data[offset + size : offset + size + TRAILER]
    if trailer[0]:
        raise ValueError("a compressed table")
    if struct.unpack("<I", trailer[1:])[0] != masked_crc(block + trailer[:1]):
        raise ValueError("the checksum of a block is wrong")
    view = memoryview(block)
    at = 0
    key = b""
    # restart offsets and their number lie behind the entries
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    while at < end:
        shared, at = varint(view, at)
        own, at = varint(view, at)
        length, at = varint(view, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _entry(value: bytes) -> dict:
    """dtype, shape, shard, offset, size and checksum of a tensor."""
    found = {"dtype": 0, "shape": [], "shard": 0, "offset": 0, "size": 0, "crc": None}
    names = {1: "dtype", 3: "shard", 4: "offset", 5: "size"}
    for number, content in fields(memoryview(value)):
        if number == 2:
            found["shape"] = [dict(fields(dim)).get(1, 0) for _, dim in fields(content, 2)]
        elif number == 6:
            found["crc"] = struct.unpack("<I", content)[0]
        elif number in names:
            found[names[number]] = content
    return found


def _shards(prefix: str) -> list[memoryview]:
    """The data files, mapped into memory."""
    folder = Path(prefix).parent
    name = Path(prefix).name
    paths = sorted(folder.glob(f"{escape(name)}.data-?????-of-?????"))
    if not paths or len(paths) != int(paths[0].name[-5:]):
        raise UserError(
            f"{prefix}.data-*: {len(paths)} data files lie beside the index; fetch all of them"
        )
    mapped = []
    for path in paths:
        with path.open("rb") as file:
            mapped.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
    return mapped


def _bytes(entry: dict, shards: list[memoryview]) -> memoryview:
    content = shards[entry["shard"]][entry["offset"] : entry["offset"] + entry["size"]]
    if len(content) != entry["size"]:
        raise ValueError("a data file is cut off")
    return content


def _tensor(key: str, entry: dict, shards: list[memoryview]) -> torch.Tensor:
    content = _bytes(entry, shards)
    if entry["crc"] is not None and masked_crc(bytes(content)) != entry["crc"]:
        raise ValueError(f"the checksum of {key} is wrong")
    return torch.frombuffer(bytearray(content), dtype=TYPES[entry["dtype"]]).reshape(entry["shape"])


def _full_names(content: memoryview) -> dict[str, str]:
    """Checkpoint key -> full name, from the tensor of one string that describes the tree of
    objects."""
    _, at = varint(content, 0)  # its length; a checksum of the length follows
    names = {}
    for _, node in fields(content[at + 4 :], 1):
        for _, attribute in fields(node, 2):
            parts = dict(fields(attribute))
            names[bytes(parts.get(3, b"")).decode()] = bytes(parts.get(2, b"")).decode()
    return names
