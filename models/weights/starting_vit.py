"""Weights that the ViT of SIMLA and ALBEF starts from: a file, or a model of timm or transformers.

Ours normalises images by OpenAI's mean and std, has exact GELU and eps 1e-6. Another normalisation
that is stated is folded into the patch convolution, which then computes the same; another
activation or number of heads, which the weights alone do not show, is refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.distributed import say
from base.errors import UserError, naming
from base.pixels import OPENAI, RGB
from models.classification.classifier import ClassifierConfig
from models.layers.vit import ViT
from models.weights.albef import deit_weights
from models.weights.image_encoder import ImageEncoder
from models.weights.libraries import library_encoder, timm_encoder
from models.weights.loading import from_saved, load_checkpoint
from models.weights.stated import check_stated
from models.weights.vit import native
from models.weights.vit_facts import (
    OF_TRANSFORMERS,
    VitFacts,
    known_facts,
    timm_described,
    timm_facts,
)

State = dict[str, Tensor]


def start_vision(
    vit: ViT,
    source: Path | None,
    read_weights: Callable[[Path], State],
    describe: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Load what the vision transformer starts from: the weights of its tower, or those of `source`,
    as `starting_vit` reads them. UserError."""
    if vit.config.tower:
        if source:
            raise UserError("vision_weights and vision_tower exclude each other; choose one")
        vit.patch_embed.backbone.load(read_weights)
    elif source:
        with naming("vision_weights", source):
            state = starting_vit(source, read_weights, describe, vit.config.heads, vit.config.grid)
            load_checkpoint(vit, state, allowed_missing=("mask_token",))


def starting_vit(
    source: Path,
    read_weights: Callable[[Path], State],
    describe: Callable[[Path], Mapping[str, Any]],
    heads: int,
    grid: int,
) -> State:
    """Weights under the native names, positions for grid x grid patches, without classifier; the
    caller's load reports what does not fit.

    source: a file or folder, `timm/NAME` (weights fetched), `timm/NAME:FILE`, or `hf/FOLDER` (or a
    name of the hub). read_weights, describe: `runtime.checkpoint.read_weights` and
    `runtime.config.from_checkpoint.description_of`. heads: of the network that starts. UserError.
    """
    library = str(source).partition("/")[0]
    if library not in ("timm", "hf") or source.exists():
        weights = read_weights(source)
        about = describe(source)
        state = deit_weights(native(weights), grid)
        check_described(source, about, heads)
        facts = known_facts(weights, about)  # none of a bare file, such as ALBEF's DeiT
        check_activation(source, facts.activation or "gelu")
        return state if facts.mean is None else with_pixels(source, state, facts.mean, facts.std)
    encoder = library_vit(str(source), read_weights)
    network = encoder.network
    if library == "timm":
        found = timm_facts(network)
    else:
        names = ("num_attention_heads", "hidden_act")
        found = tuple(getattr(network.config, name, None) for name in names)
    check_facts(source, *found, heads)
    state = deit_weights(native(network.state_dict()), grid)
    return with_pixels(source, state, encoder.pixels.mean, encoder.pixels.std)


def check_described(source: Path, about: Mapping[str, Any], heads: int) -> None:
    """UserError where what lies in or beside the weights, of timm, transformers or a run of
    Classification.py, describes another ViT than ours of that many heads."""
    described = about.get("config.json", {})
    if "architecture" in described:
        check_facts(source, *timm_facts(timm_described(described)), heads)
    if described.get("model_type") in OF_TRANSFORMERS:
        computed = {"num_attention_heads": (heads,), "hidden_act": ("gelu",)}
        where = f"vision_weights {source}, config.json"
        check_stated(where, described, computed, "set vision_heads, or give others")
    network = about.get("network", {})
    if str(network.get("model", "")).startswith("vit-"):
        check_heads(source, from_saved(ClassifierConfig, network).vit.heads, heads)


def check_facts(source: Path, found: int | None, activation: str | None, heads: int) -> None:
    """UserError where a network of `found` heads (None: no ViT) and that activation is another than
    ours."""
    if found is None:
        raise UserError(f"vision_weights {source}: no vision transformer")
    check_activation(source, activation)
    check_heads(source, found, heads)


def check_activation(source: Path, activation: str | None) -> None:
    """UserError where weights are of another activation."""
    if activation != "gelu":
        raise UserError(
            f"vision_weights {source}: its activation is not this ViT's, the exact GELU "
            "(Classification.py: --gelu none); give others"
        )


def check_heads(source: Path, found: int, heads: int) -> None:
    """UserError where weights are of other attention heads."""
    if found != heads:
        raise UserError(f"vision_weights {source}: {found} attention heads; set vision_heads to it")


def library_vit(source: str, read_weights: Callable[[Path], State]) -> ImageEncoder:
    """The model of `timm/NAME[:FILE]` or `hf/FOLDER`. UserError."""
    library, _, name = source.partition("/")
    if library == "hf":
        if Path(f"/{name}").is_dir():  # Path made one slash of the two in hf//folder
            name = f"/{name}"
        return library_encoder(f"hf/{name}")
    name, _, file = name.partition(":")
    weights = read_weights(Path(file)) if file else None
    any_view = VitFacts(resize=1)  # the images are those of the training
    return timm_encoder(name, weights, pretrained=not file, stated=any_view)


def with_pixels(source: Path, state: State, mean: RGB, std: RGB) -> State:
    """Weights of images that were normalised by another mean and std, for OpenAI's; a note where a
    stem of convolutions, whose padding and batch norms know the former ones, must adapt."""
    if (tuple(mean), tuple(std)) == OPENAI:
        return state
    if any(name.startswith("patch_embed.backbone.") for name in state):
        say(
            f"note: vision_weights {source}: its stem was trained on pixels of mean {mean} and std "
            f"{std}, not {OPENAI[0]} and {OPENAI[1]} (Classification.py: --pixels clip)"
        )
        return state
    return fold_pixels(state, mean, std)


def fold_pixels(state: State, mean: RGB, std: RGB) -> State:
    """The same function of images in [0,1] when they are normalised by OpenAI's mean and std.

    w (x - m) / s = w' (x - m') / s' + b' with w' = w s' / s and b' = sum of w (m' - m) / s.
    """
    given = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    ours = [torch.tensor(values).view(1, 3, 1, 1) for values in OPENAI]
    weight = state["patch_embed.proj.weight"]
    shift = (weight * (ours[0] - given[0]) / given[1]).sum((1, 2, 3))
    bias = state.get("patch_embed.proj.bias", torch.zeros(len(weight)))
    folded = {"patch_embed.proj.weight": weight * ours[1] / given[1]}
    folded["patch_embed.proj.bias"] = bias + shift
    return state | folded
