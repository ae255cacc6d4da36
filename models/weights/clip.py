"""Dual-encoder checkpoints of clip-rocket, SLIP, OpenAI, open_clip and Hugging Face, and exports to
the last two.

Everything here maps state dicts (name -> tensor) to state dicts; reading files is the caller's
business, but for OpenAI's TorchScript archives, which `models.weights.torchscript` opens without
running them. A loader ends in plain `load_state_dict`, so whatever is missing or left over is an
error that lists the names.

    model = load_openai(state)                    # OpenAI's or open_clip's layout; sizes are read off the shapes
    model = load_openai(from_hugging_face(state), activation=...)
    state, config = to_hugging_face(model), hugging_face_config(model.config)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError, naming
from base.torch_files import unwrap_names
from models.dual_encoder.cl2l import CL2L, SwALIPV1
from models.dual_encoder.clip import CLIP, SigLIP
from models.dual_encoder.config import DualConfig
from models.dual_encoder.openai import OpenAICLIP
from models.dual_encoder.slip import SlipCLIP
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.layers.positions import resize_positions
from models.weights.loading import (
    count,
    from_saved,
    join_qkv,
    load_checkpoint,
    part_of,
    renamed,
    split_qkv,
)

State = dict[str, Tensor]

# entries of released files
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

# ---- clip-rocket and SLIP


SLIP_EMBED_DIM = 512  # SLIP's command line has no such flag


def config_of_arguments(arguments: dict, **more) -> DualConfig:
    """DualConfig from the `args` of a clip-rocket or SLIP checkpoint (as a dict); other entries
    shape no model.

    `more` overrides, e.g. `image_size`.
    """
    if "model" not in arguments:
        raise UserError(
            "the checkpoint's args name no model; give the model string on the command line"
        )
    values = {name: value for name, value in arguments.items() if value is not None}
    if arguments["model"].count("_") == 1:
        values.setdefault("embed_dim", SLIP_EMBED_DIM)
    return from_saved(DualConfig, {**values, **more})


def load_text_transformer(model: nn.Module, state: State) -> None:
    """Load the text blocks of another checkpoint into `model`, neither embeddings nor the final
    norm: all of them or UserError."""
    blocks = part_of(unwrap_names(state), "transformer.")
    if not blocks:
        raise UserError("the checkpoint for the text encoder has no `transformer.*` weights")
    with naming("init_text_encoder", "its blocks"):
        load_checkpoint(model.transformer, blocks)


# ---- OpenAI and open_clip


def from_open_clip(state: State) -> State:
    """open_clip's names -> OpenAI's: the text tower of its two-part models moves to the root.
    Others stay."""
    state = unwrap_names(state)
    if any(name.startswith("visual.trunk.") for name in state):
        raise UserError(
            "an open_clip model with a timm image tower (visual.trunk.*): load it with load_timm_open_clip"
        )
    if "logit_bias" in state:
        raise UserError(
            "an open_clip model with logit_bias (SigLIP): load it with load_timm_open_clip"
        )
    return text_at_root(state)


def text_at_root(state: State) -> State:
    """The names of open_clip's two-part models with the text tower at the root."""
    return {name.removeprefix("text."): value for name, value in state.items()}


def float_weights(state: State) -> State:
    """The weights of a released file in float32, without its other entries."""
    kept = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
    return {
        name: value.float() if value.is_floating_point() else value for name, value in kept.items()
    }


def is_openais(state: State, about: Mapping[str, Any]) -> bool:
    """Whether the file holds what OpenAI's alone do."""
    return bool(about.get("archive")) or any(name in state for name in NOT_WEIGHTS[:3])


def stated_activation(state: State, about: Mapping[str, Any]) -> str | None:
    """quick_gelu or gelu where OpenAI's file or open_clip's beside it tells; None where none does:
    the weights look alike with either."""
    described = about.get("open_clip_config.json", {}).get("model_cfg")
    if described is None and not is_openais(state, about):
        return None
    is_quick = is_openais(state, about) or described.get("quick_gelu")
    return "quick_gelu" if is_quick else "gelu"


