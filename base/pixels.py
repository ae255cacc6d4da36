"""Pixel statistics of the published encoders, and how an image enters a network."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from base.caches import digest

DECODING = 2  # raised when dataset/images/decode.py reads a file otherwise, or one more
RGB = tuple[float, float, float]

# mean and std by channel of pixels in [0, 1]
IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[RGB, RGB] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels in [-1, 1]
OPENAI: tuple[RGB, RGB] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
STATISTICS = {
    "half": HALF,
    "imagenet": IMAGENET,
    "clip": OPENAI,
}  # by the name a configuration uses
# What Pillow may open, whatever a file is called, and the ending that goes with it. Others (EPS, PDF,
# WMF ...) start foreign programs.
PILLOW_FORMATS = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"},
    **{"JPEG2000": "jp2", "GIF": "gif", "BMP": "bmp", "DIB": "bmp", "TIFF": "tif", "PPM": "ppm"},
}
GREYS = 255  # the largest value of a pixel
ALIGN_MARGIN = 346 / 289  # side of ALIGN's squashed image over that of the cut
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers in preprocessor_config.json
LONGEST = 32  # times the shorter side: of a longer image the centre alone is resized


def pixels_digest(*parts: object) -> str:
    """`base.caches.digest` of what is made of images: it changes with how files are read, too."""
    return digest(DECODING, *parts)


class Pixels(NamedTuple):
    """Network input: side in pixels, interpolation of the resize, mean and std of pixels in [0,
    1]."""

    size: int
    interpolation: str
    mean: RGB
    std: RGB


def middle(image):
    """[3,H,W] whose longer side is at most LONGEST times the shorter one: of a thinner image the
    middle. A centre crop shows nothing else, and 1 x 30,000 pixels made 224 high take gigabytes."""
    height, width = image.shape[1:]
    longest = LONGEST * min(height, width)
    top = max(0, height - longest) // 2
    left = max(0, width - longest) // 2
    return image[:, top : height - top, left : width - left]


@cache
def pillow_formats() -> tuple[str, ...]:
    """The allowed formats that this Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


def to_rgb(image):
    """The first frame of Pillow's image in mode RGB; 16-bit grey is scaled. ValueError for pixels
    without a known range."""
    import numpy as np
    from PIL import Image

    sixteen_bits = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen_bits = True  # older Pillow widens their 16 bits
    if sixteen_bits:  # convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no known range; save the image with 8 or 16 bits")
    return image.convert("RGB")


def timm_statistics(tower: str) -> tuple[RGB, RGB]:
    """Mean and std of pixels in [0, 1] that `timm/NAME` was trained with."""
    import timm

    name = tower.removeprefix("timm/").partition(":")[0]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (known.mean, known.std) if known else IMAGENET


def processor_statistics(images: Mapping[str, Any]) -> tuple[RGB, RGB] | None:
    """Mean and std of pixels in [0,1] by transformers' preprocessor_config.json; None where it does
    not tell them.

    x = 255 p f - o, f rescale_factor and o rescale_offset, then (x - m) / s.
    """
    mean, std = images.get("image_mean"), images.get("image_std")
    if images and images.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if not mean or not std:
        return None
    factor = 1.0
    if images.get("do_rescale") is False:
        factor = GREYS
    elif images.get("rescale_factor"):
        factor = round(GREYS * float(images["rescale_factor"]), 9)
    offset = 1.0 if images.get("rescale_offset") else 0.0
    mean = tuple((value + offset) / factor for value in mean)
    return mean, tuple(value / factor for value in std)


def crop_side(images: Mapping[str, Any], default: int) -> int:
    """Side of the square that the image processor cuts."""
    crop = images.get("crop_size", default)
    return int(crop.get("height", default)) if isinstance(crop, Mapping) else int(crop)
