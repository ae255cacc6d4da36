"""Small checkpoints to convert, and what this project makes of a photograph and a caption."""

import contextlib
import io
import runpy
from pathlib import Path

import torch
from torch import Tensor

from dataset.images.clip import normalize, pixel_statistics
from dataset.tasks.dual_inputs import eval_view
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.weights.any_dual_encoder import Opened
from runtime.checkpoint import export_safetensors
from scripts.weights.own import yaml_lines

CAPTIONS = ["A temple beneath a blue sky", "two digits"]
SMALL = {"image_size": 32, "embed_dim": 16, "text_width": 32, "text_heads": 2}
SMALL |= {"transformer_layers": 2, "context_length": 16, "vocab_size": 49408}


def photo():
    """A photograph, PIL RGB of 640 x 480: libraries cut the centre of an odd margin a pixel apart."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((640, 480))


def small_photo(side: int):
    """The same that needs no resizing by any rule, square."""
    return photo().resize((side, side))


def as_tensor(image) -> Tensor:
    """PIL -> uint8 [3,H,W]."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image)


def save_run(folder: Path, model: torch.nn.Module, config: dict) -> Path:
    """What a finished run leaves: weights and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    export_safetensors(model.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text("\n".join(yaml_lines(config)))
    return folder


def dual_run(folder: Path, model: str, tokenizer: str | None = None, **changes) -> Path:
    """A run of main.py with random weights that differ from their start everywhere."""
    torch.manual_seed(0)
    sizes = SMALL | changes
    network = build_dual(DualConfig(model=model, **sizes))
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.02 * torch.randn_like(value))
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(std=0.1)
    config = {"network": {"model": model, **sizes}}
    return save_run(folder, network, config | ({"tokenizer": tokenizer} if tokenizer else {}))


@torch.no_grad()
def embedded(opened: Opened, image) -> tuple[Tensor, Tensor]:
    """z of a PIL image [1,E] and of the captions [2,E], as eval_zeroshot.py computes them."""
    pixels = opened.pixels
    view = eval_view(opened.title, pixels.size, pixels.interpolation)(as_tensor(image))[None]
    statistics = pixel_statistics(torch.device("cpu"), pixels.mean, pixels.std)
    text = opened.model.embed_text(opened.tokenize(CAPTIONS))["z"]
    return opened.model.embed_image(normalize(view, statistics))["z"], text


def run_example(folder: Path, example: str, monkeypatch) -> str:
    """What a model card's program prints in its folder."""
    monkeypatch.chdir(folder)
    (folder / "example.py").write_text(example)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path("example.py")
    (folder / "example.py").unlink()
    return out.getvalue()
