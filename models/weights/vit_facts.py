"""What the weights of a vision transformer do not say: pixel statistics, activation, LayerNorm eps.

Two networks whose weights look alike may differ in all of these. They are read from the files beside
the weights or known from the layout of one maker; what is still unknown is asked for, never guessed.

    facts = facts_of(weights, about, VitFacts(mean=(0.5, 0.5, 0.5)))     # what the user states wins
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from base.distributed import say
from base.errors import UnfitWeights, brief
from base.libraries import timm_network
from base.pixels import HALF, IMAGENET, RESAMPLING, RGB, STATISTICS, Pixels, processor_statistics
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.weights.loading import Differences, State, from_saved
from models.weights.stated import BILINEAR, FILTERS, OPEN_FOLDER, check_stated
from models.weights.vit import load_vit, vit_kind

OF_TRANSFORMERS = ("vit", "deit", "vit_mae", "vit_msn", "dinov2")  # its model_type
BY_BILINEAR = ("vit", "vit_mae", "vit_msn")  # whose processor resizes so; that of others: bicubic
# transformers' name -> ours
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class VitFacts(NamedTuple):
    """Facts about a vision transformer; None = unknown.

    activation: `gelu` (exact) or `gelu_tanh`. resize: the shorter side before the centre crop, in
    pixels; None = the whole image is squeezed to the input size.
    """

    mean: RGB | None = None
    std: RGB | None = None
    activation: str | None = None
    eps: float | None = None
    interpolation: str | None = None
    resize: int | None = None

    @property
    def gelu(self) -> str | None:
        """The activation as torch calls it."""
        return {"gelu": "none", "gelu_tanh": "tanh"}.get(self.activation or "")

    def updated(self, newer: "VitFacts") -> "VitFacts":
        """These facts, overridden by what `newer` knows."""
        known = {name: value for name, value in newer._asdict().items() if value is not None}
        return self._replace(**known)


COYO_VIT = VitFacts(*HALF, "gelu_tanh", 1e-6, "bilinear")
SELF_SUPERVISED = VitFacts(*IMAGENET, "gelu", 1e-6, "bicubic")  # DINO, MoCo v3, MAE, DINOv2


def facts_of(weights: State, about: Mapping[str, Any], stated: VitFacts) -> VitFacts:
    """All facts, or UserError that lists what is missing and how to state it.

    weights: as stored, prefixes included. about: `config.json` and `preprocessor_config.json` from
    beside the file, where they exist. stated: by the user.
    """
    found = known_facts(weights, about).updated(stated)
    options = {
        "mean": "--mean 0.485 0.456 0.406",
        "std": "--std 0.229 0.224 0.225",
        "activation": "--activation gelu (exact) or gelu_tanh",
        "eps": "--eps 1e-6",
    }
    missing = [name for name in options if getattr(found, name) is None]
    if missing:
        asked = ", ".join(options[name] for name in missing)
        raise UnfitWeights(
            f"these weights do not tell their {', '.join(missing)}: keep config.json and "
            f"preprocessor_config.json beside the file, or state them, such as {asked}, or name the "
            "model of timm they belong to, such as --model timm/vit_small_patch16_224.dino"
        )
    if stated.resize is None:
        _check_view(about.get("preprocessor_config.json", {}))
    return found


def _check_view(images: Mapping[str, Any]) -> None:
    """UserError for a filter that no view here has, and for a centre cut out of images that are not
    resized by their shorter side, as DeiT's squeezes them before."""
    check_stated("preprocessor_config.json", images, {"resample": FILTERS}, OPEN_FOLDER)
    size = images.get("size")
    shorter = isinstance(size, Mapping) and "shortest_edge" in size
    if size and images.get("do_center_crop") and not shorter:
        raise UnfitWeights(
            f"preprocessor_config.json: size is {brief(size)} before a centre crop; "
            f"{OPEN_FOLDER}, or state the shorter side, such as --resize 256"
        )


