"""Views of COYO-ViT (and big_vision): the Inception crop of TensorFlow, resizing without
antialiasing, exact areas.

uint8 [3,H,W] in. By default grey levels come out as uint8, which `dataset.images.clip.normalize`
turns into (x - 127.5) / 127.5 on the device: a quarter of the bytes for workers and bus. exact:
unrounded float32 as the original has them. Draws come from torch's global generator, which the data
stream reseeds for every sample.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import UserError
from base.knobs import check_choices, knob
from base.limits import SIDE
from base.pixels import middle
from dataset.images.albef import Box

ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class ViTViews:
    """Views."""

    crop_area: tuple[float, float] = knob(
        (0.05, 1.0),
        "smallest and largest area of a training crop, as a fraction of the image",
        rare=True,
        low=0,
        high=1,
    )
    crop_aspect: tuple[float, float] = knob(
        (0.75, 1.33), "smallest and largest width / height of a training crop", rare=True, low=0.01
    )
    flip: bool = knob(True, "flip half of the training images horizontally")
    policy: str = knob(
        "none",
        "further changes, torchvision's",
        choices=("none", "autoaugment", "randaugment", "trivialaugment"),
        rare=True,
    )
    erase: float = knob(
        0.0,
        "probability of random erasing: noise in a rectangle of 2 to 33 % of a training view",
        low=0,
        high=1,
    )
    resize_small: int | None = knob(
        None,
        "evaluation: shorter side before the centre crop; none = squeeze to a square",
        low=1,
        high=SIDE,
    )

    def __post_init__(self):
        check_choices(self)
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_area" and high > 1):
                raise UserError(
                    f"{name} {low} {high}: give two positive numbers, the smaller first, areas at most 1"
                )


class ViTTrainView:
    """Inception crop to side x side, flips, what the policy adds, and random erasing."""

    def __init__(self, side: int, options: ViTViews, exact: bool = False):
        self.side = side
        self.options = options
        self.exact = exact

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = image.shape[1:]
        top, left, height, width = inception_box(
            rows, columns, self.options.crop_area, self.options.crop_aspect
        )
        view = resize_bilinear(
            image[:, top : top + height, left : left + width], self.side, self.side
        )
        if self.options.flip and torch.rand(()) < 0.5:
            view = view.flip(-1)
        if self.options.policy != "none":
            view = policy(self.options.policy)(rounded(view))
        elif not self.exact:
            view = rounded(view)
        if self.options.erase and torch.rand(()) < self.options.erase:
            view = erased(view)
        return view


class ViTEvalView:
    """The whole image squeezed to side x side, or its centre where the shorter side is first made
    `resize_small`."""

    def __init__(self, side: int, resize_small: int | None = None, exact: bool = False):
        if resize_small and resize_small < side:
            raise UserError(
                f"resize_small {resize_small}: smaller than the crop of {side} pixels; give at least {side}"
            )
        self.side = side
        self.resize_small = resize_small
        self.exact = exact

    def __call__(self, image: Tensor) -> Tensor:
        if self.resize_small:
            view = resize_area(middle(image), self.resize_small, self.side)
        else:
            view = resize_bilinear(image, self.side, self.side)
        return view if self.exact else rounded(view)


def rounded(view: Tensor) -> Tensor:
    """float32 grey levels to uint8."""
    return view.round().clamp_(0, 255).to(torch.uint8)


def inception_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """(top, left, height, width) of TensorFlow's random crop: aspect uniform, then the height
    uniform among those that fit the area. Small crops are likelier than with torchvision's, whose
    area is uniform. The whole image after 100 draws in vain.
    """
    least, most = (fraction * height * width for fraction in area)
    for _ in range(ATTEMPTS):
        ratio = float(torch.empty(()).uniform_(*aspect))
        tallest = round(math.sqrt(most / ratio))
        if round(tallest * ratio) > width:
            tallest = int((width + 0.5 - 1e-7) / ratio)
            tallest -= round(tallest * ratio) > width
        tallest = min(tallest, height)
        h = min(round(math.sqrt(least / ratio)), tallest)
        h += int(torch.randint(tallest - h + 1, ()))
        if h * round(h * ratio) < least:  # lost by rounding
            h += 1
        elif h * round(h * ratio) > most:
            h -= 1
        w = round(h * ratio)
        if least <= h * w <= most and 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(max(1, height - h), ()))
            left = int(torch.randint(max(1, width - w), ()))
            return top, left, h, w
    return 0, 0, height, width


def resize_bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """float32 [3,height,width] of uint8 [3,H,W] between the four nearest pixels; not antialiased,
    as the original."""
    pixels = image.float()[None]
    return F.interpolate(
        pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]


def resize_area(image: Tensor, small: int, cut: int | None = None) -> Tensor:
    """float32 [3,h,w] with the shorter side `small`: each pixel is the mean over exactly the area
    it covers. cut: side of the square in its centre that alone is made."""
    height, width = image.shape[1:]
    ratio = torch.tensor(
        small / min(height, width)
    )  # float32, and halves to the even number, as TensorFlow
    h, w = (int((side * ratio).round()) for side in (height, width))
    rows = area_weights(height, h, cut or h)
    columns = area_weights(width, w, cut or w)
    return rows @ image.float() @ columns.T


@lru_cache(maxsize=64)
def area_weights(old: int, new: int, count: int) -> Tensor:
    """Shares of `old` pixels in the `count` middle ones of `new` along an axis, float32
    [count,old]; rows sum to 1."""
    first = (new - count) // 2
    edges = torch.arange(first, first + count + 1, dtype=torch.float64) * (old / new)
    pixel = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (overlap.clamp(min=0) * (new / old)).float()


def erased(view: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2020): a rectangle of 2 to 33 % of the area and an aspect of 0.3
    to 3.3 holds uniform noise. The view itself where ten draws do not fit."""
    from torchvision.transforms import RandomErasing

    # its own noise is normal, for floats
    place = RandomErasing.get_params(view, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=[0])
    top, left, height, width, _ = place
    if height == view.shape[1]:
        return view
    view = view.clone()
    noise = torch.randint(256, (3, height, width))
    view[:, top : top + height, left : left + width] = noise
    return view


@lru_cache(maxsize=4)
def policy(name: str):
    """torchvision's policy of that name, on uint8 [3,H,W]; grey where images are moved."""
    from torchvision.transforms import v2

    kinds = {
        "autoaugment": v2.AutoAugment,
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
    }
    return kinds[name](fill=128)
