"""Models of installed libraries for evaluation: open_clip, timm, Hugging Face transformers.

    opened = open_library("open_clip/ViT-B-16-SigLIP:webli")         # a dual encoder: Opened
    opened = open_library("hf/google/siglip2-base-patch16-224")      # a name of the hub, or a folder
    encoder = library_encoder("timm/vit_small_patch16_224.dino")     # ImageEncoder

Model, tokenizer and image transform are the library's; data, prompts and evaluation are ours.
Weights come from the library's own cache (HF_HUB_OFFLINE is respected), from a file, or are random.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.hub import from_hub
from base.libraries import (
    ALIGN_TOKENS,
    hugging_face_config,
    hugging_face_processor,
    hugging_face_tokenizer,
    open_clip_inputs,
    open_clip_network,
    open_clip_tokenizer,
    timm_network,
)
from base.pixels import Pixels, middle
from models.layers.library_towers import with_timm_names
from models.weights.any_dual_encoder import Opened
from models.weights.image_encoder import TOWER, ImageEncoder
from models.weights.loading import State, load_checkpoint
from models.weights.vit import backbone
from models.weights.vit_facts import VitFacts

CLASS_TOKEN = (  # types of transformers whose first token stands for the image
    "vit",
    "vit_msn",
    "deit",
    "beit",
    "data2vec-vision",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
)
OTHER_WEIGHTS = ", or name --checkpoint FILE, or add --random-weights"


def open_library(name: str, checkpoint: Path | None = None, random_weights: bool = False) -> Opened:
    """A dual encoder of open_clip or transformers by `open_clip/NAME[:TAG]` or `hf/NAME-or-folder`.

    checkpoint: file of weights for open_clip's architecture. random_weights: build the network
    alone. Raises UserError: unknown name (nearest named), no network, an image encoder without text.
    """
    library, _, rest = name.partition("/")
    if library == "open_clip":
        return _open_clip(rest, checkpoint, random_weights)
    if library == "hf":
        _check_no_file(checkpoint)
        return _hugging_face_dual(rest, random_weights)
    raise UserError(f"{name}: timm's networks have no text encoder; evaluate it with eval_knn.py")


def library_encoder(
    name: str,
    checkpoint: Path | None = None,
    weights: State | None = None,
    random_weights: bool = False,
    stated: VitFacts = VitFacts(),  # noqa: B008 a constant
) -> ImageEncoder:
    """The image encoder of a library's model; of a dual encoder the image tower with projection.

    checkpoint, random_weights: see `open_library`; weights, stated: see `timm_encoder`. Without any
    of them the library's own weights.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        published = weights is None and not random_weights
        return timm_encoder(rest, weights, published, stated=stated, remedy=OTHER_WEIGHTS)
    if library == "hf":
        _check_no_file(checkpoint)
        encoder = _hugging_face_image(rest, random_weights)
        if encoder is not None:
            return encoder
    opened = open_library(name, checkpoint, random_weights)

    def outputs(image: Tensor) -> dict[str, Tensor]:
        found = opened.model.embed_image(image)["z"]
        return {TOWER: found, "z": found}

    return ImageEncoder(
        opened.model, outputs, "library", opened.pixels, opened.title, view=opened.view
    )


class LibraryDual(nn.Module):
    """A library's dual encoder with the methods of ours.

    image: float32 as the view makes it -> [B,D]. text: int64 as the tokenizer makes it -> [B,D].
    """

    def __init__(self, network: nn.Module, image: Callable, text: Callable, config: object):
        super().__init__()
        self.network = network
        self.image = image
        self.text = text
        self.config = config

    def embed_image(self, image: Tensor) -> dict[str, Tensor]:
        return {"z": self.image(image)}

    def embed_text(self, text_ids: Tensor) -> dict[str, Tensor]:
        return {"z": self.text(text_ids)}


