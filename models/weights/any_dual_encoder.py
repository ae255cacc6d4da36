"""Load a dual encoder for evaluation from any supported checkpoint.

Ours, clip-rocket's, SLIP's, OpenAI's, open_clip's, Hugging Face's CLIP and ALIGN:

    opened = open_dual(weights, about)          # about: what lies in or beside the file, see `open_dual`
    opened.model.embed_image(...)["z"]

Only what embeds is built: towers and projectors of z and h. Heads that training alone needs are
left out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from base.errors import UnfitWeights, UserError
from base.libraries import dual_inputs, of_library
from base.pixels import (
    ALIGN_MARGIN,
    HALF,
    IMAGENET,
    OPENAI,
    RGB,
    Pixels,
    crop_side,
    timm_statistics,
)
from base.torch_files import unwrap_names
from models.dual_encoder.base import NOT_LOADED
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual, model_names, parts_of
from models.dual_encoder.openai import OpenAICLIP
from models.layers.openai_towers import OpenAIConfig, openai_model
from models.weights.align import align_config, check_described
from models.weights.clip import (
    TIMM_NAMES,
    config_of_arguments,
    from_hugging_face,
    is_hugging_face,
    is_openais,
    load_openai,
    load_timm_open_clip,
    openai_config,
    stated_activation,
    text_at_root,
)
from models.weights.loading import State, check_temperature, count, from_saved, load_checkpoint
from models.weights.stated import (
    OPEN_CLIP_FOLDER,
    OPEN_FOLDER,
    check_open_clip,
    check_stated,
    processor_pixels,
)

TRAINING_ONLY = (
    *NOT_LOADED,
    "barlip_*",
    "siamlip_*",
    "*_predictor_*",
    "swalip_*",
    "*_prototypes.*",
    "image_mlp.*",
)
EMBEDS = {  # head -> head of the same z and h
    "BARLIP": "CL2L",
    "SIAMLIP": "CL2L",
    "SWALIP": "CL2L",
    "SWALIPV1": "CLIP",
}
COYO_ALIGN_SIDE = 289  # pixels, where no file tells


class Opened(NamedTuple):
    """model: in eval mode on the CPU. title: what the checkpoint turned out to be. context_length:
    of its texts.

    Of a library's model also its own view (uint8 [3,H,W] -> float32, normalised) and tokenizer
    (texts -> int64 [B,L], or [B,2,L] with the attention mask); None = ours.
    """

    model: nn.Module
    title: str
    pixels: Pixels
    context_length: int
    vocab_size: int
    view: Callable[[Tensor], Tensor] | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None


def open_dual(
    weights: State,
    about: Mapping[str, Any],
    name: str | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
) -> Opened:
    """The network of a checkpoint's weights.

    about: whatever is there of `network` (fields of DualConfig: our runs), `args` (clip-rocket,
    SLIP), `config.json` and `preprocessor_config.json` (Hugging Face), `open_clip_config.json`,
    `archive` (True: a TorchScript archive).
    name: the model, where these do not tell: `CL2L_R50_CL2L`; `ViT-B/32` or `ViT-B-32-quickgelu`
    for quick_gelu, `ViT-B-32` for gelu. mean, std: of the pixels, where neither file nor name tells
    them. Raises UserError.
    """
    check_name(name)
    stated = {"mean": mean, "std": std} if mean and std else {}
    weights = unwrap_names(weights)
    if "itm_head.weight" in weights and any(key.startswith("text_encoder.") for key in weights):
        raise UnfitWeights(
            "a checkpoint of ALBEF, SIMLA or BLIP: evaluate the first two with Retrieval.py --evaluate "
            "(their images alone with eval_knn.py or scripts/embed.py --texts no), BLIP with --model "
            "hf/FOLDER (transformers' layout)"
        )
    if of_library(about.get("network", {}).get("model")):
        return _with_pixels(_library(weights, about["network"]), stated)
    if "vision_model.embeddings.convolution.weight" in weights:
        return _with_pixels(_align(weights, about, name), stated)
    if is_hugging_face(weights):
        return _hugging_face(weights, about, name, stated)
    keys = text_at_root(weights).keys()
    if keys & {"visual.proj", "visual.attnpool.c_proj.weight"} and "text_projection" in keys:
        return _openai(weights, about, name, stated)
    if "network" not in about and any(key.startswith("visual.trunk.") for key in keys):
        return _timm_open_clip(weights, about, name, stated)
    if keys & {"image_projection", "image_projector.weight", "image_projector.layer1.weight"}:
        return _with_pixels(_rocket(weights, about, name), stated)
    if any(key.startswith("image_mlp.") for key in keys):
        raise UnfitWeights("a SimCLR checkpoint has no text encoder; evaluate it with eval_knn.py")
    raise UnfitWeights(
        f"a checkpoint of no known dual encoder; its first keys are {', '.join(list(weights)[:8])}"
    )


def logit_scale(model: nn.Module) -> float:
    """What a dual encoder multiplies its cosines by to get logits, as it was learned; 100, the
    limit of CLIP's, where the network has none."""
    for owner in (model, getattr(model, "network", None)):
        if hasattr(owner, "logit_scale"):
            return owner.logit_scale.exp().item()
        if hasattr(owner, "temperature"):
            check_temperature("temperature", owner.temperature)
            return 1 / owner.temperature.item()
    return 100.0


