"""Vision transformer of SIMLA and ALBEF: pre-norm ViT with [CLS] token, patch masking, attention
maps on demand.

Parameter names are those of timm's ViT (`blocks.{i}.attn.qkv` ...), so DeiT weights and the
original checkpoints load as they are, given `positions.resize_positions` for another resolution. With a
`stem` it is the hybrid of convolutions and transformer of Dosovitskiy et al. 2021 (section 3.1),
which learns from far less data than patches of pixels do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from base.pixels import RGB
from models.layers.attention import attend, attention_map, merge_heads, split_heads
from models.layers.initialisation import linear_std
from models.layers.library_towers import LockedMaps


@dataclass
class ViTConfig:
    """Geometry; the defaults are ViT-B/16 at 256 px."""

    image_size: int = 256  # pixels per side
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    mask_token: bool = False  # learned stand-in for masked patches (masked image modelling)
    gelu: str = "none"  # approximation of GELU in the MLPs: none (erf) or tanh
    # probability behind the positions, each attention and both layers of each MLP
    dropout: float = 0.0
    attention_dropout: float = 0.0  # probability per attention weight
    # stochastic depth of the last block's two branches; rises linearly from 0 at the first block
    drop_path: float = 0.0
    # channels of convolutional stages before the patches, each halving the image's sides
    stem: tuple[int, ...] = ()
    # batch norms of the stem learn their statistics in training, or keep those loaded
    stem_statistics: bool = False
    tower: str | None = None  # timm/NAME[:FILE] in the stem's place, locked

    # mean and std of pixels in [0,1], by which the network normalises uint8 images; None: images
    # come normalised
    pixels: tuple[RGB, RGB] | None = None

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


class Stage(nn.Module):
    """[B,C,H,W] -> [B,C',H/2,W/2]: a residual block of two convolutions, its shortcut averaged
    (ResNet-D)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class Backbone(nn.Module):
    """[B,3,S,S] -> [B,stem[-1],S/2^n,S/2^n] by the n stages of a stem, the first a single
    convolution."""

    def __init__(self, stem: tuple[int, ...], statistics: bool):
        super().__init__()
        self.statistics = statistics
        self.conv1 = nn.Conv2d(3, stem[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem[0])
        self.stages = nn.Sequential(*map(Stage, stem, stem[1:]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> "Backbone":
        """Statistics that are not learnt are used in training as in evaluation, the same on any
        number of processes."""
        return super().train(mode and self.statistics)

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return self.stages(F.relu(self.bn1(self.conv1(image))))


class Normalize(nn.Module):
    """uint8 [B,3,H,W] -> float32, scaled to [0,1], then to mean 0 and std 1 per channel; images that
    are float pass through. On the device, so that a byte a pixel crosses the bus."""

    def __init__(self, mean: RGB, std: RGB):
        super().__init__()
        means = torch.tensor(mean).view(3, 1, 1)
        stds = torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * stds), persistent=False)
        self.register_buffer("offset", means / stds, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return image * self.scale - self.offset if image.dtype == torch.uint8 else image


class PatchEmbed(nn.Module):
    """[B,3,S,S] pixels -> [B,N,D]: the stem or the tower, if any, and one strided convolution;
    patches in row-major order."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_size = config.image_size
        self.backbone = None
        channels, reduction = 3, 1
        if config.tower:
            self.backbone = LockedMaps(config.tower)
            channels = self.backbone.num_features
            reduction = self.backbone.reduction
        elif config.stem:
            self.backbone = Backbone(config.stem, config.stem_statistics)
            channels = config.stem[-1]
            reduction = 2 ** len(config.stem)
        if config.patch_size % reduction:
            raise UserError(
                f"{config.tower} makes one position of {reduction} x {reduction} pixels, and "
                f"patch_size {config.patch_size} is no multiple of {reduction}: set it to one"
            )
        side = config.patch_size // reduction
        self.proj = nn.Conv2d(channels, config.width, kernel_size=side, stride=side)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"image of {image.shape[-2]} x {image.shape[-1]} pixels, but the vision transformer "
                f"was built for {self.image_size} x {self.image_size}: set image_res "
                "(image_size) to the size of the images"
            )
        maps = image if self.backbone is None else self.backbone(image)
        return self.proj(maps).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, with_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B,T,D] -> ([B,T,D], probabilities [B,H,T,T] or None)."""
        packed = self.qkv(x)
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        if with_map:
            probabilities = attention_map(query, key)
            found = probabilities.to(value.dtype) @ value
            return self.proj(merge_heads(found)), probabilities
        found = attend(query, key, value, dropout=self.dropout * self.training)
        return self.proj(merge_heads(found)), None

    def first(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,1,D]: what the first token takes from all of them."""
        width = x.shape[-1]
        weight = self.qkv.weight
        bias = self.qkv.bias
        query = split_heads(F.linear(x[:, :1], weight[:width], bias[:width]), self.heads)
        packed = F.linear(x, weight[width:], bias[width:])
        key, value = (split_heads(part, self.heads) for part in packed.chunk(2, dim=-1))
        found = attend(query, key, value, dropout=self.dropout * self.training)
        return self.proj(merge_heads(found))


class Mlp(nn.Module):
    """Two linear layers with GELU between: the exact (erf) one, or with `gelu="tanh"` its
    approximation."""

    def __init__(self, width: int, hidden: int, gelu: str = "none", dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gelu = gelu
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x), approximate=self.gelu), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


def drop_path(branch: Tensor, kept: Tensor) -> Tensor:
    """Stochastic depth (Huang et al. 2016): a residual branch [B,T,D] without the samples that are
    dropped, the others divided by the probability `kept`, 0-d, above 0, with which they stay.

    It is a tensor since torch.compile would compile every block again for its own number.
    """
    stays = torch.rand(len(branch), 1, 1, device=branch.device) < kept
    return branch * (stays / kept).to(branch.dtype)


class Block(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: ViTConfig, mlp_class: type[Mlp] = Mlp, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config.width, config.heads, config.attention_dropout)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = mlp_class(config.width, hidden, config.gelu, config.dropout)
        self.dropout = config.dropout
        if drop_path:
            self.register_buffer("kept", torch.tensor(1 - drop_path), persistent=False)

    def branch(self, update: Tensor) -> Tensor:
        """What is added to the residual stream, [B,T,D]: all, or in training with stochastic depth."""
        drops = self.training and hasattr(self, "kept")
        return drop_path(update, self.kept) if drops else update

    def forward(
        self, x: Tensor, with_map: bool = False, first: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B,T,D] -> [B,T,D], and probabilities [B,H,T,T] if asked. first: the first token alone,
        [B,1,D]; where only that one is read, the last block need not compute the others.
        """
        if first:
            update = self.attn.first(self.norm1(x))
            probabilities = None
            x = x[:, :1]
        else:
            update, probabilities = self.attn(self.norm1(x), with_map)
        x = x + self.branch(F.dropout(update, self.dropout, self.training))
        x = x + self.branch(self.mlp(self.norm2(x)))
        return (x, probabilities) if with_map else x


class ViT(nn.Module):
    """Vision transformer; returns the normalised tokens, [CLS] first."""

    mlp_class = Mlp  # of the blocks

    def __init__(self, config: ViTConfig):
        super().__init__()
        check_geometry(config)
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.normalize = Normalize(*config.pixels) if config.pixels else nn.Identity()
        self.patch_embed = PatchEmbed(config)
        rates = [config.drop_path * n / max(1, config.depth - 1) for n in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, self.mlp_class, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal: `linear_std` for linear layers, 0.02 for [CLS] and positions; torch's
        default for the patch convolution."""
        for tensor in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)
        std = linear_std(self.config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def patches(self, image: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,N,D]: the work of the stem or the tower, the same for any mask, which
        masked image modelling therefore does once."""
        return self.patch_embed(self.normalize(image))

    def embed(self, image: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """[B,3,S,S], or its patches [B,N,D], -> [B,N+1,D]; masked patches are replaced before [CLS]
        and positions are added."""
        patches = image if image.ndim == 3 else self.patches(image)
        if patch_mask is not None:
            mask_token = self.mask_token.to(patches.dtype)
            patches = torch.where(patch_mask.unsqueeze(-1), mask_token, patches)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        tokens = torch.cat([cls_token, patches], dim=1)
        return F.dropout(tokens + self.pos_embed, self.config.dropout, self.training)

    def forward(
        self, image: Tensor, patch_mask: Tensor | None = None, map_block: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B,N+1,D] of images [B,3,S,S]: float, or uint8 if the configuration has `pixels`;
        or of their patches [B,N,D], so that passes with and without a mask share them.

        patch_mask: bool [B,N], True = replaced by the mask token.
        map_block: also return the self-attention probabilities [B,H,N+1,N+1] of that block, kept in
        the graph so that `torch.autograd.grad` reaches them (Grad-CAM).
        """
        x = self.embed(image, patch_mask)
        probabilities = None
        for i, block in enumerate(self.blocks):
            if i == map_block:
                x, probabilities = block(x, with_map=True)
            else:
                x = block(x)
        x = self.norm(x)
        return x if map_block is None else (x, probabilities)

    def features(self, image: Tensor) -> Tensor:
        """Normalised class token [B,D] of images [B,3,S,S]; the last block computes it alone."""
        x = self.embed(image)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(last(x, first=True)[:, 0])


def check_geometry(config: ViTConfig) -> None:
    """Raise UserError where the sizes do not divide."""
    if config.image_size % config.patch_size:
        near = max(1, round(config.image_size / config.patch_size)) * config.patch_size
        raise UserError(
            f"an image of {config.image_size} pixels is no multiple of patch_size "
            f"{config.patch_size}: set image_res (image_size) to {near}"
        )
    if config.width % config.heads:
        raise UserError(
            f"a vision transformer of width {config.width} cannot have {config.heads} heads: set "
            "vision_heads to a divisor of vision_width"
        )
    if config.tower and config.stem:
        raise UserError("vision_tower and vision_stem exclude each other; choose one")
    if config.patch_size % 2 ** len(config.stem):
        raise UserError(
            f"a stem of {len(config.stem)} stages halves the image {len(config.stem)} times, and "
            f"patch_size {config.patch_size} is no multiple of {2 ** len(config.stem)}: give fewer "
            "stages or a larger patch"
        )


def patches_of(
    weights: Mapping[str, Tensor], on_tower: int | None = None
) -> tuple[int, tuple[int, ...]]:
    """Patch size in pixels and stem of a ViT, off its weights (a state dict of this module's
    names). on_tower: the patch size where it stands on a timm tower, which weights do not tell."""
    prefix = "patch_embed.backbone."
    stem = ()
    if any(key.startswith(f"{prefix}trunk.") for key in weights):
        if on_tower:
            return on_tower, stem
        raise UserError(
            "this vision transformer stands on a tower of timm (vision_tower), which weights alone "
            "do not name: keep the run's config.yaml beside them"
        )
    if f"{prefix}conv1.weight" in weights:
        stages = [
            key
            for key in weights
            if re.fullmatch(rf"{re.escape(prefix)}stages\.\d+\.conv2\.weight", key)
        ]
        stem = tuple(len(weights[key]) for key in [f"{prefix}conv1.weight", *stages])
    return weights["patch_embed.proj.weight"].shape[-1] << len(stem), stem
