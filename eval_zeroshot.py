"""Evaluate any dual encoder zero-shot: classification over a catalogue of data sets, and retrieval.

    a run of main.py   python eval_zeroshot.py --output-dir output/main --root datasets
    any checkpoint     python eval_zeroshot.py --checkpoint ViT-B-32.pt --datasets imagenet cifar10
    on 8 GPUs          torchrun --nproc_per_node=8 eval_zeroshot.py --checkpoint slip_base_100ep.pt
    other data sets    … --datasets webdataset:https://huggingface.co/datasets/clip-benchmark/wds_cars
                       … --datasets retrieval:dataset_coco.json imagefolder:photos --labels my.json
    own catalogue      … --catalog catalog.json --labels labels.json --templates templates.json
    of libraries       … --model open_clip/ViT-B-16-SigLIP:webli, or --model hf/NAME-or-folder
    one image          … --image cat.jpg --words "a photo of a cat" "a photo of a dog"

Checkpoints: ours, clip-rocket's, SLIP's, OpenAI's (archives too), open_clip's, Hugging Face's CLIP
and ALIGN; all models of the installed open_clip and transformers, with their own transforms and
tokenizers. Every template is filled with the class name; the mean of the unit embeddings classifies
by cosine similarity. Models with local projectors are scored by z, h and w z + (1 - w) h. Every data
set has its own metric; the figures do not depend on the number of processes. Missing data sets are
named, with the remedy, and skipped. Results: result/metrics.json and result/report.html.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from base import distributed
from base.caches import cache_folder
from base.distributed import World
from base.errors import UserError, naming
from base.libraries import of_library
from dataset.tasks.catalog import CatalogOptions, Prompts, wanted_entries
from dataset.tasks.dual_inputs import image_side, tokenizer_identity, tokenizer_of
from dataset.tasks.loaders import eval_loader
from dataset.tasks.published import VTAB_PLUS
from dataset.tasks.recognition import read_image
from dataset.tasks.zeroshot import OpenSet, Viewed, open_sets
from evaluation import zeroshot
from evaluation.compositional import choices_chance
from evaluation.report.classes import Shown, class_rows, classification_card
from evaluation.report.retrieval import retrieval_gallery
from evaluation.report.zeroshot import Evaluated, write_zero_shot
from evaluation.retrieval import best_of_both, chance, units
from models.weights.any_dual_encoder import Opened, check_name, logit_scale, open_dual
from models.weights.libraries import open_library
from models.weights.torchscript import weights_and_about
from runtime.checkpoint import read_weights, weights_file
from runtime.config import originals
from runtime.config.cli import knob, restated, run_script
from runtime.config.from_checkpoint import description_of
from runtime.optim.build import Precision
from runtime.options import EvaluationConfig
from runtime.run import evaluating
from runtime.safe_pickle import load_plain


@dataclass
class Config(CatalogOptions, EvaluationConfig):
    """Zero-shot evaluation."""

    OLD_NAMES = ("resume",)
    translate = staticmethod(originals.zero_shot)
    checkpoint: Path | None = knob(None, "file or run directory [output_dir]")
    output_dir: Path = knob(Path("output/eval_zeroshot"), "where result/ is written")
    model: str | None = knob(None, "open_clip/NAME:TAG or hf/NAME; or CL2L_R50_CL2L, … of the file")
    mean: tuple[float, float, float] | None = knob(None, "of the pixels, if no file has it")
    std: tuple[float, float, float] | None = knob(None, "of the pixels, likewise", low=1e-6)
    model_name: str = knob("", "how to call the model in the report")
    results: Path | None = knob(None, "JSON lines of CLIP_benchmark's rows [result/results.jsonl]")
    image: Path | None = knob(None, "no data sets: which of --words fit this image")
    words: list[str] = knob([], "texts for --image, two or more; output_dir/result/words.json")
    workers: int = restated(EvaluationConfig, "workers", 10, aliases=("j",))
    bpe_path: Path | None = knob(None, "BPE merges; none = the run's, else CLIP's")
    tokenizer: str | None = knob(None, "of ALIGN; none = the run's, else bert-base-uncased")
    cache: Path | None = knob(None, "folder for classifiers and shards [$QUINTET_CACHE]")

    def check(self) -> None:
        """Check that the options are compatible."""
        if self.download and not self.datasets:
            raise UserError("--download fetches named data sets: add --datasets cifar10 food101, …")
        if bool(self.image) != (len(set(self.words)) > 1):
            raise UserError('--image FILE needs two --words or more: --words "a cat" "a dog"')
        if of_library(self.model):
            if self.checkpoint and self.random_weights:
                raise UserError("--random-weights and --checkpoint exclude each other; choose one")
            return
        check_name(self.model)
        if self.random_weights:
            raise UserError("--random-weights is for --model open_clip/NAME and hf/NAME")
        if self.checkpoint is None and not self.output_dir.is_dir():
            raise UserError("add --checkpoint FILE, or the folder of a run as --output-dir")


class Encoder(NamedTuple):
    """What embeds images (uint8, on the device) and tokens, and what makes their inputs."""

    opened: Opened
    view: Callable[[torch.Tensor], torch.Tensor]  # of one image
    embed: Callable[[torch.Tensor], dict]
    precision: Precision
    signature: str  # with the prompts, all that a text classifier depends on
    encoded: dict  # the last retrieval set's images: those of the same set in another language


def open_checkpoint(config: Config) -> tuple[Opened, str]:
    """The network of the checkpoint, and what identifies its tokenizer."""
    weights, about = weights_and_about(config.checkpoint, read_weights, description_of)
    with naming("--checkpoint", config.checkpoint):
        opened = open_dual(weights, about, config.model, config.mean, config.std)
    tokenizer = tokenizer_of(opened, about.get("config", {}), config)
    return opened._replace(tokenize=partial(tokenizer, lengths=())), tokenizer_identity(tokenizer)


def open_encoder(config: Config, world: World) -> Encoder:
    """The network with its tokenizer: of a library, or of the checkpoint."""
    torch.manual_seed(0)  # random weights are the same on every process
    if of_library(config.model):
        opened = open_library(config.model, config.checkpoint, config.random_weights)
        vocabulary = tokenizer_identity(opened.tokenize)
    else:
        opened, vocabulary = open_checkpoint(config)
    makes = [opened.title, vocabulary, opened.context_length, config.precision, world.device.type]
    signature = zeroshot.fingerprint(opened.model, makes)
    opened.model.to(world.device)
    view, embed = image_side(opened, world.device)
    precision = Precision(config.precision, world.device)
    return Encoder(opened, view, embed, precision, signature=signature, encoded={})


def evaluate(data: OpenSet, encoder: Encoder, config: Config, world: World) -> Evaluated:
    """Evaluate a data set; the same on every process."""
    with evaluating(encoder.opened.model), encoder.precision.autocast():
        if data.classes:
            return classify_images(data, encoder, config, world)
        image, text, damages = embed_pairs(data, encoder, config, world)
    if data.entry.metric == "text_acc":
        return choose_texts(data, image, text, damages)
    return rank_pairs(data, image, text, damages, world)


def image_batches(images, encoder: Encoder, config: Config, world: World):
    """`(own, batches)`: this process's part of the images."""
    own = [i for unit in units(len(images), config.batch_size, world) for i in unit]
    load = Viewed(images, encoder.view).load
    return own, eval_loader(load, own, config.batch_size, default_collate, config, world)


