"""Any image encoder of the project, or of timm, as a map from images to one feature vector each.

encoder = open_encoder(weights, about)           # of a checkpoint: its weights, and what lies in or
beside it encoder = timm_encoder("resnet50", weights)
features = encoder(image)                        # float32 [B,3,S,S], normalised by `encoder.pixels`
-> [B,D]
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.files import nearest
from base.pixels import IMAGENET, OPENAI, Pixels
from models.classification.classifier import SIZES, ClassifierConfig, VisionClassifier
from models.dual_encoder.base import DualConfig
from models.dual_encoder.factory import build_dual
from models.layers.vit import ViT, ViTConfig, patches_of
from models.weights.any_dual_encoder import open_dual
from models.weights.loading import load_checkpoint
from models.weights.vit import load_vit, native

State = Mapping[str, Tensor]
TOWER = "feats"  # what the image tower says, before projections


class ImageEncoder(nn.Module):
    """A network and which of its outputs counts.

    kind: classifier, dual, fusion (SIMLA, ALBEF) or timm: with the title, how its images are
    resized. pixels: their side, interpolation, mean and std. config: all that the features
    depend on beside the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        outputs: Callable[[Tensor], dict],
        kind: str,
        pixels: Pixels,
        title: str,
    ):
        super().__init__()
        self.network, self.outputs, self.kind, self.pixels, self.title = (
            network,
            outputs,
            kind,
            pixels,
            title,
        )
        self.features = TOWER

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[self.features].flatten(1)

    @property
    def config(self) -> tuple:
        return (self.kind, self.pixels, self.title, self.features)

    @torch.no_grad()
    def choose(self, features: str) -> int:
        """Let `features` be the output that counts; its width. Raises UserError that lists what
        there is."""
        side = self.pixels.size
        found = self.eval().outputs(torch.zeros(1, 3, side, side))
        if features not in found:
            raise UserError(f"features {features!r}: {self.title} has {', '.join(found)}")
        self.features = features
        return found[features].flatten(1).shape[1]


def open_encoder(weights: State, about: Mapping[str, Any], name: str | None = None) -> ImageEncoder:
    """The image encoder of a checkpoint: of Classification.py, main.py, Pretrain.py and its kin, or
    a foreign one's.

    about: `runtime.config.from_checkpoint.described` of the file. name: the model, where
    these do not tell. Raises UserError.
    """
    network = about.get("network", {})
    if any(key.startswith("visual_encoder.") for key in weights):
        return _fusion(weights, about.get("config", {}))
    if str(network.get("model", "")).startswith("SIMCLR_"):
        pixels = Pixels(network["image_size"], "bilinear", *IMAGENET)
        return _dual(build_loaded(weights, network), network["model"], pixels)
    if str(network.get("model", "")).startswith("vit-") or _is_vit(weights):
        return _classifier(weights, network, name)
    opened = open_dual(weights, about, name)
    return _dual(opened.model, opened.title, opened.pixels)


def _is_vit(weights: State) -> bool:
    try:
        return "pos_embed" in native(weights)
    except UserError:
        return False


def build_loaded(weights: State, network: Mapping[str, Any]) -> nn.Module:
    """The dual encoder that a run's own `network` section describes, with its weights."""
    known = {f.name for f in fields(DualConfig)}
    model = build_dual(DualConfig(**{key: value for key, value in network.items() if key in known}))
    load_checkpoint(model, weights, allowed_unexpected=("momentum_model.*",))
    return model


def _dual(model: nn.Module, title: str, pixels: Pixels) -> ImageEncoder:
    return ImageEncoder(model, model.embed_image, "dual", pixels, title)


