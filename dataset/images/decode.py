"""Reading one image: any format in, uint8 RGB out; what cannot be read is a BadSample that says why.

Where other pixels come from a file than before, or from one that was refused, raise
`base.pixels.DECODING`.
"""

import io
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import torch

from base.errors import BadSample, UserError
from base.image_names import check_fetched, existing
from base.limits import IMAGE_BYTES, IMAGE_PIXELS
from base.pixels import PILLOW_FORMATS, pillow_formats, to_rgb
from base.reading import is_file
from base.text import looks_like
from base.zip_member import archive_of, image_source

ORIENTATION = 0x0112  # tag of EXIF
GREY = 128  # what libjpeg fills the missing rows of a truncated file with
ZEROS = bytes(16)  # no JPEG, PNG or GIF ends with so many
# Pillow's formats whose rows are read up to where the file ends; others need all of it.
BY_ROWS = ("PNG", "GIF", "TIFF", "BMP", "DIB", "PPM")
GREY_OF = {
    **{"L": GREY, "LA": (GREY, GREY), "I;16": GREY * 257, "I;16B": GREY * 257, "I": GREY * 257},
    **{"RGB": (GREY,) * 3, "RGBA": (GREY,) * 4, "CMYK": (0, 0, 0, 255 - GREY)},
}  # by Pillow's mode
GREY_SIDE = 224  # of the image that stands for an unreadable one


@dataclass
class Reading:
    """How images are read within `reading(...)`, and what was noticed: names of truncated images,
    messages about unreadable ones."""

    exif: bool = False
    grey: bool = False
    truncated: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


_CURRENT: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(exif: bool = False, grey: bool = False) -> Iterator[Reading]:
    """Settings of every `decode_image` inside the block, and a record of what it noticed.

    exif: turn images by their EXIF orientation; the originals do not.
    grey: an unreadable image becomes a grey one instead of a BadSample, for evaluation.
    """
    token = _CURRENT.set(Reading(exif, grey))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


