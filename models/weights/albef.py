"""From a checkpoint to a model: which key of the one becomes which key of the other.

All functions are pure, state dict to state dict, and take weights that were already read. The names
of the networks are those of the originals (ALBEF, SIMLA, DeiT, BERT), so that the tables here are
short:

    start_from(model, state, "retrieval")     any checkpoint of the family -> the model of a task, checked
    load_bert(text_encoder, *load_bert_folder("bert-base-uncased"))
    load_checkpoint(vit, deit_weights(state, grid), allowed_missing=("mask_token",))
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from base.distributed import say
from base.errors import UnfitWeights, UserError
from base.hub import from_hub
from base.names import some
from base.reading import read_json
from base.torch_files import find_index, read_index, read_tensors
from models.layers.positions import resize_positions
from models.weights.loading import (
    Differences,
    State,
    check_temperature,
    count,
    load_checkpoint,
    matches,
)
from models.weights.stated import check_stated

LAYER = re.compile(r"(.*encoder\.layer\.)(\d+)(\..*)")
VISION = ("visual_encoder.", "visual_encoder_m.")
MOMENTUM = (
    "visual_encoder_m.*",
    "text_encoder_m.*",
    "text_decoder_m.*",
    "*_proj_m.*",
    "*_head_m.*",
)
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
CONTRASTIVE = ("temp", "vision_proj.*", "text_proj.*")
PRETRAIN_HEADS = ("text_encoder*.cls.*", "mim_head*", "concept_head*", "visual_encoder*.mask_token")
OF_BERT = ("config.json", "model.safetensors", "pytorch_model.bin")
WORDS = [f"text_{part}.embeddings.word_embeddings.weight" for part in ("encoder", "decoder.bert")]
BLIP_VOCABULARY = 30524  # BERT's 30522 with [DEC] and [ENC]
CLS_HEAD = ("cls_head.*", "cls_head_m.*")


# ---- kinds of checkpoint


def checkpoint_kind(state: State) -> str:
    """What a state dict is: "pretrain", "retrieval", "vqa", "ve", "text_assignment", "nlvr", "vit"
    or "bert".

    Raises `UserError` for anything else.
    """
    tables = [state[name] for name in WORDS if name in state]
    if any(len(table) == BLIP_VOCABULARY for table in tables):
        raise UnfitWeights(
            "a checkpoint of BLIP, whose text encoder fuses in every layer and knows two tokens "
            "more than ALBEF's: evaluate BLIP with eval_zeroshot.py --model "
            "hf/Salesforce/blip-itm-base-coco"
        )
    if any(key.startswith("Qformer.") for key in state):
        raise UnfitWeights(
            "a checkpoint of BLIP-2, whose querying transformer is not here; give one of ALBEF or SIMLA"
        )
    if any(key.startswith("text_decoder.") for key in state):
        return "vqa"
    if "text_encoder.bert.embeddings.word_embeddings.weight" in state:
        return "pretrain"
    if "text_encoder.embeddings.word_embeddings.weight" in state:
        if "ta_head.weight" in state:
            return "text_assignment"
        if "cls_head.2.weight" in state:
            return "ve" if len(state["cls_head.2.weight"]) == 3 else "nlvr"
        return "retrieval"
    if "patch_embed.proj.weight" in state and "cls_token" in state:
        return "vit"
    if any(key.endswith("embeddings.word_embeddings.weight") for key in state):
        return "bert"
    raise UnfitWeights(f"a checkpoint of no known kind; its first keys are {some(list(state))}")


# ---- renames, one at a time


def strip_bert(state: State) -> dict[str, Tensor]:
    """`text_encoder.bert.*` -> `text_encoder.*`, the momentum copy alike: the encoder without its
    word head."""
    return {
        re.sub(r"^(text_encoder(?:_m)?\.)bert\.", r"\1", key): value for key, value in state.items()
    }


def fit_positions(state: State, target: State) -> dict[str, Tensor]:
    """Both vision encoders' position embeddings, interpolated to the grid of the target."""
    fitted = dict(state)
    for key in (f"{prefix}pos_embed" for prefix in VISION):
        if key in state and key in target:
            fitted[key] = resize_positions(state[key], round((target[key].shape[1] - 1) ** 0.5))
    return fitted


