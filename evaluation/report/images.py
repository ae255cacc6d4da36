"""Images for result pages: data URIs, and heat maps laid over an image."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import BadSample
from base.image_names import existing
from base.pixels import pillow_formats, to_rgb
from base.reading import read_bytes
from base.zip_member import image_source

GREY = (128, 128, 128)
COLOURS = torch.tensor(  # of a heat map from 0 to 1, evenly spaced: RGB
    [[0.05, 0.05, 0.35], [0.55, 0.1, 0.5], [0.95, 0.35, 0.2], [1.0, 0.9, 0.3]]
)


class LazyImages(Sequence):
    """The images of a split, each loaded when it is shown; one that cannot be read is grey.

    load(i): uint8 [3,H,W], encoded bytes or a path, for i below `count`; raises BadSample.
    """

    def __init__(self, load: Callable[[int], Path | bytes | Tensor], count: int):
        self.load = load
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Path | bytes | Tensor:
        try:
            return self.load(number)
        except BadSample:
            return torch.full((3, 8, 8), GREY[0], dtype=torch.uint8)


def image_uri(source: Path | bytes | Tensor, side: int) -> str:
    """A data URI of a JPEG with `side` pixels per side; the aspect is not kept, as networks see it.

    source: a file, in a zip file too, its bytes, or uint8 [3,H,W]. An image that cannot be read is
    grey, as in the evaluation that comes before the page.
    """
    from PIL import Image  # here, so that --help need not wait for it

    if isinstance(source, Tensor):
        image = Image.fromarray(source.permute(1, 2, 0).contiguous().numpy())
    else:
        try:
            if not isinstance(source, bytes):
                source = image_source(Path(), str(existing(source)))
            content = source if isinstance(source, bytes) else read_bytes(source)
            image = to_rgb(Image.open(io.BytesIO(content), formats=pillow_formats()))
        except Exception:  # decoders meet hostile bytes and raise anything up to struct.error
            image = Image.new("RGB", (side, side), GREY)
    buffer = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat_map(image: Tensor, heat: Tensor, side: int = 192) -> Tensor:
    """uint8 [3,side,side]: image uint8 [3,H,W] under heat [h,w] in [0,1], warm where it is high."""
    base = resized(image / 255, side)
    level = resized(heat[None], side)[0].clamp(0, 1)
    position = level * (len(COLOURS) - 1)
    low = position.long().clamp(max=len(COLOURS) - 2)
    fraction = position - low
    colour = torch.lerp(COLOURS[low], COLOURS[low + 1], fraction[..., None])
    mixed = 0.45 * base + 0.55 * colour.permute(2, 0, 1)
    return (mixed.clamp(0, 1) * 255).byte()


def resized(image: Tensor, side: int) -> Tensor:
    """[C,H,W] of any type as float32 [C,side,side] (bilinear)."""
    size = (side, side)
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