def _with_pixels(opened: Opened, stated: Mapping[str, Any]) -> Opened:
    return opened._replace(pixels=opened.pixels._replace(**stated))


def check_name(name: str | None) -> None:
    """UserError for a name that is no model's, with the nearest one."""
    if name is not None and "_" in name:
        parts_of(name)
    elif name is not None:
        openai_model(name.removesuffix("-quickgelu"))


# ---- ours, clip-rocket, SLIP


def _rocket(weights: State, about: Mapping[str, Any], name: str | None) -> Opened:
    if "network" in about:
        config = from_saved(DualConfig, about["network"])
    elif "model" in about.get("args", {}):
        config = config_of_arguments(about["args"])
    elif name in model_names():
        config = config_of_shapes(weights, name)
    else:
        raise UnfitWeights(
            "the checkpoint holds weights alone, which do not tell the model: add --model, such as CL2L_R50_CL2L, or "
            "keep the run's config.yaml beside the file"
        )
    check_same(name, config)
    tower = config.image_tower
    statistics = timm_statistics(tower) if tower else IMAGENET
    pixels = Pixels(config.image_size, "bilinear", *statistics)
    return _built(config, embedding_model(config.model), weights, pixels, TRAINING_ONLY)


def _built(
    config: DualConfig, name: str, weights: State, pixels: Pixels, left_out: Iterable[str] = ()
) -> Opened:
    """The network `name` of a configuration with its weights but for the patterns `left_out`."""
    model = build_dual(replace(config, model=name))
    load_checkpoint(model, weights, allowed_unexpected=left_out)
    return Opened(model.eval(), config.model, pixels, config.context_length, config.vocab_size)


def _library(weights: State, network: Mapping[str, Any]) -> Opened:
    """A run of main.py with a library's model."""
    config = from_saved(DualConfig, network)
    return _built(config, config.model, weights, dual_inputs(config.model).pixels)


def _align(weights: State, about: Mapping[str, Any], name: str | None) -> Opened:
    """A run of ours, or the layout of transformers' AlignModel, whose folder tells the pixels."""
    pixels = {}
    if "network" in about:
        config = from_saved(DualConfig, about["network"])
    else:
        described = about.get("config.json", {})
        images = about.get("preprocessor_config.json", {})
        check_described(described)
        side = described.get("vision_config", {}).get("image_size", COYO_ALIGN_SIDE)
        config = align_config(weights, crop_side(images, side))
        large = round(config.image_size * ALIGN_MARGIN)
        pixels = processor_pixels(images, config.image_size, large)
    check_same(name, config)
    pixels = Pixels(config.image_size, "bilinear", *HALF)._replace(**pixels)
    return _built(config, config.model, weights, pixels, NOT_LOADED)