def known_facts(weights: State, about: Mapping[str, Any]) -> VitFacts:
    """What the run of Classification.py that made the weights, or else their layout and the files
    beside them state."""
    network = about.get("network", {})
    if str(network.get("model", "")).startswith("vit-"):
        config = from_saved(ClassifierConfig, network)
        activation = "gelu" if config.gelu == "none" else "gelu_tanh"
        return VitFacts(*config.statistics, activation, config.layer_norm_eps, "bilinear")
    found = _of_layout(weights)
    found = found.updated(_of_config(about.get("config.json", {})))
    kind = str(about.get("config.json", {}).get("model_type"))
    return found.updated(_of_preprocessor(about.get("preprocessor_config.json", {}), kind))


def differing_options(
    network: ClassifierConfig, weights: State, about: Mapping[str, Any]
) -> list[str]:
    """Options that make `network` compute what the weights were trained with, such as `--gelu
    none`; [] where it does, or nothing is known."""
    facts = known_facts(weights, about)
    options = []
    if facts.gelu not in (None, network.gelu):
        options.append(f"--gelu {facts.gelu}")
    if facts.eps is not None and facts.eps != network.layer_norm_eps:
        options.append(f"--layer-norm-eps {facts.eps:g}")
    mean, std = network.statistics
    if (facts.mean or mean, facts.std or std) != (mean, std):
        pixels = (facts.mean or mean, facts.std or std)
        name = next((name for name, each in STATISTICS.items() if each == pixels), None)
        options.append(f"--pixels {name}" if name else f"pixels of mean {pixels[0]}")
    return options


def load_agreeing(
    model: VisionClassifier, weights: State, about: Mapping[str, Any], strict: bool
) -> Differences:
    """`load_vit`, where the network computes what the weights were trained with; else UserError
    names the options, or, not `strict`, a note does: fine-tuning adapts to them. To evaluate a run
    of ours its options are taken, but for those that the user gives."""
    check_heads(about, model.options)
    options = differing_options(model.options, weights, about)
    if options and strict and "network" not in about:
        raise UnfitWeights(f"these weights were trained otherwise: add {' '.join(options)}")
    if options:
        say(f"note: the starting weights were trained with {' '.join(options)}")
    return load_vit(model, weights)


def check_heads(about: Mapping[str, Any], network: ClassifierConfig) -> None:
    """UserError where timm's or transformers' config.json states other attention heads than ours
    has."""
    described = about.get("config.json", {})
    heads, remedy = described.get("num_attention_heads", network.vit.heads), "hf/FOLDER"
    if "architecture" in described:
        heads, remedy = timm_facts(timm_described(described))[0], "timm/NAME"
    if heads != network.vit.heads:
        raise UnfitWeights(
            f"config.json: {heads or 'no'} attention heads, but {network.model} has "
            f"{network.vit.heads}; evaluate it by eval_knn.py --model {remedy}"
        )


def _of_layout(weights: State) -> VitFacts:
    """Facts of a layout that only one maker writes."""
    made_by_dino = any(key.startswith("backbone.patch_embed.") for key in weights)
    made_by_moco = any(key.startswith("base_encoder.patch_embed.") for key in weights)
    if made_by_dino or made_by_moco or "decoder_embed.weight" in weights or is_dinov2(weights):
        return SELF_SUPERVISED
    if vit_kind(weights) == "tensorflow":
        return COYO_VIT
    return VitFacts()


