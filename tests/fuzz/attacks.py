"""Small files that ask for much: each function writes one, `ATTACKS` says which reader takes it.

`words`: what the sentence of the refusal must hold; "" where the file is read and harmless.
"""

import bz2
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.fuzz.seeds import image, jit, merges, plain, weights, wordpiece, zip_member

FLOOD = 4 << 20  # bytes of a flood of one-byte opcodes
BIG = 1 << 62


class Attack(NamedTuple):
    """A file and the reader it is for."""

    name: str
    reader: str
    data: Callable[[], bytes]
    words: str


# ---- pickles
def doubled(start: bytes, pair: bytes, times: int = 60) -> bytes:
    """Opcodes that leave a container of two references to a container of two references ... on the
    stack; `pair` makes one of two @."""

    def memo(opcode: bytes, number: int) -> bytes:
        return opcode + struct.pack("<I", 1000 + number)

    steps = [start + memo(b"r", 0) + b"0"]
    for number in range(times):
        step = pair.replace(b"@", memo(b"j", number))
        steps.append(step + memo(b"r", number + 1) + b"0")
    return b"".join(steps) + memo(b"j", times)


TUPLES = doubled(b")", b"@@\x86")
LISTS = doubled(b"]", b"]@a@a")
FROZEN = doubled(b"(\x91", b"(@@\x85\x91")


def key_of(opcodes: bytes) -> bytes:
    """A dictionary with one key."""
    return b"\x80\x04}" + opcodes + b"Ns."


def key_for_torch() -> bytes:
    """The same with the few opcodes that torch's own unpickler knows."""
    steps = b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(60))
    return b"\x80\2}()q\0" + steps + b"tNs."


def flood(opcode: bytes, start: bytes = b"\x80\x04") -> bytes:
    return start + opcode * FLOOD + b"."


def copies(call: bytes) -> bytes:
    """A megabyte of text, copied by a call a few thousand times."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    return b"\x80\x02](" + text + b"q\0" + call + b"q\1" + b"h\1h\0\x85R" * 5000 + b"e."


def colliding(count: int = 17) -> bytes:
    """A dictionary whose 2**count keys have one hash: -1 and -2 have the same."""
    keys = []
    for number in range(1 << count):
        bits = [b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff"]
        keys.append(b"(" + b"".join(bits[number >> bit & 1] for bit in range(count)) + b"tN")
    return b"\x80\x04}(" + b"".join(keys) + b"u."


def object_array(opcodes: bytes) -> bytes:
    """A numpy array of one object."""
    array = pickle.dumps(np.array([None], dtype=object), 2)
    start = array.index(b"]", array.index(b"dtype\n"))
    end = array.index(b"a", start)
    return array[: start + 1] + opcodes + array[end:]


def npy(shape: tuple) -> bytes:
    header = str({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(64)


# ---- torch files
def torch_zip(data: bytes, records: dict[str, bytes] | None = None, **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def tensor(key: str = "0", size: int = 4, stride: int = 1, count: int = 4) -> bytes:
    """Opcodes of a one-dimensional float tensor."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key))
    storage += key.encode() + b"X\3\0\0\0cpuJ" + struct.pack("<i", count) + b"tQ"
    view = b"K\0\x8a\x08" + struct.pack("<q", size) + b"\x85J" + struct.pack("<i", stride) + b"\x85"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + view
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def tensors_of(keys: list[str], extra: bytes = b"") -> bytes:
    entries = b"".join(
        b"X" + struct.pack("<I", len(key)) + key.encode() + tensor(key, count=1 << 18)
        for key in keys
    )
    return b"\x80\x02}(" + entries + b"u" + extra + b"."


NAMESPACE = b"X\1\0\0\0ncargparse\nNamespace\n)\x81s"


def squeezed_storage() -> bytes:
    data = b"\x80\x02}X\1\0\0\0w" + tensor(count=1 << 26) + b"s" + NAMESPACE + b"."
    return torch_zip(data, {"data/0": bytes(1 << 28)}, compression=zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """Two hundred entries of the directory that all mean the same megabyte."""
    keys = [f"{number:03}" for number in range(200)]
    data = torch_zip(tensors_of(keys, NAMESPACE), {"data/000": bytes(1 << 20)})
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<LL", data, end + 12)
    directory = data[start : start + size]
    entry = directory[directory.rindex(b"PK\1\2") :]
    more = b"".join(entry.replace(b"data/000", f"data/{key}".encode()) for key in keys[1:])
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 202, 202, size + len(more), start, 0)
    return data[: start + size] + more + tail


