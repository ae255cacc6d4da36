"""Position embeddings of vision transformers for images of another size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import UnfitWeights


def resize_positions(positions: Tensor, grid: int, align_corners: bool = False) -> Tensor:
    """Position embeddings [1,1+g*g,D] for grid x grid patches: [1,1+grid*grid,D], same dtype.

    The class token's row stays; equal grids: no-op. By default bicubic without antialiasing, as
    DeiT, ALBEF and CLIP do. align_corners: bilinear between the corner patches, which is scipy's
    `zoom` of order 1, with which COYO-ViT goes from 224 to 384 px.

    Raises UnfitWeights where the patches are no square.
    """
    patches = positions.shape[1] - 1
    old = round(max(patches, 0) ** 0.5)
    if patches < 1 or old * old != patches:
        raise UnfitWeights(
            f"position embeddings of {positions.shape[1]} tokens are no class token and a square "
            "of patches; only those can be resized to another image size"
        )
    if old == grid:
        return positions
    mode = "bilinear" if align_corners else "bicubic"
    image = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode=mode, align_corners=align_corners)
    resized = image.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], resized], dim=1)