def classify_images(data: OpenSet, encoder: Encoder, config: Config, world: World) -> Evaluated:
    """Every image is of the class whose prompts, averaged, it is most similar to."""
    images, total = data.images, len(data.images)
    metric, name = data.entry.metric, data.entry.name
    opened, signature = encoder.opened, encoder.signature
    folder, size = cache_folder(config.cache), config.batch_size
    classifier = zeroshot.prompt_classifier(opened, signature, data.prompts, folder, size, world)
    own, batches = image_batches(images, encoder, config, world)
    found = zeroshot.classify(encoder.embed, classifier, batches, own, total, world, metric, name)
    figures = {
        "metric": metric,
        "images": total,
        "classes": len(data.classes),
        "chance": zeroshot.zero_shot_chance(metric, len(data.classes), found.targets),
        **found.scores,
        **batches.damages(),
    }
    card = partial(classification_card, name, Shown(images), data.classes, found)
    return Evaluated(data.entry, figures, card, class_rows(data.classes, found))


def embed_pairs(data: OpenSet, encoder: Encoder, config: Config, world: World):
    """`(image, text, damages)`: unit embeddings by name, and the damaged images counted."""
    opened = encoder.opened
    if data.same_images not in encoder.encoded:  # else they are those of another language
        encoder.encoded.clear()
        own, batches = image_batches(data.images, encoder, config, world)
        image = zeroshot.embed_images(encoder.embed, batches, own, len(data.images), world)
        encoder.encoded[data.same_images] = image, batches.damages()
    image, damages = encoder.encoded[data.same_images]
    captions = data.images.captions
    text = zeroshot.embed_texts(
        opened.model.embed_text, opened.tokenize, captions, world, config.batch_size
    )
    return image, text, damages