def fit_queues(state: State, target: State) -> dict[str, Tensor]:
    """The queues as they are where the sizes agree; dropped together, pointer included, where they
    do not."""
    common = [key for key in QUEUES if key in state and key in target]
    if all(state[key].shape == target[key].shape for key in common):
        return dict(state)
    return {key: value for key, value in state.items() if key not in QUEUES}


def split_decoder(state: State, decoder_layers: int) -> dict[str, Tensor]:
    """A pre-trained text encoder with head becomes the VQA pair, for the momentum copies alike.

    Encoder: all layers, without the head. Decoder: the last `decoder_layers` layers (6 of 12),
    numbered from 0, with the encoder's embeddings and head.
    """
    result = {}
    for key, value in state.items():
        module, _, rest = key.partition(".")
        if module not in ("text_encoder", "text_encoder_m"):
            result[key] = value
            continue
        decoder = module.replace("encoder", "decoder")
        layer = LAYER.fullmatch(rest)
        if not rest.startswith("cls."):
            result[f"{module}.{rest.removeprefix('bert.')}"] = value
        if layer is None:
            result[f"{decoder}.{rest}"] = value
        elif (index := int(layer[2]) - (depth(state, module) - decoder_layers)) >= 0:
            result[f"{decoder}.{layer[1]}{index}{layer[3]}"] = value
    return result


def double_fusion(state: State, target_layers: int) -> dict[str, Tensor]:
    """NLVR's text encoder: every fusion layer twice in a row, one per image (12 layers -> 18, from
    layer 6 on)."""
    source_layers = depth(state, "text_encoder")
    first = 2 * source_layers - target_layers
    if not 0 <= first <= source_layers:
        raise UserError(
            f"a text encoder of {source_layers} layers cannot become one of {target_layers} for two "
            "images"
        )
    result = {}
    for key, value in state.items():
        layer = LAYER.fullmatch(key)
        if layer is None or not key.startswith("text_encoder.") or int(layer[2]) < first:
            result[key] = value
        else:
            index = first + 2 * (int(layer[2]) - first)
            result[f"{layer[1]}{index}{layer[3]}"] = value
            result[f"{layer[1]}{index + 1}{layer[3]}"] = value
    return result


def without_momentum(state: State) -> dict[str, Tensor]:
    """Only the online networks."""
    return {key: value for key, value in state.items() if not matches(key, MOMENTUM)}


def momentum_from_online(state: State, target: State) -> dict[str, Tensor]:
    """The momentum copies the target has and `state` lacks, from the online weights in `state`."""
    copies = {}
    for key in target:
        online = re.sub(r"^(\w+)_m\.", r"\1.", key)
        if key not in state and matches(key, MOMENTUM) and online in state:
            copies[key] = state[online]
    return copies


def depth(state: State, module: str) -> int:
    """Number of transformer layers below the given module of a state dict."""
    return count(state, rf"(?={module}\.).*encoder\.layer\.(\d+)\.")


# ---- starting a task


@dataclass(frozen=True)
class Conversion:
    """How a task starts from a checkpoint of another kind."""

    # kinds of checkpoint that can be converted; the task's own kind always loads
    sources: tuple[str, ...]
    # (checkpoint, target's state) -> renamed checkpoint
    convert: Callable[[State, State], State]
    initial: tuple[str, ...] = ()  # patterns of target keys the checkpoint has nothing for
    ignored: tuple[str, ...] = ()  # patterns of checkpoint keys the task has no use for
    before: str = ""  # the command that makes one of `sources` from another checkpoint


NO_CONTRAST = (*PRETRAIN_HEADS, *QUEUES, "temp", "*_proj.*", "*_proj_m.*", "itm_head.*")
STARTS = {
    "pretrain": Conversion(sources=(), convert=lambda state, target: state),
    "retrieval": Conversion(
        sources=("pretrain",),
        convert=lambda state, target: strip_bert(state),
        initial=("idx_queue",),
        ignored=PRETRAIN_HEADS,
    ),
    "ve": Conversion(
        sources=("pretrain", "retrieval"),
        convert=lambda state, target: strip_bert(state),
        initial=CLS_HEAD,
        ignored=NO_CONTRAST,
    ),
    "vqa": Conversion(
        sources=("pretrain",),
        convert=lambda state, target: split_decoder(state, depth(target, "text_decoder")),
        ignored=NO_CONTRAST,
    ),
    "text_assignment": Conversion(
        sources=("pretrain", "retrieval"),
        convert=lambda state, target: double_fusion(
            without_momentum(strip_bert(state)), depth(target, "text_encoder")
        ),
        initial=("ta_head.*", "text_encoder.embeddings.token_type_embeddings.weight"),
        ignored=(*PRETRAIN_HEADS, *QUEUES, "itm_head.*"),
    ),
    "nlvr": Conversion(
        sources=("text_assignment",),
        convert=lambda state, target: state,
        initial=CLS_HEAD,
        ignored=(*CONTRASTIVE, "ta_head.*"),
        before="NLVR.py --config configs/NLVR/assignment.yaml",
    ),
}


