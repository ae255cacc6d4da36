"""RandAugment (Cubuk et al., 2020) with the ten operations, levels and sampling of ALBEF, on uint8
tensors [3,H,W]."""

import math

import numpy as np
import torch

GREY = 128  # fills what a geometric operation uncovers


class RandAugment:
    """Draws `count` of ten operations with replacement and applies each with probability one half.

    level: strength from 0 to 10. compat="original" reproduces three slips of the published code:
    AutoContrast turns a channel whose minimum is above 0 white, Sharpness wraps around instead of
    clipping, and a shift is 7 pixels at any resolution, where by default it is 7 pixels of a
    256-pixel image.
    Draws come from `numpy.random` in the published order.
    """

    NAMES = (
        "Identity",
        "AutoContrast",
        "Equalize",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    )

    def __init__(self, count: int = 2, level: float = 7, compat: str = "none"):
        self.count = count
        self.original = compat == "original"
        fraction = level / 10
        self.strength = {
            "Brightness": 1.8 * fraction + 0.1,
            "Sharpness": 1.8 * fraction + 0.1,
            "ShearX": 0.3 * fraction,
            "ShearY": 0.3 * fraction,
            "TranslateX": 10 * fraction,
            "TranslateY": 10 * fraction,
            "Rotate": 30 * fraction,
        }

    def draw(self, rng=np.random) -> list[tuple[str, float]]:
        """Names and signed strengths of the operations to apply to one image."""
        operations = []
        for number in rng.choice(len(self.NAMES), self.count):
            name = self.NAMES[number]
            if rng.random() > 0.5:
                continue
            strength = self.strength.get(name, 0.0)
            if name in GEOMETRIC:
                sign = rng.random()
                negative = sign < 0.5 if name == "Rotate" else sign > 0.5
                if negative:
                    strength = -strength
            operations.append((name, strength))
        return operations

    def apply(self, image: torch.Tensor, operations: list[tuple[str, float]]) -> torch.Tensor:
        """uint8 [3,H,W] to uint8 [3,H,W]."""
        for name, strength in operations:
            if name in GEOMETRIC:
                height, width = image.shape[-2:]
                matrix = forward_matrix(name, strength, height, width, fixed_shift=self.original)
                image = warp(image, matrix)
            elif name == "AutoContrast":
                image = autocontrast(image, wrap=self.original)
            elif name == "Equalize":
                image = equalize(image)
            elif name == "Brightness":
                image = brightness(image, strength)
            elif name == "Sharpness":
                image = sharpness(image, strength, wrap=self.original)
        return image


GEOMETRIC = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})


