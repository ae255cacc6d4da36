"""LLaMA weights in the two layouts they come in: Meta's folder (one or several shards) and Hugging
Face's.

`read_llama` gives Meta's names and rotary layout; files are opened without running anything in
them, and of a decoder that is cut only the kept blocks are read into memory.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from base.addresses import missing_file
from base.errors import UserError, brief
from base.names import matching_files
from base.reading import read_json
from base.torch_files import find_index, read_tensors, shards_of
from models.layers.llama import LlamaConfig, split_dimension
from models.weights.loading import renamed
from models.weights.stated import check_stated

State = dict[str, Tensor]
HUGGING_FACE = {  # transformers' name, without its `model.` -> Meta's, as `renamed` takes it
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "layers.{}.self_attn.q_proj": "layers.{}.attention.wq",
    "layers.{}.self_attn.k_proj": "layers.{}.attention.wk",
    "layers.{}.self_attn.v_proj": "layers.{}.attention.wv",
    "layers.{}.self_attn.o_proj": "layers.{}.attention.wo",
    "layers.{}.self_attn.q_norm": "layers.{}.attention.q_norm",
    "layers.{}.self_attn.k_norm": "layers.{}.attention.k_norm",
    "layers.{}.mlp.gate_proj": "layers.{}.feed_forward.w1",
    "layers.{}.mlp.down_proj": "layers.{}.feed_forward.w2",
    "layers.{}.mlp.up_proj": "layers.{}.feed_forward.w3",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    "layers.{}.post_attention_layernorm": "layers.{}.ffn_norm",
}
COMPUTED = {  # config.json: what this decoder computes
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
}
ROTARY = {  # rope_parameters or rope_scaling in it
    "rope_type": ("default", "llama3"),
    "type": ("default", "llama3"),
    "partial_rotary_factor": (1.0, None),
}
PLAIN = "not a plain LLaMA; use a LLaMA of any generation, SmolLM2, Qwen2 or Qwen3"
# rotary scaling where params.json says use_scaled_rope: what follows the factor, which is 8, or 32
META_SCALING = (1.0, 4.0, 8192.0)
LLAMA_3_2 = (2048, 3072)  # widths of the models of 32, in transformers' config.json of these, too
META_FIELDS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
)


def read_llama(folder: str | Path, layers: int | None = None) -> tuple[LlamaConfig, State]:
    """Geometry and float32 weights under Meta's names of the first `layers` blocks (all by default)
    and the head.

    folder: Meta's (params.json, consolidated.*.pth) or Hugging Face's (config.json, *.safetensors
    or *.bin). Raises UserError where it is neither, incomplete, damaged, or has fewer blocks than
    asked for.
    """
    folder = Path(folder)
    if (folder / "params.json").is_file():
        config, state = _read_meta(folder, layers)
    elif (folder / "config.json").is_file():
        config, state = _read_hugging_face(folder, layers)
    elif not folder.exists():
        raise missing_file(folder)
    else:
        raise UserError(
            f"{folder}: no LLaMA: neither params.json (Meta's layout) nor config.json (Hugging Face's)"
        )
    state = {name: value.float() for name, value in state.items()}
    config = replace(config, vocab_size=len(state["tok_embeddings.weight"]))
    return cut(config, layers, folder), state


def cut(config: LlamaConfig, layers: int | None, where: object) -> LlamaConfig:
    """The geometry of the first `layers` blocks."""
    if layers is None:
        return config
    if layers > config.n_layers:
        raise UserError(
            f"{where}: the decoder has {config.n_layers} blocks, it cannot be cut to {layers}"
        )
    return replace(config, n_layers=layers)


def is_kept(name: str, layers: int | None) -> bool:
    """Whether a weight (Meta's name) belongs to the decoder cut to its first `layers` blocks."""
    block = re.match(r"layers\.(\d+)\.", name)
    return not name.startswith("rope.") and (
        layers is None or block is None or int(block[1]) < layers
    )


# ---- Meta
def _read_meta(folder: Path, layers: int | None) -> tuple[LlamaConfig, State]:
    params = read_json(folder / "params.json", dict)
    try:
        known = {name: params[name] for name in META_FIELDS if params.get(name) is not None}
        theta = float(params.get("rope_theta", 10000.0))
        factor = params.get("rope_scale_factor", 32 if params.get("dim") in LLAMA_3_2 else 8)
        scaling = (float(factor), *META_SCALING) if params.get("use_scaled_rope") else ()
        config = LlamaConfig(**known, rope_theta=theta, rope_scaling=scaling)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'params.json'}: {error}") from None
    files = matching_files(folder, "*.pth")
    if not files:
        raise UserError(f"{folder}: no consolidated.*.pth beside params.json")
    wanted = partial(is_kept, layers=layers)
    return config, merge_shards([read_tensors(file, wanted) for file in files], config.dim)