def check_kind(state: State, task: str) -> str:
    """The kind of a checkpoint, of none the task's own. Raises `UserError` for one the task cannot
    start from."""
    kind = checkpoint_kind(state) if state else task
    start = STARTS[task]
    if kind not in (task, *start.sources):
        kinds = " or ".join((task, *start.sources))
        remedy = f"; run {start.before} with it first" if start.before else "; give another"
        raise UserError(
            f"checkpoint: this is a {kind} checkpoint, and {task} starts from {kinds}{remedy}"
        )
    return kind


def adapt(state: State, target: State, task: str) -> dict[str, Tensor]:
    """`state` of any fitting kind under the names and at the resolution of the task's model, whose
    state is `target`.

    Position embeddings are interpolated, layers renumbered; queues of another size are dropped.
    Keys the model has no use for stay in, so that the caller sees them. Raises `UserError` for a
    kind the task cannot start from.
    """
    if check_kind(state, task) != task:
        state = STARTS[task].convert(state, target)
    return fit_queues(fit_positions(state, target), target)


def start_from(
    model: nn.Module, state: State, task: str, fill_momentum: bool = True
) -> Differences:
    """Loads a checkpoint of any fitting kind into the model of a task, and returns what was left
    out on either side.

    A checkpoint of the task's own kind (a fine-tuned model) must fit as it is, another kind is
    converted by `adapt`. Momentum copies the checkpoint lacks (text assignment has none, nor has ALBEF's refcoco.pth)
    start as copies of the online weights; with fill_momentum=False they keep their initial values,
    as NLVR's do in the originals. Raises `UserError`.
    """
    target = model.state_dict()
    start = STARTS[task]
    adapted = adapt(state, target, task)
    if "temp" in target and "temp" in adapted:
        check_temperature("temp", adapted["temp"])
    if fill_momentum:
        adapted.update(momentum_from_online(adapted, target))
    missing = [*MOMENTUM, *QUEUES]
    unexpected = [*MOMENTUM, *QUEUES]
    if checkpoint_kind(state) == task:
        unexpected.append("visual_encoder*.mask_token")
    else:
        missing += start.initial
        unexpected += start.ignored
    return load_checkpoint(model, adapted, missing, unexpected)


def start_task(
    model: nn.Module, state: State, task: str, checkpoint: Path | None, fill_momentum: bool = True
) -> None:
    """`start_from` with the weights of `checkpoint`, where there are any, and a line that says what
    was left out."""
    if state:
        left_out = start_from(model, state, task, fill_momentum)
        say(f"{checkpoint}: {left_out.note()}")


# ---- BERT and DeiT


NO_BERT = ("roberta", "camembert", "data2vec")  # whose weights are called and shaped as a BERT's


def load_bert(
    model: nn.Module, state: State, described: Mapping[str, Any] | None = None
) -> Differences:
    """Loads a BERT, as `load_bert_folder` reads it, into an `XBert` or `XBertLM` and returns what
    was left out.

    described: its config.json, which must describe what the network computes.

    BERT has no cross-attention and SIMLA no token types; layers only one of the two has are left
    out too, and the word head where the file has none. A line names layers that stay random, as
    they do in the originals. Anything else that differs is a `UserError`.
    """
    kind = str((described or {}).get("model_type"))
    if any(name in kind for name in NO_BERT):
        at = "counts positions from behind its padding, unlike BERT"
        raise UserError(f"config.json: a {kind}, which {at}; start from a BERT")
    head = hasattr(model, "cls")
    shape = model.config
    computed = {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (shape.layer_norm_eps,),
        "num_attention_heads": (shape.num_attention_heads,),
    }
    remedy = "set it in bert_config, or start from another BERT"
    check_stated("config.json", described or {}, computed, remedy)
    weights = bert_weights(state, head)
    module = "bert" if head else "encoder"
    given = depth(weights, module)
    wanted = depth(model.state_dict(), module)
    missing = ["*crossattention*", *(f"*encoder.layer.{i}.*" for i in range(given, wanted))]
    unexpected = [
        "*token_type_embeddings*",
        *(f"*encoder.layer.{i}.*" for i in range(wanted, given)),
    ]
    if "cls.predictions.bias" not in weights:
        missing.append("cls.predictions.*")
    if given < wanted:
        layers = ", ".join(map(str, range(given, wanted)))
        say(f"note: the BERT has {given} layers, bert_config {wanted}: random at first: {layers}")
    return load_checkpoint(model, weights, missing, unexpected)


