"""TFRecord files without TensorFlow: frames with their checksums, tf.train.Example both ways, a
writer.

A file is a sequence of frames: length (uint64), masked CRC-32C of these eight bytes, payload,
masked CRC-32C of the payload; all little-endian. The payload is a protocol-buffer message
`Example`, a map of names to lists of byte strings, floats or integers. As a source of training
samples they go through `dataset.sources.shards.ShardSource`, beside tar shards.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from base.errors import BadSample
from base.limits import SAMPLE_BYTES
from base.names import is_hidden
from base.writing import atomic_write
from dataset.sources.protobuf import delimited, encode_varint, fields, varint
from dataset.sources.remote import describe

Feature = list[bytes] | list[float] | list[int]
HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")
BESIDE = (".idx", ".index", ".json", ".txt", ".md5", ".sha256", ".crc", ".part", ".tmp")
BYTES, FLOATS, INTEGERS = 1, 2, 3  # field numbers of the kinds of list in a Feature


def is_tfrecord(name: str) -> bool:
    """Whether a path or URL names a TFRecord file: 00000.tfrecord, train.tfrecord-00000-of-00128,
    a.tfrec. Hidden files and those beside it, such as 00000.tfrecord.idx, are none."""
    file = name.rpartition("/")[2].lower()
    return ".tfrec" in file and not file.endswith(BESIDE) and not is_hidden(name)


# ---- frames
def masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_frames(file: BinaryIO, name: str) -> Iterator[bytes | BadSample]:
    """The payloads of one open file in order.

    A payload whose checksum is wrong comes as a BadSample in its place. Behind a damaged length, or
    where the file is cut off, nothing can be found any more: one BadSample, and the end.
    """
    number = 0
    while True:
        place = f"{name}, record {number} (the first is 0)"
        try:
            frame = _read_frame(file)
        except Exception as error:  # every storage service raises its own
            reason = str(error) if isinstance(error, _Lost) else describe(error)
            yield BadSample(f"{place}: {reason}; what follows in this shard is lost", None)
            return
        if frame is None:
            return
        payload, crc = frame
        if crc == masked_crc(payload):
            yield payload
        else:
            yield BadSample(f"{place}: its checksum is wrong")
        number += 1


class _Lost(Exception):
    """Behind this nothing can be found."""


def _read_frame(file: BinaryIO) -> tuple[bytes, int] | None:
    """The next payload and its checksum; None at the end. Raises _Lost."""
    header = file.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise _Lost("the file is cut off")
    length, crc = HEADER.unpack(header)
    if crc != masked_crc(header[:8]):
        raise _Lost("the checksum of its length is wrong")
    if length > SAMPLE_BYTES:
        raise _Lost(f"{length} bytes, the limit is {SAMPLE_BYTES}")
    frame = file.read(length + CRC.size)
    if len(frame) < length + CRC.size:
        raise _Lost("the file is cut off")
    return frame[:length], CRC.unpack_from(frame, length)[0]


def count_frames(path: str | Path) -> int:
    """Number of records of a local file that is not compressed, found by stepping from length to
    length. Behind a damage the rest counts as one, which `read_frames` reports."""
    position = 0
    size = os.path.getsize(path)
    count = 0
    with open(path, "rb") as file:
        while header := file.read(HEADER.size):
            count += 1
            if len(header) < HEADER.size:
                break
            length, crc = HEADER.unpack(header)
            position += HEADER.size + length + CRC.size
            if crc != masked_crc(header[:8]) or position > size:
                break
            file.seek(position)
    return count


def write_records(path: str | Path, records: Iterable[bytes]) -> int:
    """Write payloads as a TFRecord file atomically; returns how many."""
    count = 0
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            frame = length + CRC.pack(masked_crc(length)) + record + CRC.pack(masked_crc(record))
            file.write(frame)
            count += 1
    return count


# ---- tf.train.Example
def parse_example(payload: bytes) -> dict[str, Feature]:
    """Features by name: lists of byte strings, of floats or of integers. Raises BadSample for
    anything else."""
    try:
        features = {}
        for _, message in fields(memoryview(payload), 1):
            for _, entry in fields(message, 1):
                parts = dict(fields(entry))
                features[bytes(parts[1]).decode()] = _parse_feature(parts.get(2, memoryview(b"")))
        return features
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise BadSample(f"not a tf.train.Example: {error!r}") from None


def encode_example(features: Mapping[str, object]) -> bytes:
    """Serialised Example of texts, byte strings, integers, floats, or lists of one of these
    kinds."""
    entries = (
        delimited(1, name.encode()) + delimited(2, _encode_feature(v))
        for name, v in features.items()
    )
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def _parse_feature(message: memoryview) -> Feature:
    values: Feature = []
    for kind, content in fields(message):
        for _, value in fields(content, 1):
            if kind == BYTES:
                values.append(bytes(value))
            elif kind == FLOATS:  # packed, or a single one
                values += np.frombuffer(value, "<f4").tolist()
            elif kind == INTEGERS:
                values += _integers(value)
    return values


def _integers(value: int | memoryview) -> list[int]:
    """Packed integers, or a single one; two's complement of 64 bits."""
    numbers = [value] if isinstance(value, int) else []
    at = 0
    while not isinstance(value, int) and at < len(value):
        number, at = varint(value, at)
        numbers.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _encode_feature(value: object) -> bytes:
    values = (
        list(value)
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
        else [value]
    )
    if all(isinstance(v, str | bytes) for v in values):
        content = b"".join(delimited(1, v.encode() if isinstance(v, str) else v) for v in values)
        return delimited(BYTES, content)
    if all(isinstance(v, int | np.integer) for v in values):
        return delimited(
            INTEGERS, delimited(1, b"".join(encode_varint(int(v) & (1 << 64) - 1) for v in values))
        )
    return delimited(FLOATS, delimited(1, np.asarray(values, "<f4").tobytes()))
