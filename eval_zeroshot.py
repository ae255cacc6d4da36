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

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from base import distributed
from base.distributed import World
from base.errors import UserError
from base.files import cache_folder, digest
from dataset.loading.eval import EvalLoader
from dataset.tasks.catalog import CatalogOptions, Prompts, wanted_entries
from dataset.tasks.dual_inputs import image_side, text_tokenizer, tokenizer_identity
from dataset.tasks.recognition import read_image
from dataset.tasks.zeroshot import OpenSet, Viewed, open_sets
from evaluation.report.results import write_results
from evaluation.report.zeroshot import cards, plain_tables
from evaluation.retrieval import chance, units
from evaluation.zeroshot import (
    cached_classifier,
    class_prompts,
    classify,
    embed_images,
    embed_texts,
    fingerprint,
    retrieve,
    text_classifier,
    word_probabilities,
    write_words,
    zero_shot_chance,
)
from models.weights.any_dual_encoder import Opened, check_name, logit_scale, open_dual
from models.weights.libraries import of_library, open_library
from models.weights.torchscript import is_jit_archive, jit_state_dict
from runtime.checkpoint import read_weights, weights_file
from runtime.config.cli import knob, run_script
from runtime.config.from_checkpoint import described
from runtime.optim.build import Precision
from runtime.run import evaluating
from runtime.safe_pickle import load_plain


@dataclass
class Config(CatalogOptions):
    """Zero-shot evaluation."""

    checkpoint: Path | None = knob(None, "file or run directory [output_dir]", aliases=("resume",))
    output_dir: Path = knob(Path("output/eval_zeroshot"), "where result/ is written")
    model: str | None = knob(None, "open_clip/NAME:TAG or hf/NAME; or CL2L_R50_CL2L, … of the file")
    random_weights: bool = knob(False, "random weights of the model that --model names")
    mean: tuple[float, float, float] | None = knob(None, "of the pixels, if no file tells")
    std: tuple[float, float, float] | None = knob(None, "of the pixels, likewise")
    model_name: str = knob("", "how to call the model in the report")
    image: Path | None = knob(None, "no data sets: which of --words fit this image")
    words: list[str] = knob([], "texts for --image, two or more; output_dir/result/words.json")
    batch_size: int = knob(256, "images or texts per forward pass and process", low=1)
    workers: int = knob(10, "loader processes per process", low=0, aliases=("j",))
    exif: bool = knob(False, "turn images by their EXIF orientation; the originals do not")
    error_budget: float = knob(0.01, "most unreadable images, a fraction", low=0, high=1)
    bpe_path: Path | None = knob(None, "BPE merges; none = the run's, else CLIP's")
    tokenizer: str | None = knob(None, "of ALIGN; none = the run's, else bert-base-uncased")
    cache: Path | None = knob(None, "folder for classifiers and shards [$QUINTET_CACHE]")
    device: str = knob("auto", "'auto' (CUDA where present), 'cuda' or 'cpu'")
    precision: str = knob("fp32", "type of the forward pass", choices=("fp32", "bf16", "fp16"))

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
    precision: Precision
    signature: str  # with the prompts, all that a text classifier depends on


def open_checkpoint(config: Config) -> tuple[Opened, str]:
    """The network of the checkpoint, and what identifies its tokenizer."""
    file = config.checkpoint
    if is_jit_archive(file):
        weights, about = jit_state_dict(file), {"archive": True}
    else:
        weights, about = read_weights(file), described(file)
    opened = open_dual(weights, about, config.model, config.mean, config.std)
    trained = about.get("config", {})
    merges = config.bpe_path or trained.get("bpe_path")
    tower = trained.get("network", {}).get("text_tower")
    vocabulary = tower or config.tokenizer or trained.get("tokenizer", "bert-base-uncased")
    tokenizer = text_tokenizer(opened.title, opened.context_length, merges, vocabulary)
    if tokenizer.vocab_size != opened.vocab_size:
        raise UserError(
            f"{file} knows {opened.vocab_size} tokens, but {tokenizer.path} makes "
            f"{tokenizer.vocab_size}: give what it was trained with as --bpe-path (ALIGN: --tokenizer)"
        )
    return opened._replace(tokenize=partial(tokenizer, lengths=())), tokenizer_identity(tokenizer)