def bert_weights(state: State, head: bool) -> dict[str, Tensor]:
    """Weights of transformers' BERT, in any of its spellings, under the names of `XBertLM` (head)
    or `XBert` (no head).

    Takes keys with or without `bert.`, LayerNorm's old `gamma`/`beta`, and files without the tied
    `decoder` entries; drops the pooler and the next-sentence head. Raises `UserError` where there
    are no word embeddings or, as in DistilBERT, no layers of these names.
    """
    body = {}
    words = {}
    for key, value in state.items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        if key.startswith("cls.predictions."):
            words[key] = value
        elif key.removeprefix("bert.").startswith(("embeddings.", "encoder.")):
            body[key.removeprefix("bert.")] = value
    if "embeddings.word_embeddings.weight" not in body or not depth(body, "encoder"):
        keys = some(list(state))
        raise UserError(f"not the weights of a BERT: no word embeddings and layers among {keys}")
    if not head:
        return body
    if "cls.predictions.bias" in words:
        words["cls.predictions.decoder.bias"] = words["cls.predictions.bias"]
    words["cls.predictions.decoder.weight"] = body["embeddings.word_embeddings.weight"]
    return {f"bert.{key}": value for key, value in body.items()} | words


def load_bert_folder(name: str | Path) -> tuple[dict[str, Tensor], dict]:
    """`(state dict, config)` of a BERT in a local folder, or of a name on the Hugging Face hub
    (`bert-base-uncased`).

    Reads config.json and the shards of an index, else model.safetensors or pytorch_model.bin. A hub name is
    looked up in the local cache first. Raises `UserError` with the remedy where it is neither a
    folder nor to be had.
    """
    folder = Path(name)
    if folder.is_dir():
        files = {file: folder / file for file in OF_BERT if (folder / file).is_file()}
    elif folder.is_file() or folder.is_absolute() or str(name).startswith("."):
        raise UserError(f"{name}: no folder; give the one of a BERT's config.json and weights")
    else:
        files = _hub_files(str(name))
    index = find_index(folder)
    weights = index or files.get("model.safetensors") or files.get("pytorch_model.bin")
    if weights is None or "config.json" not in files:
        raise UserError(
            f"{name}: needs config.json and model.safetensors or pytorch_model.bin, has "
            f"{some([*files])}"
        )
    config = read_json(files["config.json"], dict)
    return read_index(index) if index else read_tensors(weights), config


def _hub_files(name: str) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = {}
    with from_hub(name, name):
        for file in OF_BERT:
            if file == "pytorch_model.bin" and "model.safetensors" in found:
                break
            try:
                found[file] = Path(hf_hub_download(name, file))
            except LocalEntryNotFoundError:
                raise  # not in the cache, and the hub was not asked
            except EntryNotFoundError:
                continue  # the hub answered, and has no such file
    return found


def deit_weights(state: State, grid: int) -> dict[str, Tensor]:
    """ImageNet DeiT or timm ViT weights for a `ViT` with grid x grid patches; the classifier is
    dropped.

    Load with `allowed_missing=("mask_token",)`. Raises `UserError` for a distilled DeiT (two
    special tokens).
    """
    if "dist_token" in state:
        raise UserError(
            "these are distilled DeiT weights (dist_token); use deit_base_patch16_224-b5f2ef4d.pth"
        )
    kept = {
        key: value
        for key, value in state.items()
        if not key.startswith(("head.", "pre_logits.", "fc_norm."))
    }
    if "pos_embed" not in kept:
        raise UserError(
            f"not the weights of a vision transformer: no pos_embed among {some(list(state))}"
        )
    return kept | {"pos_embed": resize_positions(kept["pos_embed"], grid)}