def module_tree(script: bool) -> bytes:
    """A module whose two children are one module, whose two children are one module ..."""
    if script:
        kind = b"c__torch__\nM\n)\x81"
        leaf, node = kind + b"}b", kind + b"}(X\1\0\0\0a@X\1\0\0\0b@ub"
    else:
        kind = b"cdall_e\nM\n)\x81"
        tables = b"}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules}"
        leaf, node = kind + tables + b"ub", kind + tables + b"(X\1\0\0\0a@X\1\0\0\0b@uub"
    data = b"\x80\x02" + doubled(leaf, node) + b"."
    return torch_zip(data, {"constants.pkl": b"\x80\x02)."} if script else None)


def legacy(data: bytes, keys: list[str], tail: bytes = b"") -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [pickle.dumps(value, 2) for value in head]
    return b"".join(parts) + data + pickle.dumps(keys, 2) + tail


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


# ---- shards
def tar(size_field: bytes, kind: bytes = b"0", name: str = "0.png") -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf())
    header[124:136] = size_field
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(9728)


def gnu_number(value: int) -> bytes:
    return (value & (1 << 96) - 1 | (0x80 << 88 if value >= 0 else 0xFF << 88)).to_bytes(12, "big")


def tar_of_zeros(compress: Callable[[bytes], bytes]) -> bytes:
    """A member of 300 MB of zeros, compressed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = 300 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    return compress(file.getvalue())


# ---- images
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + size + more + pixels + chunk(b"IEND", b"")


def png_text() -> bytes:
    squeezed = zlib.compress(bytes(200 << 20))
    return png(4, 4, chunk(b"zTXt", b"key\0\0" + squeezed) * 3)


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def pages(kind: str, count: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.new("L", (2, 2), number % 250) for number in range(count)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def tiff(width: int, height: int) -> bytes:
    """A TIFF of one strip that says it is large."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


# ---- text
def laughs(times: int = 9) -> bytes:
    lines = ["x0: &x0 [1,1,1,1,1,1,1,1,1]"]
    for number in range(1, times):
        lines.append(f"x{number}: &x{number} [{','.join([f'*x{number - 1}'] * 9)}]")
    return "\n".join([*lines, f"seed: *x{times - 1}"]).encode()


def zip_directory() -> bytes:
    """An empty zip file whose directory says that it has four gigabytes of entries."""
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 0xFFFFFFF0, 0, 0)


def zipped_zeros() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(300 << 20))
    return file.getvalue()


