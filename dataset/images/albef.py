"""Image transforms of ALBEF and SIMLA: uint8 [3,H,W] in, uint8 out; the network normalises them on
the device.

Random draws use the global generators of torch and NumPy, which the data stream reseeds for
every sample.
"""

import torch

from base.errors import UserError
from dataset.images.randaugment import GEOMETRIC, RandAugment

Box = tuple[int, int, int, int]  # top, left, height, width


def resize(
    image: torch.Tensor, height: int, width: int, interpolation: str = "bicubic"
) -> torch.Tensor:
    """uint8 [3,H,W] at another size, antialiased, within a grey level of Pillow's; the aspect is
    not kept."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize as resize_image

    mode = InterpolationMode(interpolation)
    return resize_image(image, [height, width], interpolation=mode, antialias=True)


def check_areas(names: str, least: float, most: float) -> None:
    """UserError where the smallest area of a random crop is above the largest one."""
    if least > most:
        raise UserError(
            f"{names} {least} {most}: no crop is that small; give the smaller area first"
        )


def random_box(image: torch.Tensor, scale: tuple[float, float]) -> Box:
    """The Inception crop: area fraction uniform in `scale`, aspect log-uniform in [3/4, 4/3], place
    uniform."""
    from torchvision.transforms.v2 import RandomResizedCrop

    return RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])


def resized_crop(
    image: torch.Tensor,
    box: Box | None,
    side: int,
    flip: bool = False,
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """The box of the image (None: all of it) as uint8 [3,side,side], flipped horizontally if asked."""
    if box is not None:
        top, left, height, width = box
        image = image[:, top : top + height, left : left + width]
    image = resize(image, side, side, interpolation)
    return image.flip(-1) if flip else image


class TestTransform:
    """Resize to a square: uint8 [3,H,W] to uint8 [3,resolution,resolution]."""

    __test__ = False  # not a test case for pytest

    def __init__(self, resolution: int):
        self.resolution = resolution

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return resize(image, self.resolution, self.resolution)


class TrainTransform:
    """Random crop, flips and RandAugment: uint8 [3,H,W] to uint8 [3,resolution,resolution].

    scale: range of the crop's fraction of the area; (0.5, 1) for retrieval, VQA, VE and NLVR2,
    (0.2, 1) for pre-training, None for no crop at all (grounding); UserError where the larger comes
    first. flip: flip half of the images horizontally; switch it off where texts say "left".
    """

    def __init__(
        self,
        resolution: int,
        scale: tuple[float, float] | None = (0.5, 1.0),
        flip: bool = True,
        augment: RandAugment | None = None,
    ):
        if scale:
            check_areas("crop_scale", *scale)
        self.resolution = resolution
        self.scale = scale
        self.flip = flip
        self.augment = augment or RandAugment()

    def draw(self, image: torch.Tensor) -> tuple[Box | None, bool, list]:
        """The random choices for one image: crop box, flipped or not, augmentation operations."""
        box = random_box(image, self.scale) if self.scale else None
        flip = self.flip and bool(torch.rand(()) < 0.5)
        return box, flip, self.augment.draw()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        box, flip, operations = self.draw(image)
        return self.augment.apply(resized_crop(image, box, self.resolution, flip), operations)


class PretrainTransform(TrainTransform):
    """Pre-training view and, for SIMLA, the view that the frozen image tokenizer turns into labels.

    Returns `(image, token_image)`: uint8 [3,resolution,resolution] and uint8 [3,token,token] (None
    without `token_resolution`). By default both show the same crop with the same flips, shear,
    shift and rotation, and only `image` has colour operations, so that label i describes patch i
    as in BEiT.
    shared_view=False: they are drawn independently of each other, as SIMLA's published code does.
    fixed_geometry: always the whole image and colour operations alone, so that visual codes can be
    computed ahead.
    """

    def __init__(
        self,
        resolution: int,
        token_resolution: int | None = None,
        shared_view: bool = True,
        fixed_geometry: bool = False,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        augment: RandAugment | None = None,
    ):
        super().__init__(
            resolution, None if fixed_geometry else scale, flip and not fixed_geometry, augment
        )
        self.token_resolution = token_resolution
        self.shared_view = shared_view
        self.fixed_geometry = fixed_geometry

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        box, flip, operations = self.draw(image)
        moves = [operation for operation in operations if operation[0] in GEOMETRIC]
        if self.fixed_geometry:
            operations = [operation for operation in operations if operation not in moves]
            moves = []
        view = self.augment.apply(resized_crop(image, box, self.resolution, flip), operations)
        if self.token_resolution is None:
            return view, None
        if not self.shared_view:
            box, flip, moves = self.draw(image)
        token_view = resized_crop(image, box, self.token_resolution, flip)
        return view, self.augment.apply(token_view, moves)
