"""The image encoder of any checkpoint, as a map from images to one feature vector each.

encoder = open_encoder(weights, about)   # about: what lies in or beside the file
features = encoder(image)                # float32 [B,3,S,S], by `encoder.pixels` -> [B,D]
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from base.errors import UnfitWeights, UserError
from base.pixels import IMAGENET, OPENAI, Pixels, timm_statistics
from models.classification.classifier import SIZES, ClassifierConfig, VisionClassifier
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.layers.vit import ViT, ViTConfig, patches_of
from models.weights.any_dual_encoder import open_dual
from models.weights.image_encoder import TOWER, ImageEncoder
from models.weights.libraries import timm_encoder
from models.weights.loading import State, count, from_saved, load_checkpoint, part_of
from models.weights.vit import backbone, load_vit, native, vit_kind
from models.weights.vit_facts import (
    VitFacts,
    check_heads,
    dinov2_name,
    facts_of,
    is_dinov2,
    pixels_of,
    self_supervised_heads,
)


def open_encoder(
    weights: State,
    about: Mapping[str, Any],
    name: str | None = None,
    stated: VitFacts = VitFacts(),  # noqa: B008 a constant
) -> ImageEncoder:
    """The image encoder of a checkpoint: of Classification.py, main.py, Pretrain.py and its kin, or
    a foreign one's.

    about: `runtime.config.from_checkpoint.description_of` of the file. name: the model, where
    these do not tell. stated: what the user says about a vision transformer of others. Raises
    UserError.
    """
    network = about.get("network", {})
    if any(key.startswith("visual_encoder.") for key in weights):
        return _fusion(weights, about.get("config", {}))
    if str(network.get("model", "")).startswith("SIMCLR_"):
        pixels = Pixels(network["image_size"], "bilinear", *IMAGENET)
        return _dual(build_loaded(weights, network), network["model"], pixels)
    if str(network.get("model", "")).startswith("vit-"):
        return _classifier(weights, from_saved(ClassifierConfig, network))
    if architecture := about.get("config.json", {}).get("architecture"):
        return timm_encoder(architecture, weights, described=about["config.json"], stated=stated)
    if is_dinov2(weights):
        return timm_encoder(dinov2_name(weights), weights, stated=stated)
    if _is_vit(weights):
        facts = facts_of(weights, about, stated)
        if heads := self_supervised_heads(weights):
            return _self_supervised(backbone(weights), heads, facts)
        return _foreign_classifier(weights, about, name, facts)
    opened = open_dual(weights, about, name, stated.mean, stated.std)
    return _dual(opened.model, opened.title, opened.pixels)


def _is_vit(weights: State) -> bool:
    try:
        return "pos_embed" in native(weights)
    except UserError:
        return False


def build_loaded(weights: State, network: Mapping[str, Any]) -> nn.Module:
    """The dual encoder that a run's own `network` section describes, with its weights."""
    model = build_dual(from_saved(DualConfig, network))
    load_checkpoint(model, weights, allowed_unexpected=("momentum_model.*",))
    return model


def _dual(model: nn.Module, title: str, pixels: Pixels) -> ImageEncoder:
    return ImageEncoder(model, model.embed_image, "dual", pixels, title)


def _classifier(
    weights: State, config: ClassifierConfig, facts: VitFacts | None = None
) -> ImageEncoder:
    """A ViT of Classification.py, or one of its kind whose pixels `facts` tell."""
    model = VisionClassifier(config)
    load_vit(model, weights)

    def outputs(image: Tensor) -> dict[str, Tensor]:
        token = model.features(image)
        hidden = model.pre_logits(token)
        found = {TOWER: token, "logits": model.head(hidden)}
        return found | ({"pre_logits": hidden} if config.representation_size else {})

    pixels = Pixels(config.image_size, "bilinear", *config.statistics)
    encoder = ImageEncoder(model, outputs, "classifier", pixels, config.model)
    if facts is not None:
        encoder.pixels = pixels_of(facts, config.image_size)
        encoder.resize = facts.resize
    return encoder


