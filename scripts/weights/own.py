"""Weights under the names they have here, which are the originals', with what the scripts read
beside them and nothing of the machine that they come from."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.writing import make_folder, write_json, write_text
from runtime.checkpoint import export_safetensors
from runtime.config.from_checkpoint import BESIDE
from runtime.config.yaml import yaml_lines
from scripts.weights.source import Options, Source, Written

VOCABULARIES = ("tokenizer", "text_encoder")  # options of a run: folders or files
SINGLE = ("bpe_path", "bert_config", "answer_list")  # likewise, files alone
# what tokenizers read in a folder, and beside a file
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
OF_LIBRARIES = ("model", "text_tower")  # of a network: their folders are part of their names
# a path from the root or the home folder on, alone or behind another word; no address of the web
LOCAL_PATH = re.compile(r"(?:(?<=[\s:=,;|'\"(\[{])|^)(?:~[^/\s]*|\.{1,2})?/(?!/)[^\s:,;|'\"]*")


def write_own(
    source: Source,
    options: Options,
    folder: Path,
    use: str,
    task: str,
    network: Mapping[str, Any] | None = None,
) -> Written:
    """model.safetensors and what the scripts read beside it: of a run its config.yaml and its
    tokenizer, of others' weights their JSON files. network: of a checkpoint that states it otherwise.
    """
    at_home = folder.resolve() == source.file.parent.resolve()  # where all lies as the run left it
    config = dict(source.about.get("config", {})) if at_home else movable(source, options, folder)
    export_safetensors(source.weights, folder / "model.safetensors")
    for name in BESIDE:
        if name in source.about and not at_home:
            write_json(folder / name, public(source.about[name]), indent=2)
    if network:
        config["network"] = dict(network)
    if config:
        write_text(folder / "config.yaml", "\n".join(yaml_lines(config)) + "\n")
    return Written("quintet", task, OWN_EXAMPLE + f"# scripts of this project: python {use}\n")


def movable(source: Source, options: Options, folder: Path) -> dict[str, Any]:
    """The run's configuration for a folder that may lie anywhere: the files that its network needs
    are copied into it, and no other path stays."""
    saved = dict(source.about.get("config", {}))
    if source.family == "nxtp" and saved.get("llama"):
        saved["tokenizer"] = saved.get("tokenizer") or saved["llama"]
    key = "text_encoder" if source.family == "fusion" else "tokenizer"
    stated = {key: options.tokenizer, "bpe_path": options.bpe_path}
    saved |= {name: str(value) for name, value in stated.items() if value}
    found = public(saved)
    for name in (*VOCABULARIES, *SINGLE):
        if isinstance(saved.get(name), str) and Path(saved[name]).exists():
            found[name] = copied(name, Path(saved[name]), folder)
    network = saved.get("network")
    if isinstance(network, Mapping):
        found["network"] |= {name: network[name] for name in OF_LIBRARIES if name in network}
        check_pushed(network, options)
    return found | {"output_dir": "."} if found else {}


def check_pushed(network: Mapping[str, Any], options: Options) -> None:
    """UserError for a network in a library's folder on this machine, which an upload would lack."""
    for name in OF_LIBRARIES:
        path = re.sub("^(hf/|open_clip/local-dir:)", "", str(network.get(name)))
        if options.repository and path != network.get(name) and Path(path).exists():
            raise UserError(
                f"--push: {name} {network[name]} is a folder of this machine, without which the "
                "weights do not open: use --to hf, open_clip or onnx"
            )


def copied(name: str, path: Path, folder: Path) -> str:
    """Copy the file or folder of an option into the folder; where it lies there."""
    if name in SINGLE:
        target = name + "".join(path.suffixes)
        shutil.copyfile(path, folder / target)
        return target
    copy_tokenizer(path, make_folder(folder / name, "--output"))
    return name if path.is_dir() else f"{name}/{path.name}"


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy a tokenizer, a file or the folder of one, with what it reads beside itself."""
    inside = path if path.is_dir() else path.parent
    names = TOKENIZER_FILES if path.is_dir() else (path.name, "tokenizer_config.json")
    if path.is_dir() and (inside.parent / "tokenizer.model").is_file():  # as Meta's download has it
        names = [name for name in names if (inside / name).is_file()]
        if "tokenizer.model" not in names:
            shutil.copyfile(inside.parent / "tokenizer.model", folder / "tokenizer.model")
    for name in names:
        if (inside / name).is_file():
            shutil.copyfile(inside / name, folder / name)


def public(value: Any) -> Any:
    """A value without the folders of this machine, of which the last part stays, and without the
    passwords, tokens and signatures of addresses."""
    if isinstance(value, Mapping):
        return {public(key): public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"file://(?=/)", "", value)
    if value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    if kind := re.match(r"[\w.-]+:(?=~|\.{0,2}/(?!/))", value):  # imagefolder:/home/me/a b
        return kind[0] + public(value[kind.end() :])
    value = re.sub(r"(?<=://)[^/@\s]*@", "", value)
    value = re.sub(r"(://[^\s?]*)\?\S*", r"\1", value)
    return LOCAL_PATH.sub(lambda found: Path(found[0]).name, value)


OWN_EXAMPLE = """
from safetensors import safe_open

with safe_open("model.safetensors", framework="pt") as file:
    print(len(file.keys()), "tensors")
"""