def _classifier(weights: State, network: Mapping[str, Any], name: str | None) -> ImageEncoder:
    """A ViT of Classification.py, or one of its kind under any library's names."""
    known = {f.name for f in fields(ClassifierConfig)}
    values = {key: value for key, value in network.items() if key in known}
    config = ClassifierConfig(**(values or config_of_weights(native(weights), name)))
    model = VisionClassifier(config)
    load_vit(model, weights)

    def outputs(image: Tensor) -> dict[str, Tensor]:
        token = model.features(image)
        hidden = model.pre_logits(token)
        found = {TOWER: token, "logits": model.head(hidden)}
        return found | ({"pre_logits": hidden} if config.representation_size else {})

    pixels = Pixels(config.image_size, "bilinear", *config.statistics)
    return ImageEncoder(model, outputs, "classifier", pixels, config.model)


def config_of_weights(weights: State, name: str | None = None) -> dict[str, Any]:
    """`ClassifierConfig` of native weights alone, GELU and LayerNorm being COYO-ViT's. Raises
    UserError."""
    width, (patch, stem) = len(weights["patch_embed.proj.weight"]), patches_of(weights)
    depth = 1 + max(
        int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))
    )
    size = next((size for size, each in SIZES.items() if each[:2] == (width, depth)), None)
    if name is None and size is None:
        raise UserError(
            f"a vision transformer of width {width} with {depth} blocks is none of vit-{'|'.join(SIZES)}"
        )
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    found = {"model": name or f"vit-{size}/{patch}", "image_size": grid * patch, "stem": stem}
    if "pre_logits.fc.bias" in weights:
        found["representation_size"] = len(weights["pre_logits.fc.bias"])
    return found | (
        {"num_classes": len(weights["head.bias"])} if "head.bias" in weights else {"num_classes": 1}
    )


def _fusion(weights: State, config: Mapping[str, Any]) -> ImageEncoder:
    """The vision transformer of SIMLA and ALBEF; what the run's configuration leaves open is read
    off the weights."""
    prefix = "visual_encoder."
    state = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    width, (patch, stem) = len(state["patch_embed.proj.weight"]), patches_of(state)
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    heads = config.get("vision_heads") or max(1, width // 64)
    vit = ViT(
        ViTConfig(
            grid * patch, patch, width, depth, heads, mask_token="mask_token" in state, stem=stem
        )
    )
    load_checkpoint(vit, state)
    network, projection = nn.ModuleDict({"vit": vit}), weights.get("vision_proj.weight")
    if projection is not None:
        network["vision_proj"] = nn.Linear(width, len(projection))
        network["vision_proj"].load_state_dict(
            {"weight": projection, "bias": weights["vision_proj.bias"]}
        )

    def outputs(image: Tensor) -> dict[str, Tensor]:
        token = vit(image)[:, 0]
        return {TOWER: token} | (
            {"z": network["vision_proj"](token)} if projection is not None else {}
        )

    title = f"vision transformer of width {width}, {depth} blocks"
    return ImageEncoder(network, outputs, "fusion", Pixels(grid * patch, "bicubic", *OPENAI), title)


def timm_encoder(name: str, weights: State | None = None, pretrained: bool = False) -> ImageEncoder:
    """A network of timm with pooled features. weights: of a file; pretrained: fetched by timm; else
    they are random.

    Raises UserError for an unknown name, with the nearest.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        found = nearest(name, timm.list_models(), 0.3)
        hint = f"; did you mean timm/{found}?" if found else ""
        raise UserError(f"timm has no model {name!r}{hint}")
    model = timm.create_model(name, num_classes=0, pretrained=pretrained)
    if weights is not None:
        heads = ("head.*", "fc.*", "classifier.*", "pre_logits.*")
        load_checkpoint(model, weights, allowed_unexpected=heads)
    given = timm.data.resolve_model_data_config(model)
    pixels = Pixels(
        given["input_size"][-1], given["interpolation"], tuple(given["mean"]), tuple(given["std"])
    )
    encoder = ImageEncoder(
        model, lambda image: {TOWER: model(image)}, "timm", pixels, f"timm/{name}"
    )
    encoder.crop_share = given["crop_pct"]
    return encoder
