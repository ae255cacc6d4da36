"""ALIGN's weights under other names: transformers' `AlignModel` and COYO-ALIGN's TensorFlow
variables."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from models.dual_encoder.align import TEXTS, Align
from models.dual_encoder.config import DualConfig
from models.layers.efficientnet import SHAPES, SQUEEZE, STAGES
from models.weights.loading import State, count
from models.weights.stated import OPEN_FOLDER, check_stated

MODULES = {  # TensorFlow's layer in a block -> ours
    "expand_conv": "expansion.expand_conv",
    "expand_bn": "expansion.expand_bn",
    "dwconv": "depthwise_conv.depthwise_conv",
    "bn": "depthwise_conv.depthwise_norm",
    "se_reduce": "squeeze_excite.reduce",
    "se_expand": "squeeze_excite.expand",
    "project_conv": "projection.project_conv",
    "project_bn": "projection.project_bn",
}
STEM = {"stem_conv": "embeddings.convolution", "stem_bn": "embeddings.batchnorm"}
ATTRIBUTES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "weight": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
BLOCK = re.compile(r"block(\d)([a-z])_(\w+)")
TOWERS = {"image_encoder": "image", "text_encoder": "text"}


def is_align(state: State) -> bool:
    """Whether these are the weights of an ALIGN model, ours or transformers'."""
    return {
        "temperature",
        "vision_model.embeddings.convolution.weight",
        "text_projection.weight",
    } <= state.keys()


# ---- TensorFlow
def from_tensorflow_names(variables: State, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Variables `image_encoder/<name>:0`, `text_encoder/<name>:0` and `temperature` -> our names
    and layout.

    names: those of all variables of the model, where these are but some. BERT's pooler comes along,
    under transformers' name. Raises UserError for a name of no ALIGN model.
    """
    blocks = sorted(
        {match[1] + match[2] for name in (*variables, *names) if (match := BLOCK.search(name))}
    )
    places = {f"block{block}_": number for number, block in enumerate(blocks)}
    return {
        _our_name(name.removesuffix(":0"), places): _our_layout(name, value)
        for name, value in variables.items()
    }


def _our_name(name: str, places: Mapping[str, int]) -> str:
    if name == "temperature":
        return name
    tower, _, path = name.partition("/")
    layer, _, attribute = path.rpartition("/")
    if tower in TOWERS and attribute in ATTRIBUTES:
        attribute = ATTRIBUTES[attribute]
        if re.fullmatch(r"dense(_\d+)?", layer):
            return f"{TOWERS[tower]}_projection.{attribute}"
        if layer in STEM:
            return f"vision_model.{STEM[layer]}.{attribute}"
        if (match := BLOCK.fullmatch(layer)) and match[3] in MODULES:
            block = places[f"block{match[1]}{match[2]}_"]
            return f"vision_model.encoder.blocks.{block}.{MODULES[match[3]]}.{attribute}"
        if match := re.fullmatch(r"tf_bert_model(?:_\d+)?/bert/(.+)", layer):
            return (
                "text_model."
                + match[1].replace("layer_._", "layer.").replace("/", ".")
                + f".{attribute}"
            )
    raise UserError(f"{name}: no variable of COYO-ALIGN's models")


def _our_layout(name: str, value: Tensor) -> Tensor:
    """Convolutions [h,w,in,out] -> [out,in,h,w], depthwise [h,w,C,1] -> [C,1,h,w], dense [in,out]
    -> [out,in]."""
    attribute = name.removesuffix(":0").rpartition("/")[2]
    if attribute == "depthwise_kernel":
        value = value.permute(2, 3, 0, 1)
    elif attribute == "kernel":
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    elif value.ndim == 5:  # of a batch norm with virtual batches: [1,1,1,1,C]
        value = value.flatten()
    return value.contiguous()


# ---- transformers
def to_hugging_face(state: State) -> dict[str, Tensor]:
    """Our weights as a state dict of `AlignModel`; BERT's pooler, which nothing reads, is zeros
    where it is missing.

    Raises UserError for models with an image projection, which transformers lacks.
    """
    if "image_projection.weight" in state:
        raise UserError(
            "transformers' AlignModel has no image projection: of ALIGN's models only B7 fits into it"
        )
    width = state["text_projection.weight"].shape[1]
    pooler = {"weight": torch.zeros(width, width), "bias": torch.zeros(width)}
    pooler = {f"text_model.pooler.dense.{name}": value for name, value in pooler.items()}
    return pooler | {
        name: value for name, value in state.items() if name != "text_model.embeddings.position_ids"
    }


def hugging_face_config(model: Align) -> dict:
    """`config.json` of transformers' AlignModel for `model`."""
    text, image = model.text_model.config, model.vision_model.shape
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": model.config.embed_dim,
        "temperature_init_value": model.config.temperature,
        "text_config": {
            "model_type": "align_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "type_vocab_size": text.type_vocab_size,
            "layer_norm_eps": text.layer_norm_eps,
        },
        "vision_config": {
            "model_type": "align_vision_model",
            "width_coefficient": image.width,
            "depth_coefficient": image.depth,
            "depth_divisor": image.divisor,
            "image_size": model.config.image_size,
            "hidden_dim": model.vision_model.num_features,
            "batch_norm_eps": image.eps,
            "drop_connect_rate": image.drop_connect,
        },
    }


def check_described(described: Mapping[str, Any]) -> None:
    """UserError where config.json of transformers' AlignModel describes another network than
    ours."""
    text = described.get("text_config", {})
    computed = {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-12,),
        "num_attention_heads": (text.get("hidden_size", 768) // 64,),
        "pad_token_id": (0,),
    }
    check_stated("config.json, text_config", text, computed, OPEN_FOLDER)
    computed = {
        "hidden_act": ("swish", "silu"),
        "batch_norm_eps": (1e-3,),
        "pooling_type": ("mean",),
        "squeeze_expansion_ratio": (SQUEEZE,),
        "strides": ([stage[-1] for stage in STAGES],),
        "depthwise_padding": ([],),
    }
    vision = described.get("vision_config", {})
    check_stated("config.json, vision_config", vision, computed, OPEN_FOLDER)


def align_config(state: State, image_size: int = 289) -> DualConfig:
    """The configuration whose model these weights fill, read off their shapes; UserError for other
    geometries."""
    blocks = count(state, r"vision_model\.encoder\.blocks\.(\d+)\.")
    features = len(
        state[f"vision_model.encoder.blocks.{blocks - 1}.projection.project_conv.weight"]
    )
    layers = count(state, r"text_model\.encoder\.layer\.(\d+)\.")
    vocabulary, width = state["text_model.embeddings.word_embeddings.weight"].shape
    images = [
        name
        for name, shape in SHAPES.items()
        if (shape.features, len(shape.blocks())) == (features, blocks)
    ]
    texts = [name for name, geometry in TEXTS.items() if geometry == (layers, width)]
    if not images or not texts:
        raise UserError(
            f"an ALIGN model of {blocks} image blocks, {features} features and {layers} text layers of width {width}: "
            f"known are {', '.join(SHAPES)} and {', '.join(TEXTS)}"
        )
    return DualConfig(
        model=f"ALIGN_{images[0]}_{texts[0]}",
        image_size=image_size,
        embed_dim=len(state["text_projection.weight"]),
        vocab_size=vocabulary,
        context_length=64,
        temperature=float(state["temperature"]),
        label_smoothing=0.1,
        loss_avg_or_sum="sum",
    )
