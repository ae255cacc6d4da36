"""Weights of any layout into a freshly built dual encoder, to train it further.

    start_dual(build_dual(config), file, read_weights, description_of)  # ViT-B-32.pt: --model ViT-B/32

Ours and CLIP-rocket's, OpenAI's, open_clip's and Hugging Face's CLIP and SigLIP. Position
embeddings are resized to the model's images, but for a library's models.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from base.distributed import say
from base.errors import UnfitWeights
from base.pixels import IMAGENET, OPENAI, RGB, processor_statistics
from base.torch_files import unwrap_names
from models.dual_encoder.base import NOT_LOADED, DualEncoder
from models.dual_encoder.config import DualConfig
from models.dual_encoder.library import LibraryCLIP
from models.dual_encoder.openai import OpenAICLIP
from models.layers.library_towers import TimmTower
from models.layers.openai_towers import OPENAI_MODELS, OpenAIConfig, openai_model
from models.layers.positions import resize_positions
from models.weights.align import check_described
from models.weights.any_dual_encoder import (
    check_clip_described,
    check_open_clip_heads,
    check_timm_pool,
    clip_activation,
    text_heads,
)
from models.weights.clip import (
    NOT_WEIGHTS,
    State,
    float_weights,
    from_hugging_face,
    load_timm_open_clip,
    openai_config,
    stated_activation,
    text_at_root,
)
from models.weights.loading import load_checkpoint
from models.weights.stated import check_open_clip
from models.weights.torchscript import weights_and_about

IMAGE_HEADS = ("visual.proj", "visual.attnpool.c_proj.weight")  # only OpenAI's layout has them
LIBRARY_NETWORK = "network."  # where LibraryCLIP holds it
POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")


def start_dual(
    model: DualEncoder,
    path: Path,
    read: Callable[[Path], State],
    describe: Callable[[Path], Mapping[str, Any]],
    evaluates: bool = False,
) -> None:
    """Load all weights of a file or folder. read, describe: `runtime.checkpoint.read_weights` and
    `runtime.config.from_checkpoint.description_of`. UserError for another architecture or
    activation, which it names; other pixels are one if it `evaluates`, else a note, as training
    adapts to them."""
    load_any_layout(model, *weights_and_about(path, read, describe), evaluates)


def load_any_layout(
    model: DualEncoder, state: State, about: Mapping[str, Any], evaluates: bool = False
) -> None:
    """The same of a state dict and what lies beside it."""
    state = unwrap_names(state)
    if isinstance(model, LibraryCLIP):
        return load_library_names(model, state)
    check_layout(state)
    described = about.get("config.json", {})
    activation = stated_activation(state, about) or clip_activation(described)
    if "vision_model.embeddings.patch_embedding.weight" in state:
        state = from_hugging_face(state)
        check_clip_described(described, openai_config(state))
    if "vision_model.embeddings.convolution.weight" in state:
        check_described(described)
    plain = text_at_root(state)
    is_openai = any(name in plain for name in IMAGE_HEADS) and "text_projection" in plain
    if is_openai != isinstance(model, OpenAICLIP):
        raise UnfitWeights(mismatch(model, plain if is_openai else None))
    if is_openai:
        if activation not in (None, model.config.text.activation):
            raise UnfitWeights(
                f"--model {model.options.model} computes {model.config.text.activation}, but the "
                f"checkpoint was trained with {activation}; {mismatch(model, plain)}"
            )
        settings = about.get("open_clip_config.json", {}).get("model_cfg", {})
        check_open_clip(settings, {})
        check_open_clip_heads(settings, openai_config(plain))
        check_pixels(about, OPENAI, evaluates)
        return load_openai_names(model, plain)
    of_timm = any(name.startswith("visual.trunk.") for name in state)
    if of_timm and not isinstance(model.visual, TimmTower):
        check_beside_timm(about.get("open_clip_config.json", {}).get("model_cfg", {}), model.config)
        check_pixels(about, IMAGENET, evaluates)
        return load_timm_open_clip(model, state)
    load_checkpoint(model, state, allowed_unexpected=NOT_LOADED)
    return None


def check_beside_timm(settings: Mapping[str, Any], ours: DualConfig) -> None:
    """UserError where open_clip_config.json (model_cfg) describes another network on a timm tower than
    `ours`, whose weights have the same shapes."""
    if not settings:
        return
    check_open_clip(settings, {})
    check_timm_pool(settings, ours.model.split("_")[1])
    trained = {
        "text_activation": "quick_gelu" if settings.get("quick_gelu") else "gelu",
        "text_heads": text_heads(settings),
    }
    for name, value in trained.items():
        if value not in (None, getattr(ours, name)):
            option = f"--{name.replace('_', '-')} {value}"
            raise UnfitWeights(
                f"open_clip_config.json: these weights are of {name} {value}: add {option}"
            )


def check_pixels(about: Mapping[str, Any], ours: tuple[RGB, RGB], evaluates: bool) -> None:
    """Say where the files beside the weights state another mean and std of the pixels than `ours`, by
    which main.py normalises; UserError if it `evaluates`."""
    given = processor_statistics(about.get("preprocessor_config.json", {}))
    stated = about.get("open_clip_config.json", {}).get("preprocess_cfg", {})
    if stated.get("mean") and stated.get("std"):
        given = tuple(stated["mean"]), tuple(stated["std"])
    if given is None or torch.allclose(torch.tensor(given), torch.tensor(ours), atol=1e-3):
        return
    what = (
        f"these weights know pixels of mean {given[0]} and std {given[1]}, not {ours[0]}, {ours[1]}"
    )
    if evaluates:
        raise UnfitWeights(f"{what}: evaluate them with eval_zeroshot.py")
    say(f"note: {what}, by which images are normalised here")


def check_layout(state: State) -> None:
    """UserError for dual encoders that are not built here, by name."""
    names = list(state)
    heads = ("vision_model.head.", "visual.attn_pool.", "visual.trunk.attn_pool.")
    if any(name.startswith(heads) for name in names):
        raise UnfitWeights(
            "weights of SigLIP: name the library's model that they are of, such as --model "
            "hf/FOLDER or --model open_clip/ViT-B-16-SigLIP --checkpoint FILE, or train a *_SIGLIP "
            "from its image tower: --image-tower timm/vit_base_patch16_siglip_224:FILE"
        )


def load_library_names(model: LibraryCLIP, state: State) -> None:
    """A run's own names, or the library's. UserError for another architecture."""
    if not any(name.startswith(LIBRARY_NETWORK) for name in state):
        own = model.network.state_dict()
        of_root = "positional_embedding" in state and "positional_embedding" not in own
        if of_root:  # open_clip's models of one part
            from open_clip.model import convert_to_custom_text_state_dict

            state = convert_to_custom_text_state_dict(dict(state))
        kept = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
        for name in ("logit_scale", "logit_bias"):
            if name in kept and name in own:
                kept[name] = kept[name].reshape(own[name].shape)
        state = {f"{LIBRARY_NETWORK}{name}": value for name, value in kept.items()}
    load_checkpoint(model, state, allowed_unexpected=NOT_LOADED)


def load_openai_names(model: OpenAICLIP, state: State) -> None:
    """OpenAI's names, in any precision, with positions of any grid."""
    own = model.state_dict()
    kept = float_weights(state)
    for name, value in kept.items():
        if name == "positional_embedding":  # a causal text tower reads the first ones alone
            value = value[: len(own[name])]
        if name in POSITIONS and name in own and value.shape != own[name].shape:
            value = resize_positions(value[None], math.isqrt(len(own[name]) - 1))[0]
        kept[name] = value
    given = openai_model(model.options.model.removesuffix("-quickgelu"))
    if towers(given) != towers(openai_config(state)):
        raise UnfitWeights(mismatch(model, state))
    load_checkpoint(model, kept)


def towers(shape: OpenAIConfig) -> tuple:
    """What tells OpenAI's models apart."""
    return shape.vision_layers, shape.vision_width, shape.patch_size


def mismatch(model: DualEncoder, openai: State | None) -> str:
    """What the weights are, and which --model they are for. openai: theirs, of OpenAI's layout."""
    given = getattr(model.options, "model", type(model).__name__)
    if openai is None:
        return f"--model {given}, but the checkpoint is not of OpenAI's CLIP: name the model that it is of"
    shape = openai_config(openai)
    same = [name for name, known in OPENAI_MODELS.items() if towers(known) == towers(shape)]
    sizes = f"CLIP of OpenAI's layout, {shape.vision_layers} layers of width {shape.vision_width}"
    names = (
        f"use --model {same[0]}, or {same[0]}-quickgelu for OpenAI's own weights" if same else ""
    )
    return f"--model {given}, but the checkpoint is a {sizes}; {names or 'evaluate it instead'}"