def check_same(name: str | None, config: DualConfig) -> None:
    """UserError where the user names another model than the checkpoint's."""
    if name not in (None, config.model):
        raise UnfitWeights(
            f"--model {name}, but the checkpoint is a {config.model}: leave --model out"
        )


def embedding_model(name: str) -> str:
    """The model string of the smallest network with the same embeddings."""
    base, backbone, *head = name.split("_")
    if base == "SIMCLR":
        raise UserError(f"{name}: SimCLR has no text encoder; evaluate it with eval_knn.py")
    return "_".join(
        ["CLIP", backbone] if not head else [base, backbone, EMBEDS.get(head[0], head[0])]
    )


def config_of_shapes(weights: State, name: str) -> DualConfig:
    """The configuration of a bare state dict of clip-rocket or SLIP, whose text transformer has 8
    heads of 64."""
    context, width = weights["positional_embedding"].shape
    if width != 512:
        raise UnfitWeights(
            f"weights alone do not tell the number of heads of a text transformer of width {width}: keep the "
            "run's config.yaml beside the file"
        )
    values: dict[str, Any] = {
        "context_length": context,
        "vocab_size": len(weights["token_embedding.weight"]),
    }
    values["transformer_layers"] = count(weights, r"transformer\.resblocks\.(\d+)\.")
    if "image_projection" in weights:
        values["embed_dim"] = weights["image_projection"].shape[1]
    for prefix, kind, hidden in (
        ("image_projector", "clip_proj_type", "clip_hidden_dim"),
        ("l2l_image_projector", "cl2l_img_proj_type", "cl2l_hidden_dim"),
        ("l2l_text_projector", "cl2l_txt_proj_type", "cl2l_hidden_dim"),
    ):
        if f"{prefix}.layer1.weight" in weights:
            values |= {kind: "mlp", hidden: len(weights[f"{prefix}.layer1.weight"])}
            values["embed_dim"] = len(weights[f"{prefix}.layer3.weight"])
        elif f"{prefix}.weight" in weights:
            values |= {kind: "linear", "embed_dim": len(weights[f"{prefix}.weight"])}
    values["separate_proj"] = "l2l_logit_scale" in weights
    if "visual.pos_embed" in weights:
        grid = round((weights["visual.pos_embed"].shape[1] - 1) ** 0.5)
        values["image_size"] = grid * weights["visual.patch_embed.proj.weight"].shape[-1]
    return DualConfig(model=name, **values)


# ---- OpenAI, open_clip, Hugging Face


def _openai(
    weights: State, about: Mapping[str, Any], name: str | None, stated: Mapping[str, Any]
) -> Opened:
    described = about.get("open_clip_config.json", {})
    if "network" in about:  # a run of main.py
        name = name or about["network"]["model"]
        stated = {"mean": OPENAI[0], "std": OPENAI[1]} | dict(stated)
    activation = _activation(weights, about, name)
    pixels = dict(described.get("preprocess_cfg", {}))
    settings = described.get("model_cfg", {})
    check_open_clip(settings, pixels)
    model = load_openai(dict(weights), activation)
    check_open_clip_heads(settings, model.config)
    if not (described or stated or is_openais(weights, about)):
        pixels = named_pixels(name)
    return _opened(model, f"CLIP of OpenAI's layout, {activation}", pixels | stated, name)


def named_pixels(name: str | None) -> dict[str, Any]:
    """Mean and std of the pixels of a bare file, by its model's name: OpenAI's spelling (ViT-B/32)
    stands for OpenAI's; in open_clip's the published weights of that name must agree. Else
    UserError."""
    if name is not None and "/" in name:
        return {}
    import open_clip

    model = (name or "").removesuffix("-quickgelu")
    found = set()
    for tag in open_clip.list_pretrained_tags_by_model(model):
        given = open_clip.get_pretrained_cfg(model, tag)
        found.add((tuple(given.get("mean") or OPENAI[0]), tuple(given.get("std") or OPENAI[1])))
    if len(found) == 1:
        mean, std = found.pop()
        return {"mean": mean, "std": std}
    raise UnfitWeights(
        "these weights do not tell mean and std of their pixels: state them, such as --mean 0.5 0.5 "
        "0.5 --std 0.5 0.5 0.5, or name the weights, such as --model open_clip/ViT-L-14:TAG, or keep "
        "open_clip_config.json (of Hugging Face: preprocessor_config.json) beside the file"
    )


