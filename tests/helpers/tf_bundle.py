"""TensorFlow's object-based checkpoints without TensorFlow: one block of entries, one data file."""

import struct
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dataset.sources.protobuf import delimited, encode_varint
from dataset.sources.tfrecord import masked_crc
from scripts.weights.tf_checkpoint import FOOTER, MAGIC, SUFFIX, TYPES

BIG_ENDIAN = encode_varint(2 << 3) + b"\1"  # of the header that lies under the empty key


def write_bundle(
    prefix: Path, tensors: Mapping[str, Tensor], header: bytes = b"", types: Mapping[str, int] = {}
) -> None:
    """`prefix`.index and `prefix`.data-00000-of-00001. types: other numbers of dtypes, by key."""
    numbers = {dtype: number for number, dtype in TYPES.items()}
    entries = {b"": header}
    data = b""
    for key, value in sorted(tensors.items()):
        content = value.numpy().tobytes()
        shape = b"".join(delimited(2, _number(1, size)) for size in value.shape)
        entry = _number(1, types.get(key, numbers[value.dtype])) + delimited(2, shape)
        entry += _number(4, len(data)) + _number(5, len(content))
        entries[(key + SUFFIX).encode()] = entry + b"\x35" + struct.pack("<I", masked_crc(content))
        data += content
    table = bytearray()
    handle = _append(table, entries)
    remarks = _append(table, {})
    over = _append(table, {b"~": handle})
    table += (remarks + over).ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


def _append(table: bytearray, rows: Mapping[bytes, bytes]) -> bytes:
    """Where the block of these rows lies behind the table, which it lengthens."""
    block = b"".join(
        encode_varint(0) + encode_varint(len(key)) + encode_varint(len(row)) + key + row
        for key, row in rows.items()
    )
    block += struct.pack("<II", 0, 1)
    handle = encode_varint(len(table)) + encode_varint(len(block))
    table += block + b"\0" + struct.pack("<I", masked_crc(block + b"\0"))
    return handle


def _number(field: int, value: int) -> bytes:
    return encode_varint(field << 3) + encode_varint(value)
