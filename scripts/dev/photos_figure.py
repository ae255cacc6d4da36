"""The README's second figure: what the model of scripts/photos.sh makes of two photographs that may
be shown, unlike the images it learnt from.

    python scripts/dev/photos_figure.py

scikit-learn ships china.jpg and flower.jpg, CC BY 2.0. Each stands beside the likeliest of
ImageNet's class names and of sentences that nobody was trained on. Needs a run of photos.sh and
Chromium.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from markupsafe import Markup
from torch import Tensor

from base.distributed import World
from base.errors import UserError
from base.writing import write_text
from evaluation.demo.abilities import Embedder
from evaluation.report.page import card, case, figure, group, heading, join, page, ranked, thumbnail
from models.layers.library_towers import class_names
from runtime.config.cli import knob, run_script
from scripts.demo import Config as DemoConfig
from scripts.demo_checkpoints.any_checkpoint import open_abilities
from scripts.dev import readme_figure

PHOTOGRAPHS = {  # file of scikit-learn, and who took it
    "china.jpg": "danielbuechele on Flickr, CC BY 2.0",
    "flower.jpg": "vultilion on Flickr, CC BY 2.0",
}
NAMES = "dataset/prompts/labels.json:imagenet"
SENTENCES = (
    "A temple under a blue sky.",
    "An old castle by the sea.",
    "A crowd in front of a museum.",
    "A yellow flower in bloom.",
    "A bee on a leaf.",
    "Fruit in a bowl.",
    "A fast car on a road.",
    "A dog playing with a ball.",
)
SHOWN = 4  # of the likeliest


@dataclass
class Config:
    run: Path = knob(Path("output/photos/en-0"), "folder of photos.sh, which has main")
    output: Path = knob(Path("docs/images/photos.png"), "PNG to write; its page goes to the run")
    browser: str = knob("chromium", "Chromium or Chrome: a command")


def photograph(name: str) -> Tensor:
    """uint8 [3,H,W] of a photograph that scikit-learn ships."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)


def likeliest(image: Tensor, embedder: Embedder, texts: Sequence[str], rows: Tensor) -> Markup:
    """The first texts by their softmax probabilities; rows: their embeddings, [K,E]."""
    (row,) = embedder.images(embedder.view(image)[None])
    probabilities = (embedder.scale * rows @ row).softmax(0)
    best, numbers = probabilities.topk(SHOWN)
    items = []
    for probability, number in zip(best.tolist(), numbers.tolist(), strict=True):
        items.append((texts[number], f"{probability:.0%}", "other", probability))
    return ranked(items)


def main(config: Config) -> None:
    run = config.run / "main"
    if not run.is_dir():
        raise UserError(f"{run}: no such run; run photos.sh first")
    world = World(0, 1, 0, torch.device("cpu"))
    embedder = open_abilities(run, DemoConfig(device="cpu"), world).embedder
    names = class_names(NAMES)
    name_rows = embedder.texts([embedder.template.format(name) for name in names])
    sentence_rows = embedder.texts(SENTENCES)
    cases = []
    for file, author in PHOTOGRAPHS.items():
        image = photograph(file)
        said = join(
            heading(f"Likeliest of {len(names):,} names"),
            likeliest(image, embedder, names, name_rows),
            heading(f"Likeliest of {len(SENTENCES)} sentences"),
            likeliest(image, embedder, SENTENCES, sentence_rows),
        )
        cases.append(case(figure(thumbnail(image, 190), f"{file}: {author}"), said))
    written = config.run / "photographs.html"
    shown = card("", group("cases", cases))
    write_text(written, page("Two photographs", [shown], str(run)))
    readme_figure.main(readme_figure.Config(written, config.output, config.browser))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
