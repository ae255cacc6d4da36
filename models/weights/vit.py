"""Weights of `models.classification.classifier.VisionClassifier` in and out: timm, Hugging Face
transformers, TensorFlow COYO-ViT.

    load_vit(model, state)                # any of the four kinds -> the model, positions resized, fresh head if need be
    to_timm(state), to_transformers(state)     # and back: pure, state dict to state dict

The native names are timm's, plus `pre_logits.fc` for the tanh layer, which timm no longer has and
transformers calls the pooler. TensorFlow kernels are input x output, convolutions height x width x
input x output.
"""

from collections.abc import Mapping

from torch import Tensor

from base.errors import UnfitWeights, UserError
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.layers.positions import resize_positions
from models.weights.loading import (
    Differences,
    State,
    join_qkv,
    load_checkpoint,
    part_of,
    renamed,
    split_qkv,
)

# native name: (transformers 4 and 5, TensorFlow)
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
TRANSFORMERS_4, TRANSFORMERS_5, TENSORFLOW = range(3)  # columns
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
AVERAGE = "/.OPTIMIZER_SLOT/optimizer/average"


def _names(column: int) -> dict[str, str]:
    """Native name -> that of a column of the tables, as `renamed` takes it."""
    names = {}
    for ours, (transformers, tensorflow) in OUTSIDE.items():
        names[ours] = tensorflow if column == TENSORFLOW else transformers
    for ours, each in INSIDE.items():
        names[f"blocks.{{}}.{ours}"] = LAYER_PREFIX[column] + each[column]
    return names


def _native_names(*columns: int) -> dict[str, str]:
    """The other way, for any of the columns."""
    return {theirs: ours for column in columns for ours, theirs in _names(column).items()}


def vit_kind(state: State) -> str:
    """`native` (timm's names), `transformers` or `tensorflow`. Raises UserError for anything
    else."""
    for key in ("dist_token", "reg_token", "fc_norm.weight"):
        if key in state:
            raise UnfitWeights(
                f"these weights have {key}: another kind of vision transformer than a class token's"
            )
    if "patch_embed.proj.weight" in state:
        return "native"
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return "transformers"
    if any(key.removesuffix(VALUE).endswith("class_emb") for key in state):
        return "tensorflow"
    raise UnfitWeights(
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
    table = _names(TRANSFORMERS_4 if names < 5 else TRANSFORMERS_5)
    return {_other_name(key, table): value for key, value in split_qkv(state).items()}


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


def _other_name(key: str, table: Mapping[str, str]) -> str:
    """`renamed`, or UserError for a name there is no other one for."""
    name = renamed(key, table)
    if name is None:
        raise UserError(
            f"{key}: not a weight of VisionClassifier; convert its exported model.safetensors"
        )
    return name


def _from_transformers(state: State) -> dict[str, Tensor]:
    """Either version's names, with or without `vit.`, to native ones with q, k, v apart."""
    table = _native_names(TRANSFORMERS_4, TRANSFORMERS_5)
    result = {}
    for key, value in state.items():
        key = key if key.startswith(("vit.", "classifier.")) else f"vit.{key}"
        result[renamed(key, table) or key] = value
    return result


def _from_tensorflow(state: State) -> dict[str, Tensor]:
    """A training checkpoint, or an export of the model or the backbone, to native names with q, k,
    v apart.

    Where it holds a moving average the raw weights lie under the plain keys and the averaged ones
    in optimizer slots;
    the latter are taken.
    """
    state = {key.removesuffix(VALUE): value for key, value in state.items()}
    table = _native_names(TENSORFLOW)
    result = {}
    for key, value in state.items():
        if ".OPTIMIZER_SLOT" in key:
            continue
        value = state.get(key + AVERAGE, value)
        name, _, leaf = _full_name(key).rpartition("/")
        if leaf in ("class_emb", "pos_emb"):
            result[table[f"{name}/{leaf}"]] = value
            continue
        ours = renamed(name, table)
        if ours is None and name.startswith("backbone/enc_layers/"):
            ours = name  # what it is, the caller's load says
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
