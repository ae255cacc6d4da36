"""NXTP's weights out of CLIP's and LLaMA's, or out of an NXTP checkpoint; the published ones hold
trained tensors only.

Everything here maps state dicts to state dicts; `models.weights.build_nxtp` puts them together.

    state = decoder_state(llama, vocabulary, folder) | vision_state(clip)   # to start training
    state = recognition_state(checkpoint, clip)                             # to continue one
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from base.errors import UnfitWeights, UserError
from base.torch_files import unwrap_names
from models.layers.llama import LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.weights.clip import (
    fit_positions,
    from_hugging_face,
    openai_config,
    tower_sizes,
)
from models.weights.llama import is_kept
from models.weights.loading import count, part_of

State = dict[str, Tensor]
VISION, DECODER = "vision_encoder.", "language_decoder."
POSITIONS = "positional_embedding"
FILLED = 1024  # rows at most that fill a table of embeddings up
LLAMA_HEAD = 128  # width of a head in every published LLaMA-2


def openai_layout(state: State) -> State:
    """OpenAI's names in float32 of a CLIP state dict in OpenAI's, open_clip's or Hugging Face's
    layout."""
    if any(name.startswith("vision_model.") for name in state):
        state = from_hugging_face(state)
    return {name: value.float() for name, value in state.items() if value.is_floating_point()}


def vision_config(state: State, dim: int, image_size: int | None = None) -> OpenAIConfig:
    """Geometry of CLIP's image tower (OpenAI's names), projected to `dim`, for images of
    `image_size`."""
    config = openai_config(state)
    return replace(config, embed_dim=dim, image_size=image_size or config.image_size)


def vision_state(state: State, image_size: int | None = None) -> State:
    """The image tower of a CLIP state dict (OpenAI's names) without its projection; positions fit
    `image_size`."""
    state = fit_positions(state, image_size) if image_size and "visual.proj" in state else state
    tower = part_of(state, "visual.")
    left = ("proj", "attnpool.")
    return {VISION + name: value for name, value in tower.items() if not name.startswith(left)}


def decoder_state(llama: State, vocabulary: int, where: object, known: int | None = None) -> State:
    """LLaMA's weights (Meta's names) with rows for the special tokens at the end.

    New embeddings are normal; new rows of the head are uniform in ±dim^-0.5, and zero for the last
    one, the padding token. vocabulary: tokens of the tokenizer, the special ones included; known:
    without those, None = the rows of the weights. Rows that only fill the table up to a multiple of
    64 (Qwen's) are cut off. UserError for the weights of another tokenizer; where: to name them.
    """
    rows, dim = llama["tok_embeddings.weight"].shape
    if known is not None and 0 < rows - known <= FILLED and rows % 64 == 0:
        rows = known
    new = vocabulary - rows
    if not 1 <= new <= 16:
        entries = (
            f"{vocabulary} entries with the special tokens" if known is None else f"{known} entries"
        )
        raise UserError(
            f"{where}: {rows} embeddings, but the tokenizer has {entries}; "
            "use the tokenizer.model that belongs to these weights, or its tokenizer.json"
        )
    head = torch.empty(new, dim).uniform_(-1, 1) / math.sqrt(dim)
    head[-1] = 0
    state = dict(llama)
    for name, more in (("tok_embeddings.weight", torch.randn(new, dim)), ("output.weight", head)):
        state[name] = torch.cat([llama[name][:rows], more.to(llama[name].dtype)])
    return {DECODER + name: value for name, value in state.items()}


def recognition_state(
    checkpoint: State, clip: State | None, layers: int | None = None, image_size: int | None = None
) -> State:
    """All weights of an NXTP checkpoint; what a published one lacks, the frozen tensors of CLIP,
    comes from `clip`.

    clip: OpenAI's names, or None where the checkpoint is complete. layers: blocks of the decoder to
    keep. image_size: side of the images, to which position embeddings are resized.
    """
    state = {name: value.float() for name, value in unwrap_names(checkpoint).items()}
    state.pop(f"{VISION}logit_scale", None)
    if not any(name.startswith(DECODER) for name in state):
        raise UnfitWeights("no language_decoder.* among the weights: this is no NXTP checkpoint")
    deep = count(state, rf"{DECODER}layers\.(\d+)\.")
    if layers is not None and layers > deep:
        raise UnfitWeights(
            f"the checkpoint's decoder has {deep} blocks, it cannot be cut to {layers}"
        )
    state = {
        name: value for name, value in state.items() if is_kept(name.removeprefix(DECODER), layers)
    }
    if f"{VISION}layer1.0.conv1.weight" in state or of_library(state):
        return state
    if f"{VISION}conv1.weight" in state:
        if image_size is None:
            return state
        given = {f"visual.{name}": state[VISION + name] for name in (POSITIONS, "conv1.weight")}
        fitted = fit_positions(given, image_size)
        return state | {VISION + POSITIONS: fitted[f"visual.{POSITIONS}"]}
    if clip is None:
        raise UnfitWeights(
            "the checkpoint holds trained tensors only, as NXTP's published files do: also name the CLIP model it was "
            "trained from, with --clip ViT-L-14.pt"
        )
    return vision_state(clip, image_size) | state


def has_tower(state: State) -> bool:
    """Whether an NXTP checkpoint holds its image tower, which the published ones lack."""
    return f"{VISION}conv1.weight" in state or of_library(state)


def geometry(
    state: State,
    heads: int | None,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    image_size: int | None = None,
    rope_scaling: tuple[float, ...] = (),
) -> tuple[OpenAIConfig, LlamaConfig]:
    """Both networks' sizes, read off the shapes of a complete state dict; heads: of the decoder,
    None = LLaMA's."""
    table = state[f"{DECODER}tok_embeddings.weight"]
    first = f"{DECODER}layers.0."
    dim = table.shape[1]
    heads = heads or max(1, dim // LLAMA_HEAD)
    width = len(state[f"{first}attention.wq.weight"]) // heads
    decoder = LlamaConfig(
        dim=dim,
        n_layers=count(state, rf"{DECODER}layers\.(\d+)\."),
        n_heads=heads,
        n_kv_heads=len(state[f"{first}attention.wk.weight"]) // width,
        vocab_size=len(table),
        ffn_dim=len(state[f"{first}feed_forward.w1.weight"]),
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=tuple(rope_scaling),
        head_width=width if width * heads != dim else None,
        qkv_bias=f"{first}attention.wq.bias" in state,
        qk_norm=f"{first}attention.q_norm.weight" in state,
    )
    return _tower(state, dim, image_size), decoder


def of_library(names) -> bool:
    """Whether the image tower among weights or their names is one of timm."""
    return any(name.startswith(f"{VISION}trunk.") for name in names)


def _tower(state: State, dim: int, image_size: int | None) -> OpenAIConfig:
    """Geometry of the image tower; a ResNet's and a library's do not tell the size of the images."""
    if of_library(state):
        return OpenAIConfig(embed_dim=dim, image_size=image_size or 224, patch_size=0)
    sizes = tower_sizes(state, VISION)
    side = image_size or 224
    if sizes["patch_size"]:
        positions = len(state[f"{VISION}positional_embedding"])
        side = math.isqrt(positions - 1) * sizes["patch_size"]
    return OpenAIConfig(embed_dim=dim, image_size=side, **sizes)


def check_vocabulary(state: State, vocabulary: int, tokenizer: object) -> None:
    """UserError where tokenizer and checkpoint were not made for one another."""
    rows = len(state[f"{DECODER}tok_embeddings.weight"])
    if rows != vocabulary:
        raise UnfitWeights(
            f"tokenizer {tokenizer}: {vocabulary} entries with the special tokens, but the checkpoint embeds {rows}; "
            "use the tokenizer.model that the checkpoint was trained with"
        )


def trained_names(names: list[str], vision_blocks: int | None) -> set[str]:
    """What is trained: the decoder, and of the tower the projection, the last norm and the last
    `vision_blocks` blocks; None = everything. UserError where it has not so many."""
    if vision_blocks is None:
        return set(names)
    if vision_blocks and (f"{VISION}layer1.0.conv1.weight" in names or of_library(names)):
        raise UserError(
            "train_vision_blocks: a ResNet's blocks are trained all together (leave it out) or not "
            "(0); those of image_tower, too"
        )
    deep = count(names, rf"{VISION}transformer\.resblocks\.(\d+)\.")
    if vision_blocks > deep:
        raise UserError(
            f"train_vision_blocks {vision_blocks}: the image tower has {deep} blocks; give fewer, or "
            "leave it out to train the whole tower, its embeddings included"
        )
    last = {
        f"{VISION}transformer.resblocks.{number}." for number in range(deep - vision_blocks, deep)
    }
    inside = (*last, f"{VISION}proj.", f"{VISION}ln_post.", DECODER)
    return {name for name in names if name.startswith(inside)}


def decayed_names(trained: dict[str, Tensor]) -> set[str]:
    """What the original decays: matrices but for the token embeddings, and the decoder's final
    norm, too."""
    head = (f"{DECODER}norm.", f"{DECODER}output.", f"{VISION}proj.")
    return {
        name
        for name, value in trained.items()
        if name.startswith(head) or (value.ndim > 1 and "tok_embeddings" not in name)
    }


def choose_parameters(model: nn.Module, blocks: int | None, original: bool) -> set[str] | None:
    """Freeze what is not trained: see `trained_names`. Returns the names of the parameters to decay as
    the original did; None if not `original`."""
    named = dict(model.named_parameters())
    trained = trained_names(list(named), blocks)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    if not original:
        return None
    return decayed_names({name: named[name] for name in trained})