def brightness(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Scales the values, truncating."""
    return (image.float() * factor).clamp_(0, 255).to(torch.uint8)


def sharpness(image: torch.Tensor, factor: float, wrap: bool = False) -> torch.Tensor:
    """Moves away from a smoothed image (kernel 1 1 1, 1 5 1, 1 1 1 over 13); the outermost pixels
    stay."""
    pixels = image.float()
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = ((around + 4 * pixels[:, 1:-1, 1:-1]) / 13).round_()
    pixels[:, 1:-1, 1:-1] = smooth + factor * (pixels[:, 1:-1, 1:-1] - smooth)
    pixels = pixels.int() & 255 if wrap else pixels.clamp_(0, 255)
    return pixels.to(torch.uint8)


def autocontrast(image: torch.Tensor, wrap: bool = False) -> torch.Tensor:
    """Stretches every channel to 0...255, as Pillow does. wrap: the original slip with unsigned
    bytes."""
    channels = image.flatten(1)
    low = channels.amin(1, keepdim=True).double()
    high = channels.amax(1, keepdim=True).double()
    scale = 255 / (high - low)
    offset = ((256 - low) % 256 if wrap else -low) * scale
    values = torch.arange(256)
    stretched = (values.double() * scale + offset).clamp_(0, 255).to(torch.uint8)
    return _look_up(image, torch.where(high > low, stretched, values.to(torch.uint8)))


def equalize(image: torch.Tensor) -> torch.Tensor:
    """Flattens the histogram of every channel, as Pillow does."""
    tables = []
    for channel in image:
        histogram = torch.bincount(channel.flatten().int(), minlength=256)
        step = int(histogram.sum() - histogram[histogram.nonzero()[-1]]) // 255
        if step:
            before = torch.cat([torch.tensor([step // 2]), histogram[:-1]])
            tables.append((before.cumsum(0) // step).clamp_(0, 255).to(torch.uint8))
        else:
            tables.append(torch.arange(256, dtype=torch.uint8))
    return _look_up(image, torch.stack(tables))


def _look_up(image: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replaces the values of channel c by tables [3,256][c]."""
    return tables.gather(1, image.flatten(1).long()).view_as(image)


def forward_matrix(
    name: str, strength: float, height: int, width: int, fixed_shift: bool = False
) -> list[float]:
    """The affine map (two rows of three) from old to new positions of pixels; positive shifts go
    left and up."""
    if name == "ShearX":
        return [1, strength, 0, 0, 1, 0]
    if name == "ShearY":
        return [1, 0, 0, strength, 1, 0]
    if name == "TranslateX":
        shift = strength * (1 if fixed_shift else width / 256)
        return [1, 0, -shift, 0, 1, 0]
    if name == "TranslateY":
        shift = strength * (1 if fixed_shift else height / 256)
        return [1, 0, 0, 0, 1, -shift]
    cos = math.cos(math.radians(strength))
    sin = math.sin(math.radians(strength))
    x = width / 2  # the centre stays
    y = height / 2
    shift_x = (1 - cos) * x - sin * y
    shift_y = sin * x + (1 - cos) * y
    return [cos, sin, shift_x, -sin, cos, shift_y]


def warp(image: torch.Tensor, matrix: list[float]) -> torch.Tensor:
    """Bilinear affine warp of uint8 [3,H,W] with grey fill, in the fixed-point arithmetic of
    OpenCV's warpAffine.

    Source positions are rounded to 1/32 of a pixel, so that results are integers and equal on every
    machine.
    """
    a, b, c, d, e, f = inverse(matrix)
    height, width = image.shape[-2:]
    x = torch.arange(width, dtype=torch.float64)
    y = torch.arange(height, dtype=torch.float64)[:, None]
    source_x, part_x = _fixed_point(b * y + c, a * x)
    source_y, part_y = _fixed_point(e * y + f, d * x)
    # Three channels of 21 bits in one integer: one gather and one multiplication serve all of them.
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=GREY).long()
    packed = (padded[0] | padded[1] << 21 | padded[2] << 42).flatten()
    left = source_x.clamp(-1, width) + 1
    right = (source_x + 1).clamp_(-1, width) + 1
    above = (source_y.clamp(-1, height) + 1) * (width + 2)
    below = ((source_y + 1).clamp_(-1, height) + 1) * (width + 2)

    def values(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return packed.index_select(0, (rows + columns).flatten()).view(height, width)

    rest_x = 32 - part_x
    rest_y = 32 - part_y
    top = values(above, left) * rest_x + values(above, right) * part_x
    bottom = values(below, left) * rest_x + values(below, right) * part_x
    blend = top * rest_y + bottom * part_y
    blend = blend + (512 << 42 | 512 << 21 | 512)  # rounds all three to nearest
    channels = [blend >> bits & 0xFF for bits in (10, 31, 52)]
    return torch.stack(channels).to(torch.uint8)


def inverse(matrix: list[float]) -> list[float]:
    """Of the affine map (x, y) -> (a x + b y + c, d x + e y + f), whose matrix is [a,b,c,d,e,f]."""
    a, b, c, d, e, f = matrix
    determinant = a * e - b * d
    x_of_x = e / determinant
    x_of_y = -b / determinant
    y_of_x = -d / determinant
    y_of_y = a / determinant
    shift_x = -x_of_x * c - x_of_y * f
    shift_y = -y_of_x * c - y_of_y * f
    return [x_of_x, x_of_y, shift_x, y_of_x, y_of_y, shift_y]


def _fixed_point(row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole pixels and 32nds of the source positions row [H,1] + column [W], rounded the way OpenCV
    rounds."""
    rows = (row * 1024).round().int()
    columns = (column * 1024).round().int()
    position = (rows + 16 + columns) >> 5
    return position >> 5, position & 31