def _activation(weights: State, about: Mapping[str, Any], name: str | None) -> str:
    """Of OpenAI's networks, by their files or else by the model's name."""
    if stated := stated_activation(weights, about):
        return stated
    if name is None or "_" in name:
        raise UnfitWeights(
            "these weights do not tell their activation: add --model ViT-B/32 (OpenAI's spelling: quick_gelu), "
            "ViT-B-32-quickgelu (the same) or ViT-B-32 (open_clip's without -quickgelu: gelu), or keep "
            "open_clip_config.json beside the file"
        )
    return "quick_gelu" if "/" in name or name.endswith("-quickgelu") else "gelu"


def _hugging_face(
    weights: State, about: Mapping[str, Any], name: str | None, stated: Mapping[str, Any]
) -> Opened:
    described = about.get("config.json", {})
    images = about.get("preprocessor_config.json", {})
    if name is None and not described:
        raise UnfitWeights(
            "a Hugging Face CLIP without its config.json: keep it beside the weights, or add --model ViT-B/32"
        )
    activation = clip_activation(described) or _activation({}, {}, name)
    state = from_hugging_face(weights)
    check_clip_described(described, openai_config(state))
    model = load_openai(state, activation)
    pixels = processor_pixels(images, model.config.image_size)
    if not images and not stated:
        pixels = named_pixels(name)
    pixels = pixels | stated
    return _opened(model, f"CLIP of Hugging Face's layout, {activation}", pixels, name)


def clip_activation(described: Mapping[str, Any]) -> str | None:
    """quick_gelu or another, by config.json of transformers' CLIP, which leaves out what is at its
    default; None where it is no CLIP's."""
    text = described.get("text_config")
    return None if text is None else text.get("hidden_act", "quick_gelu")


def text_heads(settings: Mapping[str, Any]) -> int | None:
    """Attention heads of open_clip's text transformer; None where no configuration tells them."""
    text = settings.get("text_cfg")
    return text.get("heads", 8) if text else None


def check_open_clip_heads(settings: Mapping[str, Any], shape: OpenAIConfig) -> None:
    """UserError where open_clip_config.json states other attention heads than OpenAI's towers of
    this shape have."""
    width, given = shape.text.width, text_heads(settings)
    if given not in (None, shape.text.heads):
        raise UnfitWeights(
            f"open_clip_config.json: a text transformer of width {width} with {given} heads is not "
            f"supported; {OPEN_CLIP_FOLDER}"
        )
    vision = settings.get("vision_cfg")
    width, given = shape.vision_width, vision.get("head_width", 64) if vision else None
    if given and not shape.is_resnet and given * shape.vision_heads != width:
        raise UnfitWeights(
            f"open_clip_config.json: a vision transformer of width {width} with heads of {given} is "
            f"not supported; {OPEN_CLIP_FOLDER}"
        )


def check_timm_pool(settings: Mapping[str, Any], backbone: str) -> None:
    """UserError where open_clip pools otherwise than our backbone."""
    pool = "token" if backbone.startswith("VIT") else "avg"
    vision = {"timm_pool": "avg", **settings.get("vision_cfg", {})}  # open_clip's default
    where = "open_clip_config.json, vision_cfg"
    check_stated(where, vision, {"timm_pool": (pool, "")}, OPEN_CLIP_FOLDER)


