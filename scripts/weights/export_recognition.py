"""Export a recognition network to ONNX, and check that onnxruntime finds the same labels.

    python scripts/weights/export_recognition.py --checkpoint output/Recognition/digitscenes --target onnx/
    python scripts/weights/export_recognition.py --checkpoint ckpt.pth --clip ViT-L-14.pt --tokenizer llama-2
    --target onnx/

Three graphs with their weights beside them: `image.onnx` (images -> image tokens), `prefill.onnx`
(image tokens and prompt -> logits and cache) and `step.onnx` (one more token for every label, cache
in, cache out), for any number of images and labels. `OnnxNetwork` runs them under
models/recognition/decoding.py. Needs the pip packages onnx, onnxscript and
onnxruntime.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import Recognition
from base import distributed
from base.errors import UserError
from base.writing import make_folder
from dataset.tasks.recognition import Sequences
from dataset.text.sentencepiece import PieceTokenizer
from models.recognition.decoding import one_shot, rank_labels
from models.recognition.nxtp import Nxtp
from runtime.config.cli import knob, run_script
from scripts.weights.graphs import ANY, Graph, write_graph


@dataclass
class Config(Recognition.Config):
    """The network as for Recognition.py, and where to put it."""

    checkpoint: Path | None = knob(
        None, "network to export, a file or the directory of a run", required=True
    )
    target: Path = knob(Path("onnx"), "folder to write to")
    labels: int = knob(8, "labels an image in the check", low=1)


def export(model: Nxtp, prompt: Tensor, target: Path) -> None:
    """Write the three graphs, of any number of images, labels and cached positions: images
    [B,3,S,S] -> image tokens [B,N,D]; these and the prompt [P] -> logits [B,V], keys and values
    [B,H,S,d] of every block; tokens [B,M], place [M], mask [B,1,M,S+M] and the cache -> logits
    [B,M,V] and the cache.
    """
    make_folder(target, "--target")

    def prefill(images: Tensor, prompt: Tensor):
        logits, cache = model.prefill(images, prompt)
        return logits, *(part for pair in cache for part in pair)

    def step(tokens: Tensor, place: Tensor, mask: Tensor, *cache: Tensor):
        pairs = list(zip(cache[::2], cache[1::2], strict=True))
        logits, grown = model.step(tokens, place, mask, pairs)
        return logits, *(part for pair in grown for part in pair)

    size = model.config.vision.image_size
    image = torch.zeros(2, 3, size, size)
    images = model.encode_image(image)
    cache = prefill(images, prompt)[1:]
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    seen = cache[0].shape[2]
    place = torch.full((3,), seen)
    mask = torch.ones(2, 1, 3, seen + 3, dtype=torch.bool)
    kept = [{0: ANY, 2: ANY} for _ in cache]
    rows = ({0: ANY, 1: ANY}, {0: ANY}, {0: ANY, 2: ANY, 3: ANY}, *kept)
    names = ["tokens", "place", "mask", *(f"cache_{number}" for number in range(len(cache)))]
    graphs = {
        "image": (model.encode_image, ["image"], (image,), ({0: ANY},)),
        "prefill": (prefill, ["images", "prompt"], (images, prompt), ({0: ANY}, None)),
        "step": (step, names, (tokens, place, mask, *cache), rows),
    }
    for name, (function, names, inputs, shapes) in graphs.items():
        write_graph(model, function, inputs, shapes, target / f"{name}.onnx", (names, None))


class OnnxNetwork:
    """The exported graphs with the methods that decoding asks for; tensors on the CPU."""

    def __init__(self, folder: Path):
        names = ("image", "prefill", "step")
        self.graphs = {name: Graph(folder / f"{name}.onnx") for name in names}

    def encode_image(self, image: Tensor) -> Tensor:
        return self.graphs["image"](image)[0]

    def prefill(self, images: Tensor, prompt: Tensor):
        logits, *cache = self.graphs["prefill"](images, prompt)
        return logits, list(zip(cache[::2], cache[1::2], strict=True))

    def step(self, tokens: Tensor, place: Tensor, mask: Tensor, cache):
        parts = [part for pair in cache for part in pair]
        logits, *grown = self.graphs["step"](tokens, place, mask, *parts)
        return logits, list(zip(grown[::2], grown[1::2], strict=True))


def check(
    model: Nxtp, exported: OnnxNetwork, prompt: Tensor, tokenizer: PieceTokenizer, labels: int
) -> dict:
    """Compare labels and probabilities of three random images; UserError where they differ."""
    size = model.config.vision.image_size
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = [
        one_shot(net, net.encode_image(image), prompt, tokenizer.delimiter, labels)
        for net in (model, exported)
    ]
    apart = float((found[0].probabilities - found[1].probabilities).abs().max())
    if not torch.equal(found[0].tokens, found[1].tokens) or apart > 1e-4:
        raise UserError(
            f"the exported network finds other labels (probabilities up to {apart:.1e} apart)"
        )
    best = [rank_labels(one.rows(0), tokenizer.decode)[0] for one in found]
    return {"labels_compared": 3 * labels, "probabilities_apart": apart, "best_label": best[0][0]}


@torch.no_grad()
def main(config: Config) -> None:
    config.evaluate = True
    world = distributed.init("cpu")
    Recognition.check(config, world)
    tokenizer = PieceTokenizer(config.tokenizer)
    model = Recognition.build_model(config, tokenizer, world).eval()
    prompt = torch.tensor(Sequences(tokenizer, config.max_text).opening)
    export(model, prompt, config.target)
    found = check(model, OnnxNetwork(config.target), prompt, tokenizer, config.labels)
    files = {path.name: path.stat().st_size for path in sorted(config.target.iterdir())}
    print(json.dumps({**found, "bytes": files}, indent=2))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
