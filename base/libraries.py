"""Models of installed libraries by name, opened in one way: what enters them, their networks and
tokenizers.

    open_clip/NAME[:TAG], open_clip/local-dir:FOLDER     open_clip
    hf/NAME of the hub, hf/FOLDER                        transformers
    timm/NAME                                            timm
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.hub import from_hub
from base.names import did_you_mean, nearest, some
from base.pixels import RESAMPLING, Pixels, crop_side, processor_statistics

LIBRARIES = ("open_clip", "timm", "hf")
ELSEWHERE = ("hf-hub:", "local-dir:")  # open_clip's names of folders with configuration and weights
TRAINED = ("clip", "metaclip_2", "siglip", "align")  # transformers' model_type, for main.py
# in the names of tables of relative positions, which are no matrices: Swin's and BEiT's
# relative_position_bias_table, LeViT's attention_biases, T5's relative_attention_bias; MViT's and
# SAM's rel_pos_h
POSITION_TABLES = ("bias", "rel_pos_")
ALIGN_TOKENS = 64  # of the longest text that ALIGN was trained with
BESIDE_PAIRS = {  # why main.py does not train what transformers and open_clip call so
    "blip": "learns from image-text matching and captioning as well; evaluate it with "
    "eval_zeroshot.py, or train a fusion model with Pretrain.py",
    "siglip2": "takes images of any shape (NaFlex); evaluate it with eval_zeroshot.py, or train a "
    "SigLIP 2 of fixed size, such as hf/google/siglip2-base-patch16-224",
    "CoCa": "learns from captioning as well; evaluate it with eval_zeroshot.py, or train a CLIP, "
    "such as open_clip/ViT-B-32:laion2b_s34b_b79k",
}


class DualInputs(NamedTuple):
    """What enters a library's dual encoder: the centre after the resize of the shorter side to
    `resized` pixels; squeeze: of both sides."""

    pixels: Pixels
    resized: int
    squeeze: bool
    context_length: int
    vocab_size: int


def of_library(name: str | None) -> bool:
    """Whether a model's name asks for a library: open_clip/…, timm/… or hf/…"""
    return name is not None and name.partition("/")[0] in LIBRARIES and "/" in name


def hint_of(library: str, name: str, known: list[str]) -> str:
    """`; did you mean open_clip/ViT-B-32?` of what is nearest, or nothing."""
    found = nearest(name, known, 0.3)
    return f"; did you mean {library}/{found}?" if found else ""


@cache
def dual_inputs(model: str) -> DualInputs:
    """Inputs of the dual encoder `open_clip/…` or `hf/…`, without its weights. UserError."""
    library, _, name = model.partition("/")
    if library == "open_clip":
        return _open_clip_inputs(name)
    if library == "hf":
        return _hugging_face_inputs(name)
    raise UserError(
        f"model {model}: timm's networks have no text encoder; use --image-tower {model} with a "
        "*_CLIP or *_SIGLIP"
    )


def dual_network(model: str, weights: bool) -> nn.Module:
    """The library's network in float32, with its published weights or random ones. UserError."""
    library, _, name = model.partition("/")
    if library == "open_clip":
        return open_clip_network(name, weights=weights)
    return _hugging_face_pair(name, weights)


# ---- transformers
def hugging_face_config(source: str, remedy: str = "", what: str = ""):
    """transformers' configuration in a folder or of a name of the hub. UserError; what: the option
    that names it; remedy: what else a user can do without a network."""
    import transformers

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(
            f"{what}hf/{source}: the folder has no config.json; name the one that has it"
        )
    with from_hub(f"{what}hf/{source}", source, remedy):
        return transformers.AutoConfig.from_pretrained(source)


