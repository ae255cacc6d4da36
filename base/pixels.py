"""Pixel statistics of the published encoders, and how an image enters a network."""

from typing import NamedTuple

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Pixels(NamedTuple):
    """How images come in: side in pixels, interpolation of the resize, mean and deviation of pixels
    in [0, 1]."""

    size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