def open_encoder(config: Config, world: World) -> Encoder:
    """The network with its tokenizer: of a library, or of the checkpoint."""
    torch.manual_seed(0)  # random weights are the same on every process
    if of_library(config.model):
        opened = open_library(config.model, config.checkpoint, config.random_weights)
        vocabulary = config.model
    else:
        opened, vocabulary = open_checkpoint(config)
    makes = [opened.title, vocabulary, opened.context_length, config.precision, world.device.type]
    signature = fingerprint(opened.model, makes)
    opened.model.to(world.device)
    return Encoder(opened, Precision(config.precision, world.device), signature)


def evaluate(data: OpenSet, encoder: Encoder, config: Config, world: World) -> dict:
    """Figures of a data set by metric and score, the same on every process."""
    opened = encoder.opened
    images = data.images
    view, embed = image_side(opened, world.device)
    own = [i for unit in units(len(images), config.batch_size, world) for i in unit]
    batches = EvalLoader(
        Viewed(images, view).load,
        own,
        config.batch_size,
        default_collate,
        config.workers,
        pin_memory=world.device.type == "cuda",
        error_budget=config.error_budget,
        exif=config.exif,
    )

    about = {"metric": data.entry.metric, "images": len(images)}
    with evaluating(opened.model), encoder.precision.autocast():
        if data.classes:
            about["classes"] = len(data.classes)
            about["chance"] = zero_shot_chance(data.entry.metric, len(data.classes))
            classifier = classifier_of(data, encoder, config, world)
            scores = classify(
                embed,
                classifier,
                batches,
                own,
                len(images),
                world,
                data.entry.metric,
                data.entry.name,
            )
        else:
            about["captions"] = len(images.captions)
            about["chance"] = chance(images.text_image, len(images))
            image = embed_images(embed, batches, own, len(images), world)
            text = embed_texts(
                opened.model.embed_text, opened.tokenize, images.captions, world, config.batch_size
            )
            scores = retrieve(image, text, images.text_image, world)
        return about | scores | batches.damages()


def classifier_of(data: OpenSet, encoder: Encoder, config: Config, world: World) -> dict:
    """The text classifier of the data set's prompts by score, kept in the cache."""
    prompts = class_prompts(data.classes, data.templates, data.entry.name)
    key = digest(encoder.signature, config.batch_size, prompts)
    file = cache_folder(config.cache) / f"classifiers/{key}.safetensors"
    opened = encoder.opened
    make = partial(
        text_classifier, opened.model.embed_text, opened.tokenize, prompts, world, config.batch_size
    )
    return cached_classifier(file, make, world)


def show(encoder: Encoder, config: Config, world: World) -> None:
    """Print the probabilities of --words for --image, beside chance, and write them."""
    opened = encoder.opened
    view, embed = image_side(opened, world.device)
    inputs = view(read_image(config.image))[None].to(world.device)
    with evaluating(opened.model), encoder.precision.autocast():
        image = embed(inputs)["z"]
        text = embed_texts(opened.model.embed_text, opened.tokenize, config.words, world)["z"]
    found = word_probabilities(image, text, config.words, logit_scale(opened.model))
    write_words(config, opened.title, found)


def main(config: Config) -> None:
    world = distributed.init(config.device)
    config.check()
    if config.checkpoint or not of_library(config.model):  # else the library's own weights
        config.checkpoint = weights_file(config.checkpoint or config.output_dir)
    if config.image:
        return show(open_encoder(config, world), config, world)
    prompts = Prompts(config.labels, config.templates)
    shards = cache_folder(config.cache) / "shards"
    entries = wanted_entries(config)
    sets, skipped = open_sets(entries, prompts, shards, load_plain, config.download)
    for data in sets:
        if data.classes:
            class_prompts(data.classes, data.templates, data.entry.name)  # fail before any work
    encoder = open_encoder(config, world)
    results = {data.entry.name: evaluate(data, encoder, config, world) for data in sets}
    title = config.model_name or encoder.opened.title
    figures = {"model": title, "results": results, "skipped": skipped}
    text = f"{title}, {config.checkpoint or config.model}\n\n{plain_tables(results)}"
    text += f"\n\n{len(skipped)} SKIPPED, see above: {', '.join(skipped)}" if skipped else ""
    sections = cards(results, skipped)
    write_results(config, f"Zero-shot evaluation of {title}", figures, sections, text)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
