"""The README's second figure: what the model of scripts/photos.sh makes of photographs that may be
shown, unlike the images it learnt from.

    pip install --no-deps scikit-image
    python scripts/dev/photos_figure.py

scikit-learn and scikit-image ship them. Each is described by one of the sentences; neither was
chosen by what the model makes of it. Needs a run of photos.sh and Chromium.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from base.distributed import ALONE
from base.errors import UserError
from base.writing import write_text
from dataset.images.decode import decode_image
from evaluation.demo.abilities import Embedder
from evaluation.report.examples import kind
from evaluation.report.page import card, case, figure, group, heading, page, ranked, thumbnail
from runtime.config.cli import knob, run_script
from scripts.demo import Config as DemoConfig
from scripts.demo_checkpoints.any_checkpoint import open_abilities
from scripts.dev import readme_figure


class Photograph(NamedTuple):
    """A file of a package: its path there, who took it, and what describes it."""

    package: str
    path: str
    author: str
    sentence: str


PHOTOGRAPHS = (
    Photograph(
        package="sklearn",
        path="datasets/images/china.jpg",
        author="danielbuechele on Flickr, CC BY 2.0",
        sentence="A temple under a blue sky.",
    ),
    Photograph(
        package="sklearn",
        path="datasets/images/flower.jpg",
        author="vultilion on Flickr, CC BY 2.0",
        sentence="An orange flower in bloom.",
    ),
    Photograph(
        package="skimage",
        path="data/chelsea.png",
        author="Stefan van der Walt, CC0",
        sentence="The face of a tabby cat.",
    ),
    Photograph(
        package="skimage",
        path="data/coffee.png",
        author="Rachel Michetti, CC0",
        sentence="A cup of coffee with a spoon.",
    ),
    Photograph(
        package="skimage",
        path="data/rocket.jpg",
        author="SpaceX, public domain",
        sentence="A rocket on a launch pad.",
    ),
    Photograph(
        package="skimage",
        path="data/astronaut.png",
        author="NASA, public domain",
        sentence="An astronaut in an orange suit.",
    ),
)
OTHERS = (
    "An old castle by the sea.",
    "A crowd in front of a museum.",
    "A bee on a leaf.",
    "Fruit in a bowl.",
    "A fast car on a road.",
    "A dog playing with a ball.",
)
SHOWN = 4  # of the likeliest
IN_A_ROW = 2


@dataclass
class Config:
    run: Path = knob(Path("output/photos/en-0"), "folder of photos.sh, which has main")
    output: Path = knob(Path("docs/images/photos.png"), "PNG to write; its page goes to the run")
    browser: str = knob("chromium", "Chromium or Chrome: a command")


def file_of(photograph: Photograph) -> Path:
    """Where the package has it. UserError where it is not installed."""
    package = find_spec(photograph.package)
    if package is None or package.origin is None:
        raise UserError("no scikit-image here: pip install --no-deps scikit-image")
    return Path(package.origin).parent / photograph.path


def example(photograph: Photograph, embedder: Embedder, sentences: list[str], rows: Tensor):
    """(card of the photograph and its likeliest sentences, whether the first describes it).

    rows: the sentences' embeddings, [K,E]."""
    file = file_of(photograph)
    (row,) = embedder.images(embedder.view(decode_image(file))[None])
    probabilities = (embedder.scale * rows @ row).softmax(0)
    best, numbers = probabilities.topk(SHOWN)
    found = [sentences[number] for number in numbers.tolist()]
    items = []
    for sentence, probability in zip(found, best.tolist(), strict=True):
        tone = kind(sentence == photograph.sentence, said=sentence == found[0])
        items.append((sentence, f"{probability:.0%}", tone, probability))
    right = found[0] == photograph.sentence
    shown = figure(thumbnail(file, 190, right), photograph.author)
    return case(shown, ranked(items)), right


def main(config: Config) -> None:
    run = config.run / "main"
    if not run.is_dir():
        raise UserError(f"{run}: no such run; run photos.sh first")
    embedder = open_abilities(run, DemoConfig(device="cpu"), ALONE).embedder
    sentences = [photograph.sentence for photograph in PHOTOGRAPHS]
    sentences.extend(OTHERS)
    rows = embedder.texts(sentences)
    cards = []
    hits = 0
    for photograph in PHOTOGRAPHS:
        made, right = example(photograph, embedder, sentences, rows)
        cards.append(made)
        hits += right
    title = (
        f"The {SHOWN} likeliest of {len(sentences)} sentences; green: it describes the photograph"
    )
    contents = [heading(title)]
    for start in range(0, len(cards), IN_A_ROW):
        contents.append(group("cases", cards[start : start + IN_A_ROW]))
    written = config.run / "photographs.html"
    write_text(written, page("Photographs", [card("", *contents)], str(run)))
    print(f"first right: {hits} of {len(cards)}")
    readme_figure.main(readme_figure.Config(written, config.output, config.browser))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
