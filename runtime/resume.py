"""Whether a command continues the run that an output folder holds, and whether its checkpoint
fits."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import UserError, brief
from runtime.config.values import differences

# what makes a run another one, under every name that the scripts have for it
WEIGHTS = (
    "checkpoint",
    "clip",
    "image_tokenizer_path",
    "init_text_encoder",
    "llama",
    "text_weights",
    "vision_weights",
)
DATA = (
    "answer_list",
    "classes",
    "data",
    "dataset",
    "metadata",
    "refcoco_data",
    "shards",
    "train_data",
    "train_file",
    "train_list",
    "val",
    "val_data",
    "val_dataset",
    "val_file",
    "val_folder",
    "weights",
)
NETWORK = (
    "bert_config",
    "bpe_path",
    "decoder_layers",
    "embed_dim",
    "image_res",
    "method",
    "network",
    "patch_size",
    "size",
    "stage",
    "text_encoder",
    "tokenizer",
    "vision_depth",
    "vision_heads",
    "vision_stem",
    "vision_tower",
    "vision_width",
)
# how it is optimized: the sections of most scripts, and main.py's schedule
OPTIMIZATION = (
    "cooldown",
    "duration",
    "lr_end",
    "lr_start",
    "optimizer",
    "sched",
    "scheduler",
    "warmup",
)
# with the number of processes, the global batch
BATCH = ("accumulate", "batch_size", "batch_size_train")
# options of a network that say how it is trained or computed, not what it is
TRAINING = (
    "attention_dropout",
    "barlip_lamb",
    "barlip_scale_loss",
    "bert_dropout",
    "drop_connect",
    "drop_path",
    "dropout",
    "label_smoothing",
    "loss_avg_or_sum",
    "sk_iters",
    "ssl_scale",
    "ssl_temp",
    "swalip_weight",
    "target_epsilon",
    "text_drop_path_prob",
    "text_dropout_prob",
    "tile",
)
ENTRIES = ("model", "optimizer", "scaler", "step", "per_rank", "config")
SHOWN = 3  # changes or weights named in a message


def script_of(config: Any) -> str:
    """File name of the script whose configuration this is."""
    return Path(inspect.getfile(type(config))).name


def check_same_run(
    saved: Mapping[str, Any],
    path: Path,
    script: str,
    config: Mapping[str, Any],
    processes: int,
    insist: bool,
) -> None:
    """Check that a command continues the run that made the checkpoint `path`.

    saved: the checkpoint's content; config: the command's options as plain data. Other data,
    starting weights, sizes, or another optimization are refused with a UserError, unless the user
    insists. The same global batch may be spread over other processes and micro-batches.
    """
    lacking = [name for name in ENTRIES if name not in saved]
    if lacking:
        raise UserError(
            f"{path} cannot be resumed from, it lacks {', '.join(lacking)}; "
            "choose another --output_dir, and start from its weights with --checkpoint"
        )
    elsewhere = "choose another --output_dir, or --resume no to start from scratch"
    made_by = saved.get("script", script)  # earlier versions did not save it
    if made_by != script:
        raise UserError(f"{path} is of a run of {made_by}, not of {script}; {elsewhere}")
    before, now = saved["config"], config
    optimizers = [options.get("optimizer", {}).get("opt") for options in (before, now)]
    if optimizers[0] != optimizers[1]:
        raise UserError(
            f"{path} was trained with --opt {optimizers[0]}, whose state does not fit "
            f"--opt {optimizers[1]}; {elsewhere}"
        )
    names = WEIGHTS + DATA + NETWORK + OPTIMIZATION
    if global_batch(before, len(saved["per_rank"])) != global_batch(now, processes):
        names += BATCH
    changed = changes(before, now, names)
    if changed and not insist:
        raise UserError(
            f"{path.parent} holds another run ({listed(changed)}); {elsewhere}, "
            "or --resume yes to continue it with these options, where its weights fit them"
        )


def global_batch(config: Mapping[str, Any], processes: int) -> int:
    """Samples of an update over all processes."""
    size = config.get("batch_size", config.get("batch_size_train", 1))
    return size * config.get("accumulate", 1) * processes


def changes(before: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Lines `image_res: 64 -> 32` of what differs; an option that one side does not know does
    not."""
    old = {}
    new = {}
    for name in names:
        if name in before and name in now:
            folders = before.get("output_dir"), now.get("output_dir")
            old[name], new[name] = _common(before[name], now[name], *folders)
    return differences(old, new)


def _common(before: Any, now: Any, old_folder: Any, new_folder: Any) -> tuple[Any, Any]:
    """Two values of an option, of a section the options that both have; equal where they name the
    same file, or the same one of the run's folder, which may be called otherwise by now."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        both = [name for name in now if name in before and name not in TRAINING]
        pairs = {}
        for name in both:
            pairs[name] = _common(before[name], now[name], old_folder, new_folder)
        return {k: pair[0] for k, pair in pairs.items()}, {k: pair[1] for k, pair in pairs.items()}
    same = _absolute(before, old_folder) == _absolute(now, new_folder)
    return (now, now) if same else (before, now)


def _absolute(value: Any, folder: Any) -> Any:
    """A path, or several; one in the run's folder from there on, other values as they are."""
    if isinstance(value, list | tuple):
        return [_absolute(each, folder) for each in value]
    if not isinstance(value, str):
        return value
    path = os.path.abspath(value)
    inside = isinstance(folder, str) and path.startswith(os.path.abspath(folder) + os.sep)
    return os.path.relpath(path, folder) if inside else path


def listed(lines: list[str]) -> str:
    """The first lines in one, and how many there are beside them."""
    shown = [line if len(line) < 200 else brief(line) for line in lines[:SHOWN]]
    more = len(lines) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_weights_fit(
    saved: Mapping[str, Any], path: Path, model: nn.Module, config: Mapping
) -> None:
    """Check that a checkpoint has every weight of the network, in its shape, and no other.

    A weight that is missing would keep its initial value without a word: a moving average or a
    momentum teacher that was turned on later, for instance.
    """
    weights: Mapping[str, torch.Tensor] = saved["model"]
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"no {name}" for name in wanted if name not in weights]
    wrong += [f"{name} besides" for name in weights if name not in wanted]
    for name, shape in wanted.items():
        if name in weights and tuple(weights[name].shape) != shape:
            wrong.append(f"{name} {list(weights[name].shape)} instead of {list(shape)}")
    if not wrong:
        return
    changed = differences(saved["config"], config)
    since = f"; options changed since: {listed(changed)}" if changed else ""
    raise UserError(
        f"{path} does not fit this network ({listed(wrong)}){since}; "
        "give the options it was made with, or another --output_dir"
    )
