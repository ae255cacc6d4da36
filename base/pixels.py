"""Pixel statistics of the published encoders, and how an image enters a network."""

from functools import cache
from typing import NamedTuple

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
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers in preprocessor_config.json


class Pixels(NamedTuple):
    """Network input: side in pixels, interpolation of the resize, mean and std of pixels in [0,
    1]."""

    size: int
    interpolation: str
    mean: RGB
    std: RGB


@cache
def pillow_formats() -> tuple[str, ...]:
    """The allowed formats that this Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


def timm_statistics(tower: str) -> tuple[RGB, RGB]:
    """Mean and std of pixels in [0, 1] that `timm/NAME` was trained with."""
    import timm

    name = tower.removeprefix("timm/").partition(":")[0]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (known.mean, known.std) if known else IMAGENET
