"""The wire format of protocol buffers, as much of it as TensorFlow's files need."""

from collections.abc import Iterator

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types


def fields(message: memoryview, only: int | None = None) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an integer for varints, bytes for everything else.
    ValueError or IndexError where it is none. only: fields of this number alone.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = varint(message, at)
        else:
            length = {FIXED64: 8, FIXED32: 4}.get(wire)
            if wire == DELIMITED:
                length, at = varint(message, at)
            elif length is None:
                raise ValueError(f"wire type {wire}")
            if at + length > len(message):
                raise ValueError("a field is longer than its message")
            value, at = message[at : at + length], at + length
        if only is None or number == only:
            yield number, value


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The variable-length integer at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def encode_varint(value: int) -> bytes:
    """A variable-length integer."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def delimited(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return encode_varint(number << 3 | DELIMITED) + encode_varint(len(content)) + content
