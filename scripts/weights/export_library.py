"""Runs of main.py with a library's CLIP or SigLIP, back in that library's layout."""

from pathlib import Path
from typing import Any

from torch import nn

from base.errors import UserError
from base.libraries import ELSEWHERE, hugging_face_processor, name_and_tag
from base.reading import read_json
from base.writing import write_json
from models.weights.any_dual_encoder import Opened
from runtime.checkpoint import export_safetensors
from scripts.weights.beside import clip_processor, square_processor


def library_to_open_clip(opened: Opened, folder: Path, repository: str | None = None) -> None:
    """What open_clip loads by `local-dir:FOLDER`, or by `hf-hub:repository` where it is pushed.
    UserError for transformers' networks."""
    network = opened.model.network
    if not opened.title.startswith("open_clip/"):
        raise UserError(f"{opened.title}: transformers' network; use --to hf, onnx or safetensors")
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    export_safetensors(weights, folder / "open_clip_model.safetensors")
    settings = _settings(opened.title.removeprefix("open_clip/"))
    tokenizer = opened.tokenize.func.backend
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        name = repository or "local"  # of a folder open_clip takes the files in it
        settings["text_cfg"] = {**settings["text_cfg"], "hf_tokenizer_name": name}
    look = {**network.visual.preprocess_cfg}
    names = ("mean", "std", "interpolation", "resize_mode")
    about = {"model_cfg": settings, "preprocess_cfg": {name: look[name] for name in names}}
    write_json(folder / "open_clip_config.json", about, indent=2)


def _settings(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model."""
    import open_clip

    name, _ = name_and_tag(name)
    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return read_json(file, dict)["model_cfg"]
    if name.startswith(ELSEWHERE):
        raise UserError(f"open_clip/{name}: fetch the folder, and train from local-dir:FOLDER")
    return open_clip.get_model_config(name)


def library_to_hugging_face(opened: Opened, folder: Path) -> None:
    """What transformers loads from the folder. UserError for open_clip's networks."""
    if not opened.title.startswith("hf/"):
        raise UserError(
            f"{opened.title}: open_clip's network; use --to open_clip, onnx or safetensors"
        )
    network: nn.Module = opened.model.network
    network.save_pretrained(folder)
    write_library_inputs(opened, folder)


def write_library_inputs(opened: Opened, folder: Path) -> None:
    """Image processor and tokenizer, as transformers reads them."""
    tokenizer = opened.tokenize.func.backend
    if opened.title.startswith("hf/"):
        hugging_face_processor(opened.title.removeprefix("hf/")).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    look = opened.model.network.visual.preprocess_cfg
    square = look.get("resize_mode") == "squash"
    processor = (square_processor if square else clip_processor)(opened.pixels)
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
