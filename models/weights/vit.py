"""Weights of `models.classification.classifier.VisionClassifier` in and out: timm, Hugging Face
transformers, TensorFlow COYO-ViT.

    load_vit(model, state)                # any of the four kinds -> the model, positions resized, fresh head if need be
    to_timm(state), to_transformers(state), to_tensorflow(state)     # and back: pure, state dict to state dict

The native names are timm's, plus `pre_logits.fc` for the tanh layer, which timm no longer has and
transformers calls the pooler. TensorFlow kernels are input x output, convolutions height x width x
input x output.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from base.errors import UserError
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.layers.positions import resize_positions
from models.weights.loading import Differences, load_checkpoint, part_of

State = Mapping[str, Tensor]

# native name: (transformers, TensorFlow)
OUTSIDE = {
    "cls_token": ("vit.embeddings.cls_token", "backbone/class_emb"),
    "pos_embed": ("vit.embeddings.position_embeddings", "backbone/pos_emb"),
    "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection", "backbone/embedding"),
    "norm": ("vit.layernorm", "backbone/norm"),
    "pre_logits.fc": ("vit.pooler.dense", "backbone/representation"),
    "head": ("classifier", "model/layer_with_weights-1"),
}
# native name inside a block, q, k and v apart: (transformers 4, transformers 5, TensorFlow)
INSIDE = {
    "norm1": ("layernorm_before", "layernorm_before", "layernorm1"),
    "attn.q": ("attention.attention.query", "attention.q_proj", "att/query_dense"),
    "attn.k": ("attention.attention.key", "attention.k_proj", "att/key_dense"),
    "attn.v": ("attention.attention.value", "attention.v_proj", "att/value_dense"),
    "attn.proj": ("attention.output.dense", "attention.o_proj", "att/combine_heads"),
    "norm2": ("layernorm_after", "layernorm_after", "layernorm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1", "mlp/layer_with_weights-0"),
    "mlp.fc2": ("output.dense", "mlp.fc2", "mlp/layer_with_weights-1"),
}
LAYER_PREFIX = (  # in the order above
    "vit.encoder.layer.{}.",
    "vit.layers.{}.",
    "backbone/enc_layers/{}/",
)
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
AVERAGE = "/.OPTIMIZER_SLOT/optimizer/average"
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def vit_kind(state: State) -> str:
    """`native` (timm's names), `transformers` or `tensorflow`. Raises UserError for anything
    else."""
    for key in ("dist_token", "reg_token", "fc_norm.weight"):
        if key in state:
            raise UserError(
                f"these weights have {key}: another kind of vision transformer than a class token's"
            )
    if "patch_embed.proj.weight" in state:
        return "native"
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return "transformers"
    if any(key.removesuffix(VALUE).endswith("class_emb") for key in state):
        return "tensorflow"
    raise UserError(
        f"no weights of a vision transformer: the first keys are {', '.join(list(state)[:6])}"
    )


def backbone(state: State) -> dict[str, Tensor]:
    """The encoder alone of a self-supervised checkpoint, under timm's names; other weights as they
    are.

    DINO and DINOv2 keep `backbone.*`, MoCo v3 `base_encoder.*` (its head is a projector), MAE a
    decoder beside the encoder.
    """
    for prefix in ("backbone.", "base_encoder."):
        inside = part_of(state, prefix)
        if "patch_embed.proj.weight" in inside:
            return {key: value for key, value in inside.items() if not key.startswith("head.")}
    if "decoder_embed.weight" in state:
        return {
            key: value
            for key, value in state.items()
            if not key.startswith("decoder_") and key != "mask_token"
        }
    return dict(state)


def native(state: State) -> dict[str, Tensor]:
    """Weights of any kind under the native names. Of a run or checkpoint with a moving average, the
    average."""
    state = backbone(state)
    state = part_of(state, "ema.") or state
    kind = vit_kind(state)
    if kind == "native":
        return dict(state)
    return join_qkv(
        _from_transformers(state) if kind == "transformers" else _from_tensorflow(state)
    )


def load_vit(model: VisionClassifier, state: State) -> Differences:
    """Copies weights of any kind into the model, positions resized to its grid; returns what was
    left out.

    The head may be missing or of another size, as may the pre-logits layer: they keep their initial
    values. Everything else must fit: raises UserError.
    """
    weights = native(state)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_positions(
            weights["pos_embed"], model.config.grid, align_corners=True
        )
    head = weights.get("head.weight")
    width = model.head.weight.shape
    if head is not None and head.shape != width:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    return load_checkpoint(model, weights, ("head.*", "pre_logits.*"), ("pre_logits.*",))


def to_timm(state: State) -> dict[str, Tensor]:
    """Native weights for timm's `VisionTransformer`, which is to be made with act_layer gelu_tanh.

    Raises UserError where there is a pre-logits layer: timm has none.
    """
    if "pre_logits.fc.weight" in state:
        raise UserError(
            "timm's vision transformer has no pre-logits layer: convert a fine-tuned model instead"
        )
    return dict(state)


def to_transformers(state: State, names: int = 4) -> dict[str, Tensor]:
    """Native weights under the names of transformers' ViT, as saved by version 4 (and on the hub)
    or held by 5.

    `vit.*` and `classifier.*`; the pre-logits layer becomes `vit.pooler.dense`.
    """
    column = 0 if names < 5 else 1
    result = {}
    for key, value in split_qkv(state).items():
        if block := BLOCK.fullmatch(key):
            result[
                LAYER_PREFIX[column].format(block[1]) + f"{INSIDE[block[2]][column]}.{block[3]}"
            ] = value
        else:
            name, leaf = _outside(key)
            result[OUTSIDE[name][0] + leaf] = value
    return result


def transformers_config(config: ClassifierConfig) -> dict:
    """Values of transformers' `ViTConfig` for a network of this kind."""
    vit = config.vit
    return {
        "model_type": "vit",
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": 4 * vit.width,
        "hidden_act": "gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "pooler_output_size": config.representation_size or vit.width,
    }


def to_tensorflow(state: State) -> dict[str, Tensor]:
    """Native weights under the keys of the original's checkpoints, without
    `/.ATTRIBUTES/VARIABLE_VALUE`."""
    result = {}
    for key, value in split_qkv(state).items():
        if block := BLOCK.fullmatch(key):
            name = LAYER_PREFIX[2].format(block[1]) + INSIDE[block[2]][2]
            leaf = f".{block[3]}"
        else:
            name, leaf = _outside(key)
            name = OUTSIDE[name][1]
        leaf = leaf.removeprefix(".")
        if "norm" in name.rpartition("/")[2]:
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        elif leaf == "weight":
            leaf = "kernel"
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
        result["/".join(filter(None, [name, leaf]))] = value.contiguous()
    return result


def split_qkv(state: State) -> dict[str, Tensor]:
    """`attn.qkv` -> `attn.q`, `attn.k`, `attn.v`."""
    result = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[key.replace(".attn.qkv.", f".attn.{name}.")] = part
        else:
            result[key] = value
    return result


def join_qkv(state: State) -> dict[str, Tensor]:
    """The opposite of `split_qkv`. Raises UserError where one of the three is missing."""
    result = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.attn\.)[qkv](\..*)", key)
        if match is None:
            result[key] = value
        elif ".attn.q." in key:
            parts = [state.get(f"{match[1]}{name}{match[2]}") for name in "qkv"]
            if any(part is None for part in parts):
                raise UserError(f"{key}: the key or value projection beside it is missing")
            result[f"{match[1]}qkv{match[2]}"] = torch.cat(parts)
    return result