def hugging_face_tokenizer(source: str):
    """transformers' tokenizer in a folder or of a name of the hub. UserError."""
    import transformers

    with from_hub(f"the tokenizer of hf/{source}", source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up where the files are missing
        raise UserError(
            f"hf/{source}: its tokenizer has no words; put tokenizer.json, or vocab.txt, beside "
            "config.json"
        )
    return tokenizer


def hugging_face_processor(source: str):
    """transformers' image processor in a folder or of a name of the hub. UserError."""
    import transformers

    with from_hub(f"the image processor of hf/{source}", source):
        return transformers.AutoImageProcessor.from_pretrained(source)


def _hugging_face_inputs(source: str) -> DualInputs:
    config = hugging_face_config(source)
    kind = config.model_type
    if kind not in TRAINED:
        trained = f"of transformers' dual encoders main.py trains {', '.join(TRAINED)}"
        raise UserError(f"hf/{source}: {kind} {BESIDE_PAIRS.get(kind, f'is unknown; {trained}')}")
    images = hugging_face_processor(source).to_dict()
    side = config.vision_config.image_size
    statistics = processor_statistics(images)
    size = images.get("size") or {}
    squeeze = "height" in size
    resized = size.get("height") if squeeze else size.get("shortest_edge")
    cut = crop_side(images, resized) if images.get("do_center_crop") else resized
    if kind == "align":  # convolutions take images of any size
        side = cut
    interpolation = RESAMPLING.get(images.get("resample"))
    if statistics is None or interpolation is None or cut != side:
        raise UserError(
            f"hf/{source}: preprocessor_config.json resizes images to {resized} by filter "
            f"{images.get('resample')} and cuts {cut}, which main.py does not for images of {side} "
            "pixels"
        )
    text = config.text_config
    context = text.max_position_embeddings
    if kind == "align":
        context = min(context, ALIGN_TOKENS)
    pixels = Pixels(side, interpolation, *statistics)
    return DualInputs(pixels, resized, squeeze, context, text.vocab_size)


def _hugging_face_pair(source: str, weights: bool) -> nn.Module:
    import transformers

    config = hugging_face_config(source)
    if not weights:
        return transformers.AutoModel.from_config(config).float()
    with from_hub(f"the weights of hf/{source}", source):
        return transformers.AutoModel.from_pretrained(source, config=config).float()


# ---- open_clip
def open_clip_network(name: str, weights: bool, remedy: str = "") -> nn.Module:
    """open_clip's network by `NAME[:TAG]`, `hf-hub:…` or `local-dir:FOLDER`, with the published
    weights or random ones. UserError; remedy: what else a user can do without a network."""
    import open_clip

    title, (name, tag) = f"open_clip/{name}", name_and_tag(name)
    elsewhere = name.startswith(ELSEWHERE)
    if not elsewhere:
        check_open_clip(name, tag, not weights)
    look = None if elsewhere else open_clip_pixels(name, tag)
    pretrained = tag if weights else None
    with from_hub(title, open_clip_source(name, pretrained), remedy):
        return open_clip.create_model(
            name,
            pretrained=pretrained,
            device=torch.empty(0).device,  # meta, where only sizes count
            load_weights=weights,
            pretrained_text=False,
            force_quick_gelu=not elsewhere and quick_gelu(name, tag),
            force_preprocess_cfg=look,
            require_pretrained=bool(pretrained),
        )


def open_clip_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer of `NAME[:TAG]`, …: texts -> int64 [B,L] of the whole context. UserError."""
    import open_clip

    title = f"open_clip/{name}"
    name = name_and_tag(name)[0]
    with from_hub(f"the tokenizer of {title}", tokenizer_source(name)):
        return open_clip.get_tokenizer(name)


def open_clip_inputs(network: nn.Module) -> DualInputs:
    """What enters open_clip's network."""
    import open_clip

    look = open_clip.model.get_model_preprocess_cfg(network)
    side = look["size"] if isinstance(look["size"], int) else look["size"][0]
    pixels = Pixels(side, look["interpolation"], tuple(look["mean"]), tuple(look["std"]))
    text = getattr(network, "text", network)
    vocabulary = getattr(network, "vocab_size", 0) or getattr(text, "vocab_size", 0)
    context = getattr(network, "context_length", 0) or getattr(text, "context_length", 0)
    return DualInputs(pixels, side, look.get("resize_mode") == "squash", context, vocabulary)


def _open_clip_inputs(name: str) -> DualInputs:
    import open_clip

    with torch.device("meta"):
        network = open_clip_network(name, weights=False)
    kind = type(network).__name__
    if not isinstance(network, open_clip.CLIP | open_clip.CustomTextCLIP):
        raise UserError(
            f"open_clip/{name}: {kind} {BESIDE_PAIRS.get(kind, 'is unknown; main.py trains CLIP')}"
        )
    return open_clip_inputs(network)


def name_and_tag(name: str) -> tuple[str, str | None]:
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    name, _, tag = name.partition(":")
    return name.replace("/", "-"), tag or None


def check_open_clip(name: str, tag: str | None, has_weights: bool) -> None:
    """UserError for an unknown architecture or tag, or where no weights are named."""
    import open_clip

    if name not in open_clip.list_models():
        hint = hint_of("open_clip", name, open_clip.list_models())
        raise UserError(f"open_clip has no model {name!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag is not None and open_clip.get_pretrained_cfg(name, tag) in (None, {}):
        hint = did_you_mean(tag, tags, 0.3)
        listed = some(tags) or "none"
        raise UserError(f"open_clip/{name} has no weights {tag!r}{hint}; there are: {listed}")
    if tag is None and not has_weights:
        listed = f" such as open_clip/{name}:{tags[0]} (of {some(tags)})" if tags else ""
        raise UserError(
            f"open_clip/{name}: name its weights{listed}, or add --checkpoint FILE or "
            "--random-weights"
        )


def quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the network or its weights want QuickGELU: where the two differ, open_clip warns and
    computes the exact GELU."""
    import open_clip

    built = bool(open_clip.get_model_config(name).get("quick_gelu"))
    return built or bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))


def open_clip_pixels(name: str, tag: str | None) -> dict[str, Any] | None:
    """Mean, std and resize of the weights `tag`; without a tag those that all tags agree on."""
    import open_clip

    names = ("mean", "std", "interpolation", "resize_mode")
    looks = []
    for each in [tag] if tag else open_clip.list_pretrained_tags_by_model(name):
        given = open_clip.get_pretrained_cfg(name, each)
        look = {key: given[key] for key in names if given.get(key)}
        if look not in looks:
            looks.append(look)
    if len(looks) > 1:
        tags = some(open_clip.list_pretrained_tags_by_model(name))
        raise UserError(
            f"open_clip/{name}: its weights differ in mean and std of the pixels; name those whose "
            f"transform is meant as open_clip/{name}:TAG, TAG of {tags}"
        )
    return looks[0] if looks else None


def open_clip_source(name: str, tag: str | None) -> str | None:
    """The name of the hub that open_clip loads weights from; None where they lie elsewhere."""
    import open_clip

    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    if tag is None or name.startswith("local-dir:"):
        return None
    user, _, file = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").partition("/")
    return f"{user}/{file.partition('/')[0]}" if user else None


def tokenizer_source(name: str) -> str | None:
    """The name of the hub that open_clip loads its tokenizer from, where that is not CLIP's own."""
    import open_clip

    if name.startswith(("hf-hub:", "local-dir:")):
        return open_clip_source(name, None)
    text = open_clip.get_model_config(name).get("text_cfg", {})
    return text.get("hf_tokenizer_name")


# ---- timm
def timm_network(name: str, what: str = "", pretrained: bool = False, remedy: str = "", **options):
    """timm's network `name`, with the weights that timm fetches or random ones.

    what: the option that names it, for messages; options: of `timm.create_model`. UserError for an
    unknown name, with the nearest, and for weights that cannot be had.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        hint = hint_of("timm", name, timm.list_models())
        where = f"{what}timm/{name}: " if what else ""
        raise UserError(f"{where}timm has no model {name!r}{hint}")
    with from_hub(f"{what}timm/{name}", timm_source(name) if pretrained else None, remedy):
        return timm.create_model(name, pretrained=pretrained, **options)


def timm_source(name: str) -> str | None:
    """The name of the hub from which timm fetches a model's weights; None where it has another
    address, or none."""
    import timm

    return (timm.get_pretrained_cfg(name, allow_unregistered=True) or {}).hf_hub_id


def without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that timm's networks in `model` list as free of weight decay: their
    tokens, tables and small networks of positions."""
    found = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            listed = set(module.no_weight_decay())
            found |= {f"{prefix}.{name}".lstrip(".") for name in listed}
    return found