def size_of(image: Path | bytes) -> tuple[int, int]:
    """Width and height of an image file, in a zip file too, or of its bytes, by the header alone.
    Raises BadSample where it is none."""
    from PIL import Image

    name = "an image" if isinstance(image, bytes) else image
    source = image if isinstance(image, bytes) else image_source(Path(), str(existing(image)))
    try:
        if isinstance(source, Path) and not is_file(source):  # a FIFO would wait for ever
            raise FileNotFoundError("no such file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return opened.size
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's readers raise
        raise BadSample(f"{name}: {error}") from None


def decode_image(
    source: str | Path | bytes, name: str = "", exif: bool | None = None
) -> torch.Tensor:
    """uint8 [3,H,W] RGB (channels last in memory) of an image file, in a zip file too, or of its bytes.

    Grey and RGB JPEG take libjpeg's fast path; everything else (CMYK, palette, 16 bit, PNG, WebP
    ...) goes through Pillow. As in the original pipelines the first frame of an animation is taken,
    transparency is dropped without blending, and the missing rows of a truncated JPEG, PNG, GIF,
    BMP, PPM or uncompressed TIFF are grey (of a palette, its first colour). 16-bit grey is scaled to
    8 bits.
    name: how to call the image in errors. exif: turn it by its EXIF orientation; by default as the
    surrounding `reading` says, and not without one.
    Raises BadSample: missing, empty, corrupt, too many bytes or pixels, pixels without a known range
    (32-bit integers, floating point), a format that is not on the list of `dataset.images.formats`.
    """
    current = _CURRENT.get() or Reading()
    if not isinstance(source, bytes):
        name = name or str(source)
    try:
        pixels, whole = _decode(source, name, current.exif if exif is None else exif)
    except BadSample as error:
        if not current.grey:
            raise
        current.unreadable.append(str(error))
        return torch.full((3, GREY_SIDE, GREY_SIDE), GREY, dtype=torch.uint8)
    if not whole:
        current.truncated.append(name)
    return pixels


def _decode(source: str | Path | bytes, name: str, exif: bool) -> tuple[torch.Tensor, bool]:
    """Pixels, and whether all of them were in the file. Raises BadSample."""
    if not isinstance(source, bytes):
        source = image_bytes(Path(source), name)
    if not source:
        raise BadSample(f"{name}: empty file")
    size = plain_jpeg_size(source)
    if size and size[0] * size[1] > IMAGE_PIXELS:
        raise BadSample(
            f"{name}: {size[1]} x {size[0]} pixels exceed the limit of {IMAGE_PIXELS:,}"
        )
    if source.endswith(ZEROS) and (size or source.startswith((b"\x89PNG", b"GIF8"))):
        source = source.rstrip(b"\0")  # a download that stopped, into a file of the full size
    if size and (decode := _fast_decoder()) and not (exif and is_turned(source)):
        try:
            return decode(torch.frombuffer(bytearray(source), dtype=torch.uint8)), True
        except RuntimeError:
            pass  # a rare variant or damage: Pillow decides
    return _decode_with_pillow(source, name, exif)


def image_bytes(path: Path, name: str) -> bytes:
    """Content of a regular file of bounded size, or of a member of a zip file. Raises BadSample."""
    if "\0" in name:  # for which Python has an error of another kind
        raise BadSample(f"{name!r}: no path of a file")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise BadSample(f"{name}: is {kind}")
        if status.st_size > IMAGE_BYTES:
            raise BadSample(f"{name}: {status.st_size} bytes, the limit is {IMAGE_BYTES}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        source = image_source(Path(), str(existing(path)))
        if isinstance(source, bytes):
            return source
        if source != path:
            return image_bytes(source, name)
        raise BadSample(f"{name}: {error.strerror}") from None
    except OSError as error:
        raise BadSample(f"{name}: {error.strerror or error}") from None


def load_decoder() -> None:
    """Import torchvision, which takes seconds: loaders do before they start processes, which then
    share it."""
    _fast_decoder()


@cache
def _fast_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchvision's JPEG decoder while it has one: Pillow's pixels at 1.4 times its speed.

    The operator itself: the function around it warns at every image since torchvision 0.29.
    """
    try:
        import torchvision.io  # noqa: F401

        operator = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None
    rgb = 3  # ImageReadMode.RGB
    return lambda data: operator(data, rgb)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit grey or three-component JPEG, read from its frame header; None
    for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack(">BHHB", data[place + 4 : place + 10])
            plain = bits == 8 and components in (1, 3) and height and width
            return (height, width) if plain else None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _open(data: bytes):
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=pillow_formats())
    except Image.DecompressionBombError:  # twice the limit; its message speaks of attacks
        raise ValueError(f"its pixels exceed the limit of {IMAGE_PIXELS:,}") from None
    except UnidentifiedImageError:  # whose message is an address in memory
        seen = looks_like(data)
        raise ValueError(f"cannot identify an image format in it{seen}") from None
    width, height = image.size
    if width * height > IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels exceed the limit of {IMAGE_PIXELS:,}")
    return image


def image_ending(data: bytes, name: str) -> str:
    """The ending of an encoded image, by its content. Raises BadSample."""
    if not data:
        raise BadSample(f"{name}: empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PILLOW_FORMATS[_open(data).format]
    except Exception as error:  # as in `_decode_with_pillow`
        raise BadSample(f"{name}: {error}") from None


def orientation(data: bytes) -> int:
    """The orientation that EXIF asks for, 1 to 8; 1, as stored, where it tells none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stated = _open(data).getexif().get(ORIENTATION, 1)
            return stated if stated in range(1, 9) else 1
    except Exception:  # as below; the decoder reports it
        return 1


def is_turned(data: bytes) -> bool:
    """Whether EXIF asks for another orientation than the stored one."""
    return orientation(data) != 1


def _decode_with_pillow(data: bytes, name: str, exif: bool) -> tuple[torch.Tensor, bool]:
    import numpy as np
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, whole = _loaded(data)
            has_grey = image.mode in GREY_OF and image.format != "GIF"
            if exif:
                image = ImageOps.exif_transpose(image)
            image = to_rgb(image)
            pixels = np.array(image)
    except Exception as error:  # decoders meet hostile bytes and raise anything up to struct.error
        raise BadSample(f"{name}: {error}") from None
    if not whole:
        ranges = image.getextrema()  # of each channel; NumPy's take seconds of a large image
        one_colour = all(low == high for low, high in ranges)
        if one_colour and (not has_grey or {*ranges} == {(GREY, GREY)}):
            raise BadSample(f"{name}: image file is truncated before its first row")
    return torch.from_numpy(pixels).permute(2, 0, 1), whole


def _loaded(data: bytes):
    """The image with its pixels, and whether they are all there: its file may end early."""
    from PIL import Image, ImageFile

    image = _open(data)
    try:
        image.load()
        return image, True
    except OSError as error:
        ends_early = image.format in BY_ROWS and "truncated" in str(error)
        if not ends_early and image.format not in ("JPEG", "MPO"):
            raise
    image = _open(data)
    if image.format in BY_ROWS and image.mode in GREY_OF:
        image.im = Image.new(image.mode, image.size, GREY_OF[image.mode]).im
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return image, False


def check_image_root(root: str | Path, names: Iterable[str], tries: int = 20) -> None:
    """Raises UserError when none of the first `tries` images is there below `root`; absolute paths are
    themselves."""
    root = Path(root)
    names = list(islice(names, tries))
    check_fetched(names)
    named = [existing(root / name) for name in names]
    files = [archive_of(file) or file for file in named]
    if any(is_file(file) for file in files):  # absolute paths do not need the folder
        return
    if not root.is_dir():
        raise UserError(
            f"image_root {root}: no such folder; set image_root to the folder the annotations refer to"
        )
    if files:
        raise UserError(
            f"image_root {root}: none of the first {len(names)} images is there, e.g. {root / names[0]}; "
            "set image_root so that image_root/<image> exists, or, where these are of a recipe's "
            "val_file or test_file, name your own, or none"
        )