def check_clip_described(described: Mapping[str, Any], shape: OpenAIConfig) -> None:
    """UserError where config.json of transformers' CLIP describes another network than OpenAI's of
    this shape, such as MetaCLIP 2, whose weights are called the same and whose texts end with
    another id."""
    if not described:
        return
    check_stated("config.json", described, {"model_type": ("clip",)}, OPEN_FOLDER)
    vocabulary = shape.text.vocab_size
    text = {"num_attention_heads": 8} | described.get("text_config", {})
    computed = {
        "hidden_act": ("quick_gelu", "gelu"),
        "layer_norm_eps": (1e-5,),
        "num_attention_heads": (text.get("hidden_size", 512) // 64,),
        "intermediate_size": (4 * text.get("hidden_size", 512),),
        "eos_token_id": (2, vocabulary - 1),  # 2: of old files, whose largest id ends the text
    }
    check_stated("config.json, text_config", text, computed, OPEN_FOLDER)
    defaults = {"hidden_act": "quick_gelu", "num_attention_heads": 12}
    vision = defaults | described.get("vision_config", {})
    computed = {
        "hidden_act": (text.get("hidden_act", "quick_gelu"),),
        "num_attention_heads": (shape.vision_heads,),
        "layer_norm_eps": (1e-5,),
        "intermediate_size": (4 * vision.get("hidden_size", 768),),  # not of ViT-g and ViT-bigG
    }
    check_stated("config.json, vision_config", vision, computed, OPEN_FOLDER)


def _opened(model: OpenAICLIP, title: str, pixels: Mapping[str, Any], name: str | None) -> Opened:
    config = model.config
    if name is not None:
        named = openai_model(name.removesuffix("-quickgelu"))
        if named.vision_layers != config.vision_layers:
            raise UnfitWeights(
                f"--model {name}, but the checkpoint is another network: leave --model out or name "
                "the right one"
            )
    text = config.text
    known = _pixels(config.image_size, pixels)
    return Opened(model.eval(), title, known, text.context_length, text.vocab_size)


def _pixels(side: int, stated: Mapping[str, Any]) -> Pixels:
    """How images enter; what no file states is as in OpenAI's CLIP."""
    mean = stated.get("mean") or OPENAI[0]
    std = stated.get("std") or OPENAI[1]
    return Pixels(side, stated.get("interpolation") or "bicubic", tuple(mean), tuple(std))


def _timm_open_clip(
    weights: State, about: Mapping[str, Any], name: str | None, stated: Mapping[str, Any]
) -> Opened:
    """open_clip's models with a timm tower, as far as our backbones go (our own exports among
    them)."""
    described = about.get("open_clip_config.json", {})
    settings = described.get("model_cfg", {})
    pixels = dict(described.get("preprocess_cfg", {})) | stated
    check_open_clip(settings, pixels)
    if not described and not stated:
        pixels = named_pixels(None)
    timm_name = settings.get("vision_cfg", {}).get("timm_model_name")
    backbone = next((ours for ours, theirs in TIMM_NAMES.items() if theirs == timm_name), None)
    if name is None and backbone is None:
        raise UnfitWeights(
            f"an open_clip model with the timm tower {timm_name or '(unknown)'}: keep open_clip_config.json beside "
            f"the file, or add --model CLIP_<{'|'.join(TIMM_NAMES)}>_<CLIP|SIGLIP>; others are not supported"
        )
    if backbone is not None:
        check_timm_pool(settings, backbone)
    name = name or f"CLIP_{backbone}_{'SIGLIP' if 'logit_bias' in weights else 'CLIP'}"
    text = text_at_root(weights)
    context, width = text["positional_embedding"].shape
    config = DualConfig(
        model=name,
        image_size=settings.get("vision_cfg", {}).get("image_size", 224),
        embed_dim=text["text_projection"].shape[1],
        context_length=context,
        vocab_size=len(text["token_embedding.weight"]),
        text_width=width,
        text_heads=text_heads(settings) or width // 64,
        transformer_layers=count(text, r"transformer\.resblocks\.(\d+)\."),
        text_activation="quick_gelu" if settings.get("quick_gelu") else "gelu",
    )
    model = build_dual(config)
    load_timm_open_clip(model, dict(weights))
    known = _pixels(config.image_size, pixels)
    return Opened(model.eval(), f"{name} of open_clip's layout", known, context, config.vocab_size)
