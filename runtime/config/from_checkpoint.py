"""What a checkpoint says of the run that made it, and the options of a script that come from there.

take_from_checkpoint(config, options=("image_res", "network"))
"""

import os
import pickle
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.reading import read_json
from base.torch_files import find_index, is_safetensors, load_weights_only
from runtime.advice import launched_rank
from runtime.checkpoint import weights_file
from runtime.config.schema import Schema
from runtime.config.values import show
from runtime.config.yaml import read_yaml, to_dict
from runtime.safe_pickle import load_torch
from runtime.sharded import index_of

# options of a run that name a file or folder its network needs
FILES = ("text_encoder", "tokenizer", "llama", "bpe_path", "bert_config", "answer_list")
# with another value of these every weight fits, and the network computes something else
ARCHITECTURE = ("text_activation", "text_heads", "vision_activation", "vision_heads")
ARCHITECTURE += ("decoder_heads", "norm_eps", "rope_theta", "rope_scaling", "prefix_image")
IN_BERT = ("hidden_act", "layer_norm_eps", "num_attention_heads")


def check_architecture(config: Any, saved: Mapping[str, Any]) -> None:
    """Check that the options agree with the run that made config.checkpoint, as far as they shape
    what its weights compute: other attention heads would score differently without a word. An
    option that is None, or unknown to one side, is left out."""
    before = _architecture(saved)
    now = _architecture(to_dict(config))
    for name, value in now.items():
        if value is not None and before.get(name, value) not in (value, None):
            raise UserError(
                f"{config.checkpoint} was trained with {name} {before[name]}, not {value}: "
                f"leave out --{name.partition('.')[0]}, or give another --checkpoint"
            )


def _architecture(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says about the network, also in its section `network` and in the file
    `bert_config`."""
    network = options.get("network")
    options = {**options, **(network if isinstance(network, Mapping) else {})}
    found = {name: options[name] for name in ARCHITECTURE if name in options}
    bert = options.get("bert_config")
    if isinstance(bert, str) and Path(bert).is_file():
        geometry = read_json(bert, dict)
        for name in IN_BERT:
            found[f"bert_config.{name}"] = geometry.get(name)
    return found


def take_from_checkpoint(
    config: Any, *, options: Collection[str], none_is_open: bool = True
) -> dict[str, Any]:
    """Set the `options` of `config` (paths of knobs or sections) that are open to what the run that
    made config.checkpoint had; returns all that it had. Open is what neither the user nor code has
    set, and with `none_is_open` what is None. A note on stderr says what is taken.

    UserError where a value there is of the wrong type, or an option that is not open shapes the
    network and disagrees.
    """
    saved = saved_config(config.checkpoint)
    taken = []
    for path, option in Schema(type(config)).knobs.items():
        section, _, name = path.rpartition(".")
        own, theirs = config, saved
        if section:
            own, theirs = getattr(config, section), saved.get(section)
        names = (name, *option.aliases) if isinstance(theirs, Mapping) else ()
        key = next((key for key in names if key in theirs), None)
        before = getattr(own, name)
        is_given = path in getattr(config, "given", ()) or before != option.default
        is_open = not is_given or (none_is_open and before is None)
        if key is None or not is_open or not (path in options or section in options):
            continue
        try:
            found = option.read(theirs[key])
        except ValueError:
            wrong = f"{config.checkpoint}: its configuration has {path}: {theirs[key]!r}"
            raise UserError(f"{wrong}; give --{name} to override it") from None
        if section:
            setattr(config, section, replace(own, **{name: found}))
        else:
            setattr(config, name, found)
        if found != option.default:
            taken.append(f"{name} {show(found)}")
    if taken and launched_rank() == "0":
        note = f"as in {config.checkpoint}: {', '.join(taken)}"
        print("note:", note, file=sys.stderr, flush=True)  # the scores alone go to stdout
    check_architecture(config, saved)
    return saved


def saved_config(checkpoint: str | Path | None) -> dict[str, Any]:
    """Configuration of the run that made `checkpoint`, a file or run directory; empty where it is
    not known.

    It lies in this project's checkpoints and in most `.pth` files of ALBEF, and beside exported
    `.safetensors` in config.yaml. SIMLA's files hold it as an object of a foreign class, which is
    not read. FILES that are named relative to the folder where the run was started are found from
    any other.
    """
    if checkpoint is None:
        return {}
    path = Path(checkpoint)
    if path.is_dir():
        try:
            path = weights_file(path)  # the one whose weights are read
        except UserError:  # who reads the weights says what is wrong
            return {}
    if path.is_file() and is_safetensors(path):
        beside = path.with_name("config.yaml")
        return _found_from_here(read_yaml(beside)[0], path.parent) if beside.is_file() else {}
    try:
        content = load_weights_only(index_of(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, UserError):
        return {}  # who reads the weights says what is wrong
    found = content.get("config") if isinstance(content, Mapping) else None
    return _found_from_here(found, path.parent) if isinstance(found, Mapping) else {}


def _found_from_here(saved: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """`saved` with the FILES that are not below the current folder looked for in the folder `run`
    itself, which may have been moved, and below the folder where the run was started."""
    saved = dict(saved)
    output_dir = Path(str(saved.get("output_dir") or "."))
    below = Path(*run.absolute().parts[: -len(output_dir.parts) or None])
    for name in FILES:
        value = saved.get(name)
        if not isinstance(value, str) or os.path.isabs(value):
            continue
        places = [value]
        if Path(value).is_relative_to(output_dir):
            places.append(run / Path(value).relative_to(output_dir))
        if saved.get("output_dir") == ".":
            places.reverse()  # of an export, whatever the current folder holds
        if below / output_dir == run.absolute():
            places.append(below / value)
        found = [place for place in places if os.path.exists(place)]
        if found:
            saved[name] = str(found[0])
    return saved


BESIDE = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def description_of(file: Path) -> dict[str, Any]:
    """What lies in or beside a checkpoint about its network, as `open_dual` and `open_encoder` take
    it; of a folder, that of the weights which are taken there.

    `config` of a run of ours or ALBEF's and its `network`, where it has one, `args` of clip-rocket
    and SLIP, and the JSON files that Hugging Face and open_clip keep beside the weights.
    """
    file = weights_file(file)
    config = saved_config(file)
    about: dict[str, Any] = {"config": config} if config else {}
    if isinstance(config.get("network"), Mapping):
        about["network"] = config["network"]
    elif find_index(file) is None and not (file.is_file() and is_safetensors(file)):
        content = load_torch(index_of(file))
        arguments = content.get("args") if isinstance(content, Mapping) else None
        about |= {"args": arguments} if isinstance(arguments, Mapping) else {}
    for path in (file.with_name(name) for name in BESIDE):
        if path.is_file():
            about[path.name] = read_json(path, dict)
    return about
