"""OpenAI CLIP's own networks, which open_clip and Hugging Face share: ViT or modified ResNet, with
plain projections.

Parameter names are those of OpenAI's released files, so their state dicts load as they are once the
half-precision weights are cast (`models.weights.clip`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from base.names import did_you_mean
from models.layers.attention import merge_heads, split_heads
from models.layers.clip_towers import TextShape, Transformer


@dataclass(frozen=True, kw_only=True)
class OpenAIConfig:
    """Geometry of one of OpenAI's models; the defaults are ViT-B/32."""

    embed_dim: int = 512
    image_size: int = 224
    vision_width: int = 768  # of a ResNet: channels of the first stage
    # blocks of the ViT, or of each ResNet stage
    vision_layers: int | tuple[int, int, int, int] = 12
    patch_size: int = 32  # ViT only
    text: TextShape = TextShape()
    vision_activation: str = "quick_gelu"  # gelu for open_clip's models without -quickgelu

    @property
    def is_resnet(self) -> bool:
        return not isinstance(self.vision_layers, int)

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def vision_heads(self) -> int:
        """Of the ViT: 64 channels a head, but 80 in open_clip's ViT-H."""
        return 16 if self.vision_width == 1280 else max(1, self.vision_width // 64)


def _model(
    width: int,
    layers,
    patch: int,
    embed: int,
    text: tuple[int, int],
    size: int = 224,
    text_layers: int = 12,
) -> OpenAIConfig:
    shape = TextShape(width=text[0], heads=text[1], layers=text_layers)
    return OpenAIConfig(
        embed_dim=embed,
        image_size=size,
        vision_width=width,
        vision_layers=layers,
        patch_size=patch,
        text=shape,
    )


OPENAI_MODELS = {
    "RN50": _model(64, (3, 4, 6, 3), 0, 1024, (512, 8), 224),
    "RN101": _model(64, (3, 4, 23, 3), 0, 512, (512, 8), 224),
    "RN50x4": _model(80, (4, 6, 10, 6), 0, 640, (640, 10), 288),
    "RN50x16": _model(96, (6, 8, 18, 8), 0, 768, (768, 12), 384),
    "RN50x64": _model(128, (3, 15, 36, 10), 0, 1024, (1024, 16), 448),
    "ViT-B-32": _model(768, 12, 32, 512, (512, 8)),
    "ViT-B-16": _model(768, 12, 16, 512, (512, 8)),
    "ViT-L-14": _model(1024, 24, 14, 768, (768, 12)),
    "ViT-L-14-336": _model(1024, 24, 14, 768, (768, 12), 336),
    "ViT-T-8": _model(128, 4, 8, 128, (128, 2), 48, text_layers=2),  # ours, for small images
}


def is_openai(name: str) -> bool:
    """Whether this is the name of one of these models, -quickgelu or not."""
    return _open_clips(name.removesuffix("-quickgelu")) in OPENAI_MODELS


def _open_clips(name: str) -> str:
    return name.replace("/", "-").replace("@336px", "-336")


def openai_model(name: str) -> OpenAIConfig:
    """Geometry by name, OpenAI's spelling (`ViT-B/32`, `ViT-L/14@336px`) or open_clip's
    (`ViT-B-32`)."""
    known = _open_clips(name)
    if known not in OPENAI_MODELS:
        raise UserError(
            f"model {name!r} is unknown{did_you_mean(known, OPENAI_MODELS) or '.'} "
            f"Known: {', '.join(OPENAI_MODELS)}"
        )
    return OPENAI_MODELS[known]


class OpenAIViT(nn.Module):
    """ViT with a norm before the blocks and a projection of the class token: [B,3,S,S] -> [B,E]."""

    def __init__(self, config: OpenAIConfig):
        super().__init__()
        width = config.vision_width
        patch = config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.image_size = config.image_size
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, config.vision_activation
        )
        self.ln_post = nn.LayerNorm(width)

    def tokens(self, image: Tensor) -> Tensor:
        """Class token and patches behind the last block, before `ln_post`: [B,3,S,S] ->
        [B,1+N,W]."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"image of {image.shape[-2]} x {image.shape[-1]} pixels, but the model was built for "
                f"{self.image_size} x {self.image_size}: resize them, or the position embeddings "
                "(positions.py)"
            )
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([class_token, patches], 1)
        return self.transformer(self.ln_pre(tokens + self.positional_embedding))

    def forward(self, image: Tensor) -> Tensor:
        return self.ln_post(self.tokens(image)[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """Residual bottleneck whose stride is an average pool, after the 3x3 convolution and before the
    shortcut."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.downsample = None
        if stride > 1 or width_in != 4 * width:
            shortcut = nn.Conv2d(width_in, 4 * width, 1, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
            shortcut = F.avg_pool2d(shortcut, self.stride)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return (self.bn3(self.conv3(x)) + shortcut).relu()


class AttentionPool(nn.Module):
    """One attention query, the mean, over the mean and all positions: [B,C,h,w] -> [B,E]."""

    def __init__(self, grid: int, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)
        mean = positions.mean(1, keepdim=True)
        tokens = torch.cat([mean, positions], 1) + self.positional_embedding
        query = split_heads(self.q_proj(tokens[:, :1]), self.heads)
        key = split_heads(self.k_proj(tokens), self.heads)
        value = split_heads(self.v_proj(tokens), self.heads)
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(merge_heads(pooled)).squeeze(1)


class ModifiedResNet(nn.Module):
    """ResNet-D-like: three-convolution stem, anti-aliased strides, attention pool; [B,3,S,S] ->
    [B,E]."""

    def __init__(self, config: OpenAIConfig):
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        before = width
        for stage, count in enumerate(config.vision_layers):
            after = width * 2**stage
            blocks = []
            for i in range(count):
                blocks.append(Bottleneck(before, after, stride=2 if stage and i == 0 else 1))
                before = 4 * after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            for block in blocks:
                nn.init.zeros_(block.bn3.weight)
        self.attnpool = AttentionPool(
            config.image_size // 32, before, width * 32 // 64, config.embed_dim
        )

    def stem(self, image: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,W,S/4,S/4]"""
        x = self.bn1(self.conv1(image)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return F.avg_pool2d(x, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)
