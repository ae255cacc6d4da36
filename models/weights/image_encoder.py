"""An image encoder for evaluation: a network, and which of its outputs are the features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.pixels import Pixels

TOWER = "feats"  # the output of the image tower, before projections


class ImageEncoder(nn.Module):
    """A network and which of its outputs counts.

    kind: classifier, dual, fusion (SIMLA, ALBEF), vit (foreign), timm or library: with the title,
    how its images are resized. pixels: their side, interpolation, mean and std. view: of a library,
    uint8 [3,H,W] -> float32, normalised by the library itself; None = ours. resize: the shorter
    side before the centre crop; None = the whole image. config: all that the features depend on
    beside the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        outputs: Callable[[Tensor], dict],
        kind: str,
        pixels: Pixels,
        title: str,
        resize: int | None = None,
        view: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.network = network
        self.outputs = outputs
        self.kind = kind
        self.pixels = pixels
        self.title = title
        self.resize = resize
        self.view = view
        self.features = TOWER
        self.width = 0  # of the features, once they are chosen

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[self.features].flatten(1)

    @property
    def config(self) -> tuple:
        return (self.kind, self.pixels, self.title, self.features, self.resize, repr(self.view))

    @torch.no_grad()
    def choose(self, features: str) -> int:
        """Let `features` be the output that counts; its width. Raises UserError that lists what
        there is."""
        side = self.pixels.size
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        batch = (self.view(image) if self.view else image.float())[None]
        found = self.eval().outputs(batch)
        if features not in found:
            raise UserError(f"features {features!r}: {self.title} has {', '.join(found)}")
        self.features = features
        self.width = found[features].flatten(1).shape[1]
        return self.width