def choose_texts(data: OpenSet, image: dict, text: dict, damages: dict) -> Evaluated:
    """Of the captions of an example the right one is to be most similar to its image."""
    images = data.images
    figures = {
        "metric": data.entry.metric,
        "images": len(images),
        **damages,
        "examples": len(images.example_images),
        "chance": choices_chance(images.example_images.shape[1], 2),
        **zeroshot.choose_captions(image, text, images.example_images, images.example_captions),
    }
    return Evaluated(data.entry, figures)


def rank_pairs(data: OpenSet, image: dict, text: dict, damages: dict, world: World) -> Evaluated:
    """Every image ranks all captions, every caption all images."""
    images, name = data.images, data.entry.name
    owner = images.text_image
    figures = {
        "metric": data.entry.metric,
        "images": len(images),
        **damages,
        "captions": len(images.captions),
        "chance": chance(owner, len(images)),
        **zeroshot.retrieve(image, text, owner, world),
    }
    best = best_of_both(image["z"], text["z"], world)
    card = partial(retrieval_gallery, Shown(images), images.captions, owner, *best, title=name)
    return Evaluated(data.entry, figures, card)


def show(encoder: Encoder, config: Config, world: World) -> None:
    """Print the probabilities of --words for --image, beside chance, and write them."""
    opened = encoder.opened
    inputs = encoder.view(read_image(config.image))[None].to(world.device)
    with evaluating(opened.model), encoder.precision.autocast():
        image = encoder.embed(inputs)["z"]
        texts = zeroshot.embed_texts(opened.model.embed_text, opened.tokenize, config.words, world)
    found = zeroshot.word_probabilities(image, texts["z"], config.words, logit_scale(opened.model))
    zeroshot.write_words(config, opened.title, found)


def main(config: Config) -> None:
    world = distributed.init(config.device)
    if config.checkpoint or not of_library(config.model):  # else the library's own weights
        config.checkpoint = weights_file(config.checkpoint or config.output_dir)
    if config.image:
        return show(open_encoder(config, world), config, world)
    prompts = Prompts(config.labels, config.templates, config.language)
    shards = cache_folder(config.cache) / "shards"
    entries = wanted_entries(config)
    named = bool(config.datasets or config.catalog)
    sets, skipped = open_sets(
        entries, prompts, shards, load_plain, config.download, named, config.error_budget
    )
    encoder = open_encoder(config, world)
    found = {data.entry.name: evaluate(data, encoder, config, world) for data in sets}
    write_zero_shot(config, config.model_name or encoder.opened.title, found, skipped, VTAB_PLUS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