def _foreign_classifier(
    weights: State, about: Mapping[str, Any], name: str | None, facts: VitFacts
) -> ImageEncoder:
    """A plain ViT under any library's names, without a run's configuration."""
    values = config_of_weights(native(weights), name)
    config = ClassifierConfig(**values, gelu=facts.gelu, layer_norm_eps=facts.eps)
    check_heads(about, config)
    encoder = _classifier(weights, config, facts)
    if vit_kind(weights) != "tensorflow":  # COYO-ViT's own are resized as there
        encoder.kind = "vit"
    return encoder


def _self_supervised(weights: State, heads: int, facts: VitFacts) -> ImageEncoder:
    """The encoder of DINO, MoCo v3 or MAE: no head, the class token counts."""
    options = {"layer_norm_eps": facts.eps, "gelu": facts.gelu}
    config = ViTConfig(**vit_sizes(weights), heads=heads, **options)
    vit = ViT(config)
    load_checkpoint(vit, weights)

    def outputs(image: Tensor) -> dict[str, Tensor]:
        return {TOWER: vit(image)[:, 0]}

    sizes = f"width {config.width}, {config.depth} blocks, patch {config.patch_size}"
    pixels = pixels_of(facts, config.image_size)
    encoder = ImageEncoder(vit, outputs, "vit", pixels, f"self-supervised ViT of {sizes}")
    encoder.resize = facts.resize
    return encoder


def vit_sizes(weights: State, on_tower: int | None = None) -> dict[str, Any]:
    """Sizes of native weights as fields of `ViTConfig`. on_tower: see `patches_of`."""
    for name in ("patch_embed.proj.weight", "pos_embed"):
        if name not in weights:
            raise UnfitWeights(f"no {name} in it, which every vision transformer here has")
    patch, stem = patches_of(weights, on_tower)
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": len(weights["patch_embed.proj.weight"]),
        "depth": count(weights, r"blocks\.(\d+)\."),
        "stem": stem,
    }


def config_of_weights(weights: State, name: str | None = None) -> dict[str, Any]:
    """Sizes of native weights as options of `ClassifierConfig`. Raises UserError."""
    sizes = vit_sizes(weights)
    width, depth, patch = sizes["width"], sizes["depth"], sizes["patch_size"]
    size = next((size for size, each in SIZES.items() if each[:2] == (width, depth)), None)
    if name is None and size is None:
        raise UnfitWeights(
            f"a vision transformer of width {width} with {depth} blocks is none of "
            f"vit-{'|'.join(SIZES)}; evaluate it with --model timm/NAME or hf/FOLDER"
        )
    found = {
        "model": name or f"vit-{size}/{patch}",
        "image_size": sizes["image_size"],
        "stem": sizes["stem"],
        "num_classes": len(weights.get("head.bias", [0])),
    }
    if "pre_logits.fc.bias" in weights:
        found["representation_size"] = len(weights["pre_logits.fc.bias"])
    return found


def _fusion(weights: State, config: Mapping[str, Any]) -> ImageEncoder:
    """The vision transformer of SIMLA and ALBEF; what the run's configuration leaves open is read
    off the weights."""
    state = part_of(weights, "visual_encoder.")
    tower = config.get("vision_tower")
    sizes = vit_sizes(state, config.get("patch_size") if tower else None)
    width = sizes["width"]
    heads = config.get("vision_heads") or max(1, width // 64)
    vit = ViT(ViTConfig(**sizes, heads=heads, mask_token="mask_token" in state, tower=tower))
    load_checkpoint(vit, state)
    network = nn.ModuleDict({"vit": vit})
    projection = weights.get("vision_proj.weight")
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

    title = f"vision transformer of width {width}, {sizes['depth']} blocks"
    pixels = Pixels(sizes["image_size"], "bicubic", *(timm_statistics(tower) if tower else OPENAI))
    return ImageEncoder(network, outputs, "fusion", pixels, title)