NUMBERS = [f"{number:05}" for number in range(10_000)]
MEMORY, HASH, LIMIT = "bytes of memory", "a tuple that stands for", "the limit is"
ATTACKS = [
    Attack("memo index", "refs.p", lambda: b"\x80\x02Nr\0\0\0\x10.", ""),
    Attack("doubled tuples as a key", "refs.p", lambda: key_of(TUPLES), HASH),
    Attack("doubled tuples in a set", "refs.p", lambda: b"\x80\x04\x8f(" + TUPLES + b"\x90.", HASH),
    Attack("doubled frozensets", "refs.p", lambda: b"\x80\x04" + FROZEN + b".", HASH),
    Attack("doubled lists", "refs.p", lambda: b"\x80\x04" + LISTS + b".", "containers stand for"),
    Attack("deep tuple as a key", "refs.p", lambda: key_of(b")" + b"\x85" * 100_000), HASH),
    Attack("keys of one hash", "refs.p", colliding, "keys of one hash"),
    Attack("a list that holds itself", "refs.p", lambda: b"\x80\x02]q\0h\0a.", "contains itself"),
    Attack("flood of sets", "refs.p", lambda: flood(b"\x8f"), MEMORY),
    Attack("flood of marks", "refs.p", lambda: flood(b"("), MEMORY),
    Attack("flood of memos", "refs.p", lambda: flood(b"\x94", b"\x80\x04N"), ""),
    Attack("copied bytes", "refs.p", lambda: copies(b"cbuiltins\nbytearray\n"), MEMORY),
    Attack("copied sets", "refs.p", lambda: copies(b"cbuiltins\nset\n"), MEMORY),
    Attack("long bytearray", "refs.p", lambda: b"\x80\5\x96" + struct.pack("<Q", BIG), "damaged"),
    Attack("long bytes", "refs.p", lambda: b"\x80\4\x8e" + struct.pack("<Q", BIG), "damaged"),
    Attack("long text", "refs.p", lambda: b"\x80\4\x8d" + struct.pack("<Q", BIG), "damaged"),
    Attack("long frame", "refs.p", lambda: b"\x80\4\x95" + struct.pack("<Q", BIG), "damaged"),
    Attack("long integer", "refs.p", lambda: b"\x80\2\x8b" + struct.pack("<i", 1 << 30), LIMIT),
    Attack("long decimal", "refs.p", lambda: b"L" + b"9" * (1 << 20) + b"L\n.", "damaged"),
    Attack("extension", "refs.p", lambda: b"\x80\2\x82\1.", "registered extension"),
    Attack("array of a count", "refs.p", lambda: object_array(b"K\1"), ""),
    Attack("array of doubled lists", "refs.p", lambda: object_array(LISTS), "containers stand for"),
    Attack("shape of 10^12 in .npy", "refs.p", lambda: npy((10**12,)), "damaged"),
    Attack("shape of 10^4 dimensions", "refs.p", lambda: npy((1,) * 10**4), "damaged"),
    Attack("doubled key in a checkpoint", "torch", lambda: torch_zip(key_of(TUPLES)), HASH),
    Attack("doubled key for torch", "torch", lambda: torch_zip(key_for_torch()), HASH),
    Attack("doubled value", "torch", lambda: torch_zip(b"\x80\2" + LISTS + b"."), "stand for"),
    Attack("squeezed tensor", "torch", squeezed_storage, "larger than the file"),
    Attack("overlapping tensors", "torch", overlapping, "larger than the file"),
    Attack(
        "squeezed pickle",
        "torch",
        lambda: torch_zip(flood(b")"), compression=zipfile.ZIP_DEFLATED),
        "expand beyond the file",
    ),
    Attack(
        "expanded tensor",
        "torch",
        lambda: torch_zip(
            b"\x80\2}X\1\0\0\0w" + tensor(size=1 << 40, stride=0) + b"s.", {"data/0": bytes(16)}
        ),
        "bytes in an expanded tensor",
    ),
    Attack(
        "ten thousand storages", "torch", lambda: torch_zip(tensors_of(NUMBERS, b"")), "larger than"
    ),
    Attack("doubled modules", "torch", lambda: module_tree(script=False), "modules"),
    Attack("doubled modules", "torchscript", lambda: module_tree(script=True), "modules"),
    Attack(
        "doubled key",
        "torchscript",
        lambda: torch_zip(key_of(TUPLES), {"constants.pkl": b"\x80\2)."}),
        HASH,
    ),
    Attack(
        "tensors left out",
        "torch",
        lambda: legacy(b"\x80\2}X\1\0\0\0w" + tensor() + b"s.", [], bytes(64)),
        "values are not in the file",
    ),
    Attack(
        "long storage",
        "torch",
        lambda: legacy(b"\x80\2}X\1\0\0\0w" + tensor(count=1 << 29) + b"s.", ["0"], bytes(64)),
        "larger than the file",
    ),
    Attack("long header", "safetensors", lambda: safetensors(b"{}", BIG), "safetensors"),
    Attack("deep header", "safetensors", lambda: safetensors(b"[" * 1_000_000), "safetensors"),
    Attack(
        "large shape",
        "safetensors",
        lambda: safetensors(
            json.dumps(
                {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
            ).encode()
        ),
        "safetensors",
    ),
    Attack("negative size", "tar", lambda: tar(gnu_number(-512)), "damaged header"),
    Attack("size of 20 GB", "tar", lambda: tar(gnu_number(20 << 30)), "more than the file holds"),
    Attack("sparse file of 20 GB", "tar", lambda: tar(gnu_number(512), b"S"), "sparse"),
    Attack("long name of 20 GB", "tar", lambda: tar(gnu_number(20 << 30), b"L"), "a name of"),
    Attack("gzip bomb", "tar.gz", lambda: tar_of_zeros(lambda d: gzip.compress(d, 1)), LIMIT),
    Attack("bzip2 bomb", "tar.gz", lambda: tar_of_zeros(lambda d: bz2.compress(d, 1)), LIMIT),
    Attack("record of 2^62 bytes", "tfrecord", lambda: frame(BIG), LIMIT),
    Attack("absurd directory", "zip", zip_directory, "zip"),
    Attack("deflated zeros", "zip", zipped_zeros, "more than"),
    Attack("PNG of 10^10 pixels", "image", lambda: png(100_000, 100_000), "exceed"),
    Attack("PNG of 4 * 10^7 pixels", "image", lambda: png(6_500, 6_500), ""),
    Attack("PNG with text bombs", "image", png_text, "too large"),
    Attack("JPEG of 4 * 10^9 pixels", "image", lambda: jpeg(65_500, 65_500), "exceed"),
    Attack("TIFF of 1000 pages", "image", lambda: pages("TIFF", 1000), ""),
    Attack("TIFF of 10^18 pixels", "image", lambda: tiff(10**9, 10**9), "exceed"),
    Attack("GIF of 3000 frames", "image", lambda: pages("GIF", 3000), ""),
    Attack("10^6 brackets", "json", lambda: b"[" * 1_000_000, "nested deeper"),
    Attack("10^6 brackets in an entry", "records", lambda: b"[" * 1_000_000, "nested deeper"),
    Attack("aliases of aliases", "yaml", laughs, "aliases stand for"),
    Attack("10^5 brackets", "yaml", lambda: b"x: " + b"[" * 100_000, "nested deeper"),
    Attack("gzip bomb", "bpe.gz", lambda: gzip.compress(bytes(300 << 20), 1), "more than"),
    Attack("nested tokenizer.json", "tokenizer", lambda: b'{"a":' * 100_000, "nested deeper"),
    Attack("99999999999 shards", "nshards", lambda: b"99999999999", "shards"),
    Attack("a million shards", "nshards", lambda: b"1000000", "no such file"),
]


def frame(length: int) -> bytes:
    from dataset.sources.tfrecord import CRC, masked_crc

    head = struct.pack("<Q", length)
    return head + CRC.pack(masked_crc(head)) + bytes(64)


# ---- readers
def read(reader: str, path: Path) -> object:
    """What the project's reader makes of a file; messages of bad samples are raised."""
    return READERS[reader](path)


def _tar(path: Path) -> object:
    from dataset.sources.remote import plain_stream
    from dataset.sources.tar import TarWalk, read_samples

    with plain_stream(str(path)) as (file, size):
        samples = list(read_samples(TarWalk(file, size)))
    faults = [sample.fault for sample in samples if sample.fault]
    assert faults, samples
    return _raise(f"{path}: {faults[0]}")


def _tfrecord(path: Path) -> object:
    from base.errors import BadSample
    from dataset.sources.tfrecord import read_frames

    with path.open("rb") as file:
        frames = list(read_frames(file, str(path)))
    bad = [each for each in frames if isinstance(each, BadSample)]
    return _raise(str(bad[0])) if bad else frames


def _raise(message: str) -> object:
    from base.errors import BadSample

    raise BadSample(message)


def renamed(ending: str, reader: Callable) -> Callable[[Path], object]:
    """The reader of a file that its ending tells."""
    return lambda path: reader(path.rename(path.with_suffix(ending)))


def _json(path: Path) -> object:
    from base.reading import read_json

    return read_json(path)


def _records(path: Path) -> object:
    from dataset.sources.records import Records

    return len(Records([path], ("image",)))


def _yaml(path: Path) -> object:
    from runtime.config.yaml import read_yaml

    return read_yaml(path)[0]


def _nshards(path: Path) -> object:
    from dataset.tasks.catalog import Entry
    from dataset.tasks.zeroshot import shard_files

    folder = path.parent / "test"
    folder.mkdir(exist_ok=True)
    path.rename(folder / "nshards.txt")
    entry = Entry(name="attack", kind="webdataset", path=str(path.parent), split="test")
    return shard_files(entry, path.parent / "cache")


READERS: dict[str, Callable[[Path], object]] = {
    "refs.p": plain,
    "torch": weights,
    "torchscript": jit,
    "safetensors": renamed(".safetensors", weights),
    "tar": _tar,
    "tar.gz": _tar,
    "tfrecord": _tfrecord,
    "zip": zip_member,
    "image": lambda path: tuple(image(path).shape),
    "json": _json,
    "records": _records,
    "yaml": _yaml,
    "bpe.gz": merges,
    "tokenizer": renamed(".json", wordpiece),
    "nshards": _nshards,
}