class OnImage:
    """A library's transform as a view: uint8 [3,H,W] -> float32, normalised. cuts: it ends in a
    centre crop, for which the `middle` of a thin image is enough."""

    def __init__(self, transform: Callable, cuts: bool):
        self.transform = transform
        self.cuts = cuts

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import to_pil_image

        return self.transform(to_pil_image(middle(image) if self.cuts else image))

    def __repr__(self) -> str:
        return repr(self.transform)


# ---------------------------------------------------------------------------------------- open_clip
def _open_clip(name: str, checkpoint: Path | None, random_weights: bool) -> Opened:
    import open_clip

    title = f"open_clip/{name}"
    published = not (checkpoint or random_weights)
    network = open_clip_network(name, published, OTHER_WEIGHTS)
    if checkpoint:
        with from_hub(f"{checkpoint} in {title}"):
            open_clip.factory.load_checkpoint(network, str(checkpoint))
    return opened_open_clip(network.eval(), open_clip_tokenizer(name), title)


def opened_open_clip(network: nn.Module, tokenizer: Callable, title: str) -> Opened:
    """open_clip's network with its transform and tokenizer."""
    import open_clip

    look = open_clip.model.get_model_preprocess_cfg(network)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**look), False
    )
    inputs = open_clip_inputs(network)
    model = LibraryDual(network, network.encode_image, network.encode_text, f"{title} {look}")
    return Opened(
        model.eval(),
        title,
        inputs.pixels,
        tokenizer.context_length,
        inputs.vocab_size,
        OnImage(transform, cuts=look.get("resize_mode", "shortest") == "shortest"),
        tokenizer,
    )


# --------------------------------------------------------------------------------------------- timm
def timm_encoder(
    name: str,
    weights: State | None = None,
    pretrained: bool = False,
    described: Mapping[str, Any] | None = None,
    stated: VitFacts = VitFacts(),  # noqa: B008 a constant
    remedy: str = ", or name --checkpoint FILE",
) -> ImageEncoder:
    """A network of timm with pooled features. weights: of a file; pretrained: fetched by timm; else
    they are random. described: timm's config.json beside the weights. stated: pixels that differ
    from those of the name. remedy: of weights that cannot be had, for the message.

    Raises UserError for an unknown name, with the nearest.
    """
    import timm

    described = described or {}
    if stated.activation or stated.eps:
        raise UserError(
            f"timm/{name} has its own activation and eps: leave out --activation, --eps"
        )
    options = dict(described.get("model_args", {}), num_classes=0)
    if "pretrained_cfg" in described:
        options["pretrained_cfg_overlay"] = described["pretrained_cfg"]
    model = timm_network(name, pretrained=pretrained, remedy=remedy, **options)
    if weights is not None:
        _load_timm(model, weights)
    given = timm.data.resolve_model_data_config(model)
    pixels = Pixels(
        given["input_size"][-1],
        stated.interpolation or given["interpolation"],
        tuple(stated.mean or given["mean"]),
        tuple(stated.std or given["std"]),
    )
    resize = stated.resize or _shorter_side(f"timm/{name}", given)
    return ImageEncoder(
        model, lambda image: {TOWER: model(image)}, "timm", pixels, f"timm/{name}", resize
    )


def _shorter_side(name: str, given: Mapping[str, Any]) -> int | None:
    """To what timm resizes the shorter side before the centre crop; None where it squeezes the whole
    image to the input size. UserError for another way or filter."""
    mode, cut = given["crop_mode"], given["crop_pct"]
    if mode == "squash" and cut == 1:
        return None
    if mode != "center" or given["interpolation"] not in ("bilinear", "bicubic"):
        raise UserError(
            f"{name}: its images are resized by {given['interpolation']}, crop_mode {mode}, which no "
            "view here does; state the shorter side, such as --resize 256"
        )
    return math.floor(given["input_size"][-1] / cut)