def merge_shards(shards: list[State], dim: int) -> State:
    """The whole decoder from Meta's shards, which split matrices as tensor parallelism does; norms
    are in each."""
    names = shards[0].keys()
    if any(shard.keys() != names for shard in shards):
        raise UserError(
            "the consolidated.*.pth files do not belong together: they name different weights"
        )
    merged = {}
    for name in names:
        along = split_dimension(name)
        if name == "tok_embeddings.weight" and shards[0][name].shape[1] == dim:
            along = 0  # LLaMA 3 splits the vocabulary
        parts = [shard[name] for shard in shards]
        merged[name] = parts[0] if along is None or len(parts) == 1 else torch.cat(parts, along)
    return merged


# ---- Hugging Face
def _read_hugging_face(folder: Path, layers: int | None) -> tuple[LlamaConfig, State]:
    values = read_json(folder / "config.json", dict)
    config = hugging_face_config(values, folder / "config.json")
    index = find_index(folder)
    files = shards_of(index) if index else matching_files(folder, "*.safetensors")
    files = files or matching_files(folder, "pytorch_model*.bin")
    if not files:
        raise UserError(f"{folder}: no *.safetensors and no pytorch_model*.bin beside config.json")

    def wanted(name: str) -> bool:
        return is_kept(name.removeprefix("model."), layers)

    state: State = {}
    for file in files:
        state.update(read_tensors(file, wanted))
    tied = values.get("tie_word_embeddings")
    if tied:
        state.pop("lm_head.weight", None)  # transformers does not read it, either
    elif tied is False and "lm_head.weight" not in state:
        raise UserError(f"{folder}: no lm_head among the weights; is a shard missing?")
    return config, from_hugging_face(state, config)


def hugging_face_config(values: dict, where: object = "config.json") -> LlamaConfig:
    """Geometry from the `config.json` of transformers' LlamaForCausalLM; UserError for other kinds
    of decoders."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(each, dict) for each in rope.values()):
        raise UserError(f"{where}: rope_scaling is {brief(rope)}, not an object of numbers")
    check_stated(str(where), values, COMPUTED, PLAIN)
    check_stated(f"{where}, rope_scaling", rope, ROTARY, PLAIN)
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    kind = values.get("model_type", "llama")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    try:
        config = LlamaConfig(
            dim=values["hidden_size"],
            n_layers=values["num_hidden_layers"],
            n_heads=values["num_attention_heads"],
            n_kv_heads=values.get("num_key_value_heads"),
            vocab_size=values["vocab_size"],
            ffn_dim=values["intermediate_size"],
            norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=_scaling(rope) if rope_kind == "llama3" else (),
            head_width=values.get("head_dim"),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )
    except KeyError as error:
        raise UserError(f"{where}: has no {error.args[0]}; is it of a LlamaForCausalLM?") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: {error}; fetch it again") from None
    return config


def _scaling(rope: dict) -> tuple[float, ...]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(float(rope[name]) for name in names)


def from_hugging_face(state: State, config: LlamaConfig) -> State:
    """transformers' names -> Meta's, query and key turned back to interleaved rotary pairs; a tied
    head is copied."""
    result: State = {}
    for name, value in state.items():
        if ours := renamed(name.removeprefix("model."), HUGGING_FACE):
            result[ours] = value
        elif not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{name}: no weight of a LLaMA; is this a LlamaForCausalLM?")
    for name in result:
        if heads := rotary_heads(name, config):
            result[name] = interleave(result[name], heads)
    if "tok_embeddings.weight" not in result:
        raise UserError("no embed_tokens among the weights; is a shard of the checkpoint missing?")
    result.setdefault("output.weight", result["tok_embeddings.weight"].clone())
    return result


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """Heads whose rows of this weight (Meta's name) are rotary pairs; 0 where there are none."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    return {"wq": config.n_heads, "wk": config.kv_heads, "q_norm": 1, "k_norm": 1}.get(layer, 0)


def to_hugging_face(state: State, config: LlamaConfig) -> State:
    """Meta's names -> transformers' LlamaForCausalLM, the opposite of `from_hugging_face`."""
    theirs = {ours: name for name, ours in HUGGING_FACE.items()}
    result: State = {}
    for name, value in state.items():
        if heads := rotary_heads(name, config):
            value = halves(value, heads)
        prefix = "" if name == "output.weight" else "model."
        result[f"{prefix}{renamed(name, theirs)}"] = value
    return result


def hugging_face_values(config: LlamaConfig) -> dict:
    """`config.json` of transformers' LlamaForCausalLM, or Qwen2's or Qwen3's, for this geometry."""
    kind = "llama"
    if config.qkv_bias:
        kind = "qwen2"
    elif config.qk_norm:
        kind = "qwen3"
    values = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        values["max_position_embeddings"] = int(factor * length)
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(length),
        }
    return values


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from transformers' rotary layout, halves (i, i + d/2), to Meta's, neighbours
    (2i, 2i + 1)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(weight: Tensor, heads: int) -> Tensor:
    """The opposite of `interleave`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