def self_supervised_heads(weights: State) -> int | None:
    """Attention heads of a DINO, MoCo v3 or MAE checkpoint; None for weights of other layouts.

    Heads are 64 wide, but for MoCo v3's small (12 of 32) and MAE's huge network (16 of 80).
    """
    for prefix in ("backbone.", "base_encoder.", ""):
        if f"{prefix}patch_embed.proj.weight" in weights:
            break
    else:
        return None
    if not prefix and "decoder_embed.weight" not in weights:
        return None
    width = len(weights[f"{prefix}patch_embed.proj.weight"])
    known = {("base_encoder.", 384): 12, ("", 1280): 16}
    return known.get((prefix, width), max(1, width // 64))


def dinov2_name(weights: State) -> str:
    """timm's name of a DINOv2 network."""
    sizes = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
    width = weights["patch_embed.proj.weight"].shape[0]
    if width not in sizes:
        raise UnfitWeights(f"DINOv2 has no network of width {width}: {', '.join(map(str, sizes))}")
    registers = "_reg4" if "register_tokens" in weights else ""
    return f"vit_{sizes[width]}_patch14{registers}_dinov2"


def pixels_of(facts: VitFacts, size: int) -> Pixels:
    """How images of side `size` enter the network."""
    return Pixels(size, facts.interpolation or "bicubic", facts.mean, facts.std)


def is_dinov2(weights: State) -> bool:
    """Whether these are DINOv2's weights under Meta's names."""
    return {"mask_token", "blocks.0.ls1.gamma", "patch_embed.proj.weight"} <= weights.keys()


def timm_described(described: Mapping[str, Any]) -> nn.Module:
    """The network of timm's config.json, without weights (meta device). UserError."""
    with torch.device("meta"):
        return timm_network(described["architecture"], **described.get("model_args", {}))


def timm_facts(network: nn.Module) -> tuple[int | None, str | None]:
    """Attention heads of timm's ViT (None: it is none), and its activation: `gelu`, `gelu_tanh` or
    that of another class."""
    heads = activation = None
    for module in network.modules():
        if hasattr(module, "qkv"):
            heads = module.num_heads
        if hasattr(module, "fc1"):
            activation = type(module.act).__name__
            if isinstance(module.act, nn.GELU):
                activation = "gelu" if module.act.approximate == "none" else "gelu_tanh"
    return heads, {"GELUTanh": "gelu_tanh"}.get(activation, activation)


def _of_timm(described: Mapping[str, Any]) -> VitFacts:
    """Facts of timm's config.json: of its network, and of the pixels of its weights."""
    network = timm_described(described)
    look = described.get("pretrained_cfg", {})
    mean, std = (tuple(look[name]) if look.get(name) else None for name in ("mean", "std"))
    eps = getattr(getattr(network, "norm", None), "eps", None)
    return VitFacts(mean, std, timm_facts(network)[1], eps, look.get("interpolation"))


def _of_config(described: Mapping[str, Any]) -> VitFacts:
    """Facts of timm's or transformers' config.json; what it leaves out is at the library's
    default."""
    if "architecture" in described:
        return _of_timm(described)
    if described.get("model_type") not in OF_TRANSFORMERS:
        return VitFacts()
    activation = described.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UnfitWeights(f"config.json: hidden_act {brief(activation)} is not supported")
    default = 1e-6 if described["model_type"] in ("dinov2", "vit_msn") else 1e-12
    eps = float(described.get("layer_norm_eps", default))
    return VitFacts(activation=ACTIVATIONS[activation], eps=eps)


def _of_preprocessor(images: Mapping[str, Any], kind: str) -> VitFacts:
    """Facts of transformers' preprocessor_config.json; what it leaves out is at the library's
    default. kind: the network's model_type, which tells the processor where the file does not."""
    processor = images.get("image_processor_type") or images.get("feature_extractor_type")
    of_vit = str(processor).startswith("ViT") if processor else kind in BY_BILINEAR
    resample = images.get("resample") or (BILINEAR if of_vit and images else None)
    size = images.get("size")
    resize = None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        resize = int(size["shortest_edge"])
    mean, std = processor_statistics(images) or (None, None)
    return VitFacts(
        mean=mean,
        std=std,
        interpolation=RESAMPLING.get(resample),
        resize=resize,
    )