def openai_config(state: State, activation: str = "quick_gelu") -> OpenAIConfig:
    """Read every size off the shapes of an OpenAI-layout state dict. The activation cannot be seen
    in it."""
    for name in (
        "visual.conv1.weight",
        "text_projection",
        "positional_embedding",
        "ln_final.weight",
    ):
        if name not in state:
            raise UserError(
                f"no {name} among the weights: not of OpenAI's CLIP layout; give those of a whole CLIP"
            )
    text_layers = count(state, r"transformer\.resblocks\.(\d+)\.")
    context, text_width = state["positional_embedding"].shape
    vocabulary = len(state["token_embedding.weight"])
    heads = max(1, text_width // 64)
    text = TextShape(context, vocabulary, text_width, heads, text_layers, activation)
    sizes = tower_sizes(state, "visual.")
    if sizes["patch_size"]:
        size = sizes["patch_size"] * _grid(state["visual.positional_embedding"])
    else:
        size = 32 * _grid(state["visual.attnpool.positional_embedding"])
    return OpenAIConfig(
        embed_dim=state["text_projection"].shape[1],
        image_size=size,
        text=text,
        vision_activation=activation,
        **sizes,
    )


def tower_sizes(state: State, prefix: str) -> dict[str, Any]:
    """`vision_width`, `vision_layers` and `patch_size` (0: a ResNet) of OpenAI's image tower, whose
    weights' names begin with `prefix`."""
    if f"{prefix}layer1.0.conv1.weight" in state:
        stages = [count(state, rf"{prefix}layer{number}\.(\d+)\.") for number in (1, 2, 3, 4)]
        width = len(state[f"{prefix}layer1.0.conv1.weight"])
        layers = tuple(filter(None, stages))
        return {"vision_width": width, "vision_layers": layers, "patch_size": 0}
    width, *_, patch = state[f"{prefix}conv1.weight"].shape
    blocks = count(state, rf"{prefix}transformer\.resblocks\.(\d+)\.")
    return {"vision_width": width, "vision_layers": blocks, "patch_size": patch}


def _grid(positions: Tensor) -> int:
    grid = round((len(positions) - 1) ** 0.5)
    if grid**2 + 1 != len(positions):
        raise UserError(
            f"{len(positions)} position embeddings are no square grid and a class token"
        )
    return grid


def load_openai(state: State, activation: str = "quick_gelu") -> OpenAICLIP:
    """OpenAI's or open_clip's state dict -> the network holding it in float32.

    activation: `quick_gelu` for OpenAI's weights and open_clip's `-quickgelu` models, `gelu` for
    its others.
    """
    state = float_weights(from_open_clip(state))
    with torch.device("meta"):
        model = OpenAICLIP(openai_config(state, activation))
    load_checkpoint(model, state, assign=True)
    return model.requires_grad_(True)


def to_open_clip(model: nn.Module) -> State:
    """State dict for open_clip's model: of OpenAI's networks the same names, of ours with a
    timm-style ViT, R50 or ConvNeXt those of a timm image tower with a linear projection
    (`open_clip_config` describes it).
    """
    if isinstance(model, OpenAICLIP):
        return dict(model.state_dict())
    image, text = _linear_projections(model)
    state = model.state_dict()
    trunk = model.visual.trunk if model.config.image_tower else model.visual
    result = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    shared = (
        "positional_embedding",
        "logit_scale",
        "logit_bias",
        "transformer.",
        "token_embedding.",
        "ln_final.",
    )
    result |= {name: value for name, value in state.items() if name.startswith(shared)}
    return result | {"visual.head.proj.weight": image.T.contiguous(), "text_projection": text}


def _linear_projections(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The global projections as matrices [C,E] and [T,E]."""
    if isinstance(model, SlipCLIP):
        return model.image_projection.detach(), model.text_projection.detach()
    if isinstance(model, CLIP) and isinstance(model.image_projector, nn.Linear):
        return (
            model.image_projector.weight.detach().T,
            model.text_projector.weight.detach().T.contiguous(),
        )
    raise UserError("open_clip holds linear projections only; this model's clip_proj_type is mlp")


TIMM_NAMES = {
    "RT": "test_resnet",
    "R50": "resnet50",
    "CNEXTT": "convnext_tiny",
    "CNEXTS": "convnext_small",
    "VITS16": "vit_small_patch16_224",
    "VITS32": "vit_small_patch32_224",
    "VITB16": "vit_base_patch16_224",
    "VITB32": "vit_base_patch32_224",
    "VITL16": "vit_large_patch16_224",
}


def open_clip_config(model: nn.Module) -> dict:
    """open_clip's model configuration (the JSON it keeps beside weights) for
    `to_open_clip(model)`."""
    config = model.config
    text = {
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
        "width": config.text.width,
        "heads": config.text.heads,
        "layers": config.text.layers,
    }
    activation = {"quick_gelu": config.text.activation == "quick_gelu"}
    if isinstance(model, OpenAICLIP):
        layers = list(config.vision_layers) if config.is_resnet else config.vision_layers
        vision = {"image_size": config.image_size, "layers": layers, "width": config.vision_width}
        if not config.is_resnet:
            vision["patch_size"] = config.patch_size
            vision["head_width"] = config.vision_width // config.vision_heads
        return {"embed_dim": config.embed_dim, **activation, "vision_cfg": vision, "text_cfg": text}
    bias = {"init_logit_bias": -10.0} if isinstance(model, SigLIP) else {}
    about = {"embed_dim": config.embed_dim, **activation, **bias}
    return {**about, "vision_cfg": _timm_vision(config), "text_cfg": text}


def _timm_vision(config: DualConfig) -> dict:
    """`vision_cfg` of a dual encoder with an image tower of timm, or one that timm has, too."""
    if config.tower_classes:
        raise UserError("open_clip has no image tower with classes; use --to onnx or safetensors")
    vision = {"image_size": config.image_size, "timm_model_pretrained": False}
    vision["timm_proj"] = "linear"
    if config.image_tower:  # pools as it does there
        name = config.image_tower.removeprefix("timm/").partition(":")[0]
        return {**vision, "timm_model_name": name, "timm_pool": ""}
    backbone = config.model.split("_")[1]
    if backbone not in TIMM_NAMES or (config.model.count("_") == 1 and backbone == "VITS16"):
        raise UserError(
            f"timm has no {backbone} of this head count by name; export to safetensors instead"
        )
    pool = "token" if backbone.startswith("VIT") else "avg"
    return {**vision, "timm_model_name": TIMM_NAMES[backbone], "timm_pool": pool}


def load_timm_open_clip(model: CLIP, state: State) -> None:
    """The other way: an open_clip state dict with a timm tower and a linear projection into a
    freshly built CLIP."""
    state = text_at_root(unwrap_names(state))
    renamed = {}
    for name, value in state.items():
        if name == "visual.head.proj.weight":
            renamed["image_projector.weight"] = value
        elif name == "text_projection":
            renamed["text_projector.weight"] = value.T.contiguous()
        elif name not in NOT_WEIGHTS:
            renamed[name.replace("visual.trunk.", "visual.", 1)] = value
    if not isinstance(model, CLIP) or isinstance(model, CL2L | SwALIPV1):
        raise UserError(f"open_clip weights fill a CLIP or SIGLIP head, not {type(model).__name__}")
    if ("logit_bias" in renamed) != isinstance(model, SigLIP):
        raise UserError(
            "logit_bias belongs to SigLIP: build a model with the head SIGLIP for it, CLIP without it"
        )
    load_checkpoint(model, renamed)


def fit_positions(state: State, image_size: int) -> State:
    """OpenAI-layout ViT weights for images of another size: resized position embeddings. UserError
    for a size that is no whole number of patches, of which the weights would not tell."""
    positions = state["visual.positional_embedding"]
    patch = state["visual.conv1.weight"].shape[-1]
    if image_size % patch:
        raise UserError(f"image_size {image_size}: no multiple of the patch size {patch}")
    grid = image_size // patch
    return state | {"visual.positional_embedding": resize_positions(positions[None], grid)[0]}


# ---- Hugging Face

HUGGING_FACE = {  # OpenAI's name -> transformers', as `renamed` takes it
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
IN_BLOCK = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCKS = {
    "transformer.resblocks.{}.": "text_model.encoder.layers.{}.",
    "visual.transformer.resblocks.{}.": "vision_model.encoder.layers.{}.",
}
for _ours, _theirs in BLOCKS.items():
    HUGGING_FACE |= {_ours + name: _theirs + other for name, other in IN_BLOCK.items()}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}


def is_hugging_face(state: State) -> bool:
    """Whether these are weights of transformers' CLIPModel."""
    return "vision_model.embeddings.patch_embedding.weight" in state


def to_hugging_face(model: OpenAICLIP) -> State:
    """State dict of transformers' CLIPModel. UserError for a ResNet tower and for our own networks,
    which it lacks."""
    if not isinstance(model, OpenAICLIP) or model.config.is_resnet:
        raise UserError(
            "Hugging Face's CLIPModel is OpenAI's ViT alone; export this model to open_clip's layout or to safetensors"
        )
    return hugging_face_names(model.state_dict())


def hugging_face_names(state: State) -> State:
    """OpenAI's names of both towers, or of one, -> those of transformers' CLIPModel."""
    return _other_names(split_qkv(state), HUGGING_FACE, TRANSPOSED)


def from_hugging_face(state: State) -> State:
    """transformers' CLIPModel -> OpenAI's names; `position_ids` of older versions are dropped."""
    names = {theirs: ours for ours, theirs in HUGGING_FACE.items()}
    transposed = {theirs: ours for ours, theirs in TRANSPOSED.items()}
    kept = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    return join_qkv(_other_names(kept, names, transposed), "in_proj_")


def _other_names(state: State, names: Mapping[str, str], transposed: Mapping[str, str]) -> State:
    result = {}
    for name, value in state.items():
        other = renamed(name, names)
        if name in transposed:
            result[transposed[name]] = value.T.contiguous()
        elif other is None:
            raise UserError(f"{name} is no weight of CLIP's ViT models")
        else:
            result[other] = value
    return result


def hugging_face_config(config: OpenAIConfig) -> dict:
    """`config.json` of transformers' CLIPModel for an OpenAI geometry."""
    text, size = config.text, config.image_size
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_act": text.activation,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "projection_dim": config.embed_dim,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": config.vision_activation,
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_attention_heads": config.vision_heads,
            "num_hidden_layers": config.vision_layers,
            "image_size": size,
            "patch_size": config.patch_size,
            "projection_dim": config.embed_dim,
        },
    }