def _load_timm(model: nn.Module, weights: State) -> None:
    """Weights of timm or of the network's own makers (CLIP, DINO, DINOv2, MoCo v3, MAE, DeiT)."""
    state = with_timm_names(model, backbone(weights), "the checkpoint")
    heads = ("head.*", "head_dist.*", "fc.*", "classifier.*", "pre_logits.*")
    load_checkpoint(model, state, allowed_unexpected=heads)


# --------------------------------------------------------------------------- transformers, from here
def _hf_network(source: str, config, kind: type, random_weights: bool, **options) -> nn.Module:
    """A network of transformers with all of its weights: UserError names those that are missing."""
    import transformers

    if random_weights:
        build = getattr(kind, "from_config", kind)
        return build(config, **options).eval()
    transformers.utils.logging.disable_progress_bar()
    with from_hub(f"hf/{source}", source, OTHER_WEIGHTS):
        network, found = kind.from_pretrained(
            source, config=config, output_loading_info=True, **options
        )
    missing = sorted(key for key in found["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        some = ", ".join(missing[:5])
        raise UserError(f"hf/{source}: its files lack {len(missing)} weights of the model: {some}")
    return network.float().eval()


class HfView:
    """transformers' image processor as a view: uint8 [3,H,W] -> float32.

    SigLIP 2 with native resolution (NaFlex) gives P patches with mask and grid: float32 [P,D+3].
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image: Tensor) -> Tensor:
        if getattr(self.processor, "do_center_crop", False):
            image = middle(image)
        found = self.processor(image, return_tensors="pt", input_data_format="channels_first")
        pixels = found["pixel_values"][0]
        if "spatial_shapes" not in found:
            return pixels
        mask = found["pixel_attention_mask"][0]
        grid = found["spatial_shapes"][0]
        beside = torch.cat([mask[:, None], grid.expand(len(mask), 2)], dim=1)
        return torch.cat([pixels, beside.to(pixels.dtype)], dim=1)

    def __repr__(self) -> str:
        return str(self.processor)


def naflex_inputs(image: Tensor) -> dict[str, Tensor]:
    """What HfView packed, float32 [B,P,D+3], as SigLIP 2 takes it."""
    return {
        "pixel_values": image[..., :-3],
        "pixel_attention_mask": image[..., -3].to(torch.int64),
        "spatial_shapes": image[:, 0, -2:].to(torch.int64),
    }


def _hf_view(source: str, config) -> tuple[HfView, Pixels]:
    processor = hugging_face_processor(source)
    view = HfView(processor)
    side = getattr(getattr(config, "vision_config", config), "image_size", 224)
    side = side if isinstance(side, int) else side[0]
    mean = tuple(getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0))
    std = tuple(getattr(processor, "image_std", None) or (1.0, 1.0, 1.0))
    return view, Pixels(side, "bicubic", mean, std)


class HfTokenizer:
    """transformers' tokenizer: texts -> ids int64 [B,L], or [B,2,L] with the attention mask.

    SigLIP's texts are padded to their full length, as in training; others to the longest.
    """

    def __init__(self, tokenizer, longest: int, pad_to_longest: bool):
        self.tokenizer = tokenizer
        self.longest = longest
        self.padding = "longest" if pad_to_longest else "max_length"

    def __call__(self, texts: list[str]) -> Tensor:
        found = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        if "attention_mask" not in found:
            return found["input_ids"]
        return torch.stack([found["input_ids"], found["attention_mask"]], 1)


def _text_inputs(text_ids: Tensor) -> dict[str, Tensor]:
    if text_ids.ndim == 2:
        return {"input_ids": text_ids}
    return {"input_ids": text_ids[:, 0], "attention_mask": text_ids[:, 1]}


def _check_no_file(checkpoint: Path | None) -> None:
    if checkpoint:
        raise UserError("hf/NAME reads the weights of its folder: leave out --checkpoint")


def _hugging_face_dual(source: str, random_weights: bool) -> Opened:
    """CLIP, SigLIP, SigLIP 2, ALIGN, BLIP (retrieval) and whatever else embeds both images and
    texts."""
    import transformers

    config = hugging_face_config(source, OTHER_WEIGHTS)
    kind = transformers.AutoModel
    text = getattr(config, "text_config", None)
    if config.model_type == "blip":
        kind = transformers.BlipForImageTextRetrieval
    network = _hf_network(source, config, kind, random_weights)
    if config.model_type == "blip":
        image, tokens = _blip_features(network)
    elif hasattr(network, "get_image_features") and hasattr(network, "get_text_features"):
        image, tokens = _features(network, config.model_type == "siglip2")
    else:
        raise UserError(
            f"hf/{source}: a {config.model_type} has no pair of image and text encoder; "
            "evaluate images alone with eval_knn.py"
        )
    view, pixels = _hf_view(source, config)
    tokenizer = hugging_face_tokenizer(source)
    longest = min(getattr(text, "max_position_embeddings", 77), tokenizer.model_max_length)
    longest = min(longest, ALIGN_TOKENS) if config.model_type == "align" else longest
    siglip = config.model_type in ("siglip", "siglip2")
    vocabulary = getattr(text, "vocab_size", len(tokenizer))
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"hf/{source}: the tokenizer makes {len(tokenizer)} tokens, but the text encoder knows "
            f"{vocabulary}; keep the tokenizer it was trained with in the folder"
        )
    model = LibraryDual(network, image, tokens, f"hf/{source} {view}")
    tokenize = HfTokenizer(tokenizer, longest, not siglip)
    return Opened(model.eval(), f"hf/{source}", pixels, longest, vocabulary, view, tokenize)


def _features(network: nn.Module, naflex: bool) -> tuple[Callable, Callable]:
    def image(pixels: Tensor) -> Tensor:
        inputs = naflex_inputs(pixels) if naflex else {"pixel_values": pixels}
        found = network.get_image_features(**inputs)
        return getattr(found, "pooler_output", found)  # a tensor before transformers 5

    def text(text_ids: Tensor) -> Tensor:
        found = network.get_text_features(**_text_inputs(text_ids))
        return getattr(found, "pooler_output", found)

    return image, text


def _blip_features(network: nn.Module) -> tuple[Callable, Callable]:
    """BLIP's contrastive heads on the class tokens."""

    def image(pixels: Tensor) -> Tensor:
        return network.vision_proj(network.vision_model(pixel_values=pixels)[0][:, 0])

    def text(text_ids: Tensor) -> Tensor:
        return network.text_proj(network.text_encoder(**_text_inputs(text_ids))[0][:, 0])

    return image, text


def _hugging_face_image(source: str, random_weights: bool) -> ImageEncoder | None:
    """An image encoder of transformers; None for a dual encoder."""
    import transformers

    config = hugging_face_config(source, OTHER_WEIGHTS)
    if hasattr(config, "text_config"):
        return None
    kind = transformers.AutoModel
    options = {}
    if config.model_type == "vit_mae":  # MAE's own model masks patches
        sizes = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        kind = transformers.ViTModel
        config = transformers.ViTConfig(**sizes)
    if config.model_type in ("vit", "deit", "beit", "data2vec-vision"):
        options["add_pooling_layer"] = False  # of another task, and often not in the files
    network = _hf_network(source, config, kind, random_weights, **options)
    view, pixels = _hf_view(source, config)

    def outputs(image: Tensor) -> dict[str, Tensor]:
        found = network(pixel_values=image)
        hidden = found.last_hidden_state
        pooled = getattr(found, "pooler_output", None)
        if config.model_type in CLASS_TOKEN:
            return {TOWER: hidden[:, 0]}
        if pooled is None:
            raise UserError(f"hf/{source}: a {config.model_type} has no pooled image features")
        return {TOWER: pooled.flatten(1)}

    return ImageEncoder(network, outputs, "library", pixels, f"hf/{source}", view=view)