def _outside(key: str) -> tuple[str, str]:
    """Entry of OUTSIDE and `.weight`, `.bias` or nothing. Raises UserError for a name there is no
    other one for."""
    name = re.sub(r"\.(weight|bias)$", "", key)
    if name not in OUTSIDE:
        raise UserError(
            f"{key}: not a weight of VisionClassifier; convert its exported model.safetensors"
        )
    return name, key[len(name) :]


def _from_transformers(state: State) -> dict[str, Tensor]:
    """Either version's names, with or without `vit.`, to native ones with q, k, v apart."""
    result = {}
    for key, value in state.items():
        key = key if key.startswith(("vit.", "classifier.")) else f"vit.{key}"
        layer = re.fullmatch(r"vit\.(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", key)
        if layer:
            names = {name: ours for ours, each in INSIDE.items() for name in each[:2]}
            ours = f"blocks.{layer[1]}.{names.get(layer[2], layer[2])}.{layer[3]}"
        else:
            leaf = re.search(r"(\.(?:weight|bias))?$", key)[0]
            names = {theirs: name for name, (theirs, _) in OUTSIDE.items()}
            ours = names.get(key.removesuffix(leaf), key.removesuffix(leaf)) + leaf
        result[ours] = value
    return result


def _from_tensorflow(state: State) -> dict[str, Tensor]:
    """A training checkpoint, or an export of the model or the backbone, to native names with q, k,
    v apart.

    Where it holds a moving average the raw weights lie under the plain keys and the averaged ones
    in optimizer slots;
    the latter are taken.
    """
    state = {key.removesuffix(VALUE): value for key, value in state.items()}
    names = {theirs: ours for ours, (_, theirs) in OUTSIDE.items()}
    inside = {theirs: ours for ours, (*_, theirs) in INSIDE.items()}
    result = {}
    for key, value in state.items():
        if ".OPTIMIZER_SLOT" in key:
            continue
        value = state.get(key + AVERAGE, value)
        name, _, leaf = _full_name(key).rpartition("/")
        if leaf in ("class_emb", "pos_emb"):
            result[names[f"{name}/{leaf}"]] = value
            continue
        block = re.fullmatch(r"backbone/enc_layers/(\d+)/(.+)", name)
        ours = f"blocks.{block[1]}.{inside.get(block[2])}" if block else names.get(name)
        if ours is None or leaf not in ("kernel", "bias", "gamma", "beta"):
            continue  # counters and the optimizer's own variables
        if leaf == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        result[f"{ours}.{'weight' if leaf in ('kernel', 'gamma') else 'bias'}"] = value.contiguous()
    return result


def _full_name(key: str) -> str:
    """The key of a training checkpoint for that of an export: of the model, or of the backbone
    alone."""
    if key.startswith("layer_with_weights-0/"):
        return key.replace("layer_with_weights-0", "backbone", 1)
    if key.startswith("layer_with_weights-1/"):
        return f"model/{key}"
    own = ("class_emb", "pos_emb", "embedding/", "enc_layers/", "norm/", "representation/")
    return f"backbone/{key}" if key.startswith(own) else key
