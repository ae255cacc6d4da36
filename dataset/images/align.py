"""Views of an image as COYO-ALIGN makes them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from base.pixels import ALIGN_MARGIN


class AlignView:
    """Squash to a square 346 / 289 times as large, without antialiasing and whatever the aspect
    ratio; cut a square.

    train: cut anywhere and flip with probability `flip`; otherwise cut the middle. exact: float32
    with the original's unrounded values 0..255; otherwise uint8 within one grey level of them, in a
    quarter of the time.
    """

    def __init__(self, side: int, train: bool = False, flip: float = 0.5, exact: bool = False):
        self.side = side
        self.train = train
        self.flip = flip
        self.exact = exact
        self.large = round(side * ALIGN_MARGIN)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3,H,W] -> [3,side,side]."""
        room = self.large - self.side
        top = left = room // 2
        if self.train:
            top, left = torch.randint(room + 1, (2,)).tolist()
        source = image.float() if self.exact else image
        size = (self.large, self.large)
        squashed = F.interpolate(source[None], size, mode="bilinear", align_corners=False)[0]
        cut = squashed[:, top : top + self.side, left : left + self.side]
        if self.train and torch.rand(()) < self.flip:
            cut = cut.flip(-1)
        return cut


class AlignViews(AlignView):
    """The same for training data, whose samples may have local views too; ALIGN's have none."""

    def __call__(self, image: Tensor) -> tuple[Tensor, None]:
        return super().__call__(image), None
