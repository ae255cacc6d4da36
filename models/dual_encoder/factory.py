"""Model names: which class, backbone and configuration a `--model` string means. This file alone
knows them all.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.libraries import dual_inputs, of_library
from base.memory import build_fitting
from base.names import did_you_mean
from models.dual_encoder.align import TEXTS, Align
from models.dual_encoder.base import DualEncoder
from models.dual_encoder.cl2l import CL2L, BarLIP, SiamLIP, SwALIP, SwALIPV1
from models.dual_encoder.clip import CLIP, SigLIP
from models.dual_encoder.config import DualConfig
from models.dual_encoder.library import LibraryCLIP
from models.dual_encoder.openai import OpenAICLIP
from models.dual_encoder.slip import SimCLR, Slip, SlipCLIP
from models.layers.clip_towers import ClipViT
from models.layers.efficientnet import SHAPES
from models.layers.library_towers import HuggingFaceText, TimmTower
from models.layers.openai_towers import OPENAI_MODELS, OpenAIConfig, is_openai, openai_model
from models.layers.vit import ViTConfig

HEADS = {
    "CLIP": CLIP,
    "SIGLIP": SigLIP,
    "CL2L": CL2L,
    "BARLIP": BarLIP,
    "SIAMLIP": SiamLIP,
    "SWALIP": SwALIP,
    "SWALIPV1": SwALIPV1,
}
ANY = -1  # number of local views
USES_LOCAL_VIEWS = ("CL2L", "BARLIP", "SIAMLIP", "SWALIP")  # heads that take any; the others none

VITS = {  # width, blocks, heads, patch in pixels
    "VITT8": (128, 4, 4, 8),  # for small images, such as DigitScenes
    "VITS16MOCO": (384, 12, 12, 16),
    "VITS16": (384, 12, 6, 16),
    "VITS32": (384, 12, 6, 32),
    "VITB32": (768, 12, 12, 32),
    "VITB16": (768, 12, 12, 16),
    "VITL16": (1024, 24, 16, 16),
}
CONVOLUTIONAL = {  # timm's names
    "RT": "test_resnet",  # 0.4 M parameters, for small images
    "R50": "resnet50",
    "CNEXTT": "convnext_tiny",
    "CNEXTS": "convnext_small",
}
BACKBONES = (*CONVOLUTIONAL, *VITS)

SLIP_MODELS = {"CLIP": SlipCLIP, "SLIP": Slip, "SIMCLR": SimCLR}
SLIP_BACKBONES = {"VITT8": "VITT8", "VITS16": "VITS16MOCO", "VITB16": "VITB16", "VITL16": "VITL16"}


def model_names() -> list[str]:
    """Every valid `model` string."""
    rocket = [
        f"{base}_{backbone}_{head}"
        for base in ("CLIP", "CL2L")
        for backbone in BACKBONES
        for head in HEADS
    ]
    slip = [f"{base}_{backbone}" for base in SLIP_MODELS for backbone in SLIP_BACKBONES]
    align = [f"ALIGN_{image}_{text}" for image in SHAPES for text in TEXTS]
    return rocket + slip + align


class Parts(NamedTuple):
    """What a model string means. local_views: how many the network needs, ANY of them or none."""

    network: type[DualEncoder]
    backbone: str
    local_views: int


def parts_of(name: str) -> Parts:
    """The parts of a model string. UserError names the nearest."""
    parts = name.split("_")
    if of_library(name):
        return Parts(LibraryCLIP, name, 0)
    if is_openai(name):
        return Parts(OpenAICLIP, name, 0)
    if name not in model_names():
        hint = did_you_mean(name, [*model_names(), *OPENAI_MODELS]) or "."
        raise UserError(
            f"model {name!r} is unknown{hint} The form is <CLIP|CL2L>_<backbone>_<head> with "
            f"backbones {', '.join(BACKBONES)} and heads {', '.join(HEADS)}, or SLIP's "
            f"<{'|'.join(SLIP_MODELS)}>_<{'|'.join(SLIP_BACKBONES)}>, or {', '.join(OPENAI_MODELS)}, "
            f"or ALIGN_<{'|'.join(SHAPES)}>_<{'|'.join(TEXTS)}>, or open_clip/NAME:TAG or hf/FOLDER"
        )
    if parts[0] == "ALIGN":
        return Parts(Align, parts[1], 0)
    if len(parts) == 2:
        augmentations = 0 if parts[0] == "CLIP" else 2
        return Parts(SLIP_MODELS[parts[0]], SLIP_BACKBONES[parts[1]], augmentations)
    return Parts(HEADS[parts[2]], parts[1], ANY if parts[2] in USES_LOCAL_VIEWS else 0)


def build_dual(config: DualConfig, visual: nn.Module | None = None) -> DualEncoder:
    """The network of `config.model`, freshly initialised; `visual` replaces its backbone (needs
    `num_features`). UserError where the free memory does not hold it."""
    model, backbone, _ = parts_of(config.model)
    if model in (Align, OpenAICLIP, LibraryCLIP):  # whose towers belong together
        if config.image_tower or config.text_tower:
            raise UserError(
                f"{config.model} has towers of its own; use CLIP_VITB16_CLIP or *_SIGLIP"
            )
        build = partial(model, config)
        if model is OpenAICLIP:
            build = partial(OpenAICLIP, openai_shape(config), config)
        return build_fitting(build, config.model)
    if config.tower_classes and not (config.image_tower and config.text_tower):
        raise UserError("tower_classes joins towers of libraries: give image_tower and text_tower")
    if visual is None and config.image_tower:
        visual = TimmTower(config.image_tower, classes=config.tower_classes is not None)
    build_image = partial(build_backbone, backbone, config.image_size)
    if config.text_tower is None:
        return build_fitting(lambda: model(config, visual or build_image()), config.model)
    if model not in (CLIP, SigLIP):
        raise UserError(f"text_tower: {config.model} has its own; use *_CLIP or *_SIGLIP")
    text_tower = HuggingFaceText(config.text_tower)
    width = text_tower.num_features
    if config.tower_classes and (config.embed_dim, config.clip_proj_type) != (width, "linear"):
        raise UserError(f"tower_classes: set embed_dim to {width}, clip_proj_type to linear")
    return model(config, visual or build_image(), text_tower=text_tower)


def with_library_sizes(config: DualConfig) -> DualConfig:
    """The configuration with image size, context and vocabulary of a library's model; others stay.
    UserError where another size is asked for."""
    if not of_library(config.model):
        return config
    inputs = dual_inputs(config.model)
    sizes = {"image_size": inputs.pixels.size, "context_length": inputs.context_length}
    for name, size in sizes.items():
        given = getattr(config, name)
        default = getattr(DualConfig(), name)
        if given not in (size, default):
            raise UserError(f"{name} {given}: {config.model} is of {size}; give that")
    return replace(config, vocab_size=inputs.vocab_size, **sizes)


def openai_shape(config: DualConfig) -> OpenAIConfig:
    """Geometry of OpenAI's model for this image size and vocabulary. OpenAI's spelling (ViT-B/32)
    and -quickgelu stand for quick_gelu, open_clip's (ViT-B-32) for gelu."""
    name = config.model
    published = openai_model(name.removesuffix("-quickgelu"))
    activation = "quick_gelu" if "/" in name or name.endswith("-quickgelu") else "gelu"
    text = replace(
        published.text,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        activation=activation,
    )
    return replace(published, image_size=config.image_size, text=text, vision_activation=activation)


