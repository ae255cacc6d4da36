"""Reading one image: any format in, uint8 RGB out; everything unreadable is a BadSample that says
why."""

import io
import struct
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch

from base.errors import BadSample, UserError

PIXEL_LIMIT = 89_478_485  # Pillow's own limit against decompression bombs: 0.25 GB of RGB


def decode_image(source: str | Path | bytes, name: str = "") -> torch.Tensor:
    """uint8 [3,H,W] RGB (channels last in memory) of an image file or of its bytes.

    Grey and RGB JPEG take libjpeg's fast path; everything else (CMYK, palette, 16 bit, PNG, WebP
    ...) goes through Pillow. As in the original pipelines the first frame of an animation is taken,
    transparency is dropped without blending and EXIF orientation is ignored. 16-bit grey is scaled
    to 8 bits.
    name: how to call the image in errors. Raises BadSample: missing, empty, truncated, corrupt or
    too many pixels.
    """
    if not isinstance(source, bytes):
        name = name or str(source)
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise BadSample(f"{name}: {error.strerror or error}") from None
    if not source:
        raise BadSample(f"{name}: empty file")
    size = plain_jpeg_size(source)
    if size and size[0] * size[1] > PIXEL_LIMIT:
        raise BadSample(f"{name}: {size[1]} x {size[0]} pixels exceed the limit of {PIXEL_LIMIT}")
    if size and (decode := _fast_decoder()):
        try:
            return decode(torch.frombuffer(bytearray(source), dtype=torch.uint8))
        except RuntimeError:
            pass  # a rare variant or damage: Pillow decides
    return _decode_with_pillow(source, name)


@cache
def _fast_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchvision's JPEG decoder while it has one (deprecated in 0.29): Pillow's pixels at 1.4
    times its speed."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


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
            return (
                (height, width) if bits == 8 and components in (1, 3) and height and width else None
            )
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_with_pillow(data: bytes, name: str) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))  # itself refuses twice the limit
            width, height = image.size
            if width * height > PIXEL_LIMIT:
                raise ValueError(f"{width} x {height} pixels exceed the limit of {PIXEL_LIMIT}")
            if image.mode.startswith("I"):  # convert() would clip 16 bits at 255 instead of scaling
                grey = (np.asarray(image) // 257).clip(0, 255).astype(np.uint8)
                pixels = np.repeat(grey[:, :, None], 3, axis=2)
            else:
                pixels = np.array(image.convert("RGB"))
    except (
        Exception
    ) as error:  # decoders meet hostile bytes here and raise anything from OSError to struct.error
        raise BadSample(f"{name}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_image_root(root: str | Path, names: Iterable[str], tries: int = 20) -> None:
    """Raises UserError when `root` is not a folder or holds none of the first `tries` images."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"image_root {root}: no such folder; set image_root to the folder the annotations refer to"
        )
    names = list(islice(names, tries))
    if names and not any((root / name).is_file() for name in names):
        raise UserError(
            f"image_root {root}: none of the first {len(names)} images is there, e.g. {root / names[0]}; "
            "set image_root so that image_root/<image> exists"
        )