def build_backbone(name: str, image_size: int) -> nn.Module:
    """The vision tower [B,3,S,S] -> [B,C] of that name, with random weights; has `num_features`."""
    if name in CONVOLUTIONAL:
        import timm

        tower = timm.create_model(CONVOLUTIONAL[name], num_classes=0)
        tower.register_forward_pre_hook(channels_last)
        return tower
    width, depth, heads, patch = VITS[name]
    return ClipViT(
        ViTConfig(image_size=image_size, patch_size=patch, width=width, depth=depth, heads=heads)
    )


def check_compiled_pooling(config: DualConfig, device: torch.device) -> None:
    """UserError for compiled networks that shrink shortcuts by mean pooling, as test_resnet does, on
    images so small that a 2 x 2 window pools a map of 1 x 1: on CUDA (torch 2.11) the compiled mean
    is four times too large, and the gradients of all layers before are a quarter of eager ones."""
    if device.type != "cuda" or config.image_size >= 32:
        return
    with torch.device("meta"):
        layers = build_dual(config).modules()
    if any(isinstance(layer, nn.AvgPool2d) and layer.ceil_mode for layer in layers):
        raise UserError(
            f"--compile with --image_size {config.image_size}: compiled pooling of {config.model} "
            "is wrong on GPUs below 32 pixels; take larger images, or leave --compile out"
        )


def channels_last(_tower: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[B,3,S,S] each, channels last in memory: the layout of cuDNN's half-precision kernels, which
    every layer behind keeps."""
    return tuple(image.contiguous(memory_format=torch.channels_last) for image in images)
