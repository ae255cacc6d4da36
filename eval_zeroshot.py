"""Evaluate any dual encoder zero-shot: classification over a catalogue of data sets, and retrieval.

    a run of main.py   python eval_zeroshot.py --output-dir output/main --root datasets
    any checkpoint     python eval_zeroshot.py --checkpoint ViT-B-32.pt --datasets imagenet cifar10
    on 8 GPUs          torchrun --nproc_per_node=8 eval_zeroshot.py --checkpoint slip_base_100ep.pt
    other data sets    … --datasets webdataset:https://huggingface.co/datasets/clip-benchmark/wds_cars
                       … --datasets retrieval:dataset_coco.json imagefolder:photos --labels my.json
    own catalogue      … --catalog catalog.json --labels labels.json --templates templates.json

Checkpoints: ours, clip-rocket's, SLIP's, OpenAI's (archives too), open_clip's, Hugging Face's CLIP
and ALIGN. Every template is filled with the class name; the mean of the unit embeddings classifies
by cosine similarity. Models with local projectors are scored by z, h and w z + (1 - w) h. Every data
set has its own metric; the figures do not depend on the number of processes. Missing data sets are
named, with the remedy, and skipped.

Results: a table, result/metrics.json and result/report.html below output_dir.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from base import distributed
from base.distributed import World
from base.errors import UserError
from base.files import cache_folder, digest
from dataset.images.clip import normalize, pixel_statistics
from dataset.loading.eval import EvalLoader
from dataset.tasks.catalog import CATALOG, Entry, Prompts, choose, read_catalog
from dataset.tasks.dual_inputs import eval_view, is_align
from dataset.tasks.zeroshot import OpenSet, Viewed, open_set
from dataset.text.align import AlignTokenizer
from dataset.text.bpe import ClipTokenizer
from evaluation.report.results import write_results
from evaluation.report.zeroshot import cards, plain_tables
from evaluation.retrieval import units
from evaluation.zeroshot import (
    cached_classifier,
    class_prompts,
    classify,
    embed_images,
    embed_texts,
    fingerprint,
    retrieve,
    text_classifier,
)
from models.weights.any_dual_encoder import Opened, check_name, open_dual
from models.weights.torchscript import is_jit_archive, jit_state_dict
from runtime.checkpoint import read_weights, weights_file
from runtime.config.cli import knob, run_script
from runtime.config.from_checkpoint import described
from runtime.optim.build import Precision
from runtime.run import evaluating
from runtime.safe_pickle import load_plain


@dataclass
class Config:
    """Zero-shot evaluation."""

    checkpoint: Path | None = knob(None, "file or run directory [output_dir]", aliases=("resume",))
    output_dir: Path = knob(Path("output/eval_zeroshot"), "where result/ is written")
    model: str | None = knob(None, "CL2L_R50_CL2L, ViT-B/32, … if the file does not say")
    model_name: str = knob("", "how to call the model in the report")
    datasets: list[str] = knob([], "names of the catalogue or KIND:PATH; [] = all of it")
    catalog: Path | None = knob(None, "JSON: data set -> {path, type, test}")
    labels: Path | None = knob(None, "JSON: data set -> class names; added to ours")
    templates: Path | None = knob(None, "JSON: data set -> templates with {}")
    root: Path = knob(Path("datasets"), "folder that holds the catalogue's data sets")
    download: bool = knob(False, "let torchvision fetch the named data sets")
    split: str | None = knob(None, "split to evaluate instead of each data set's own")
    batch_size: int = knob(256, "images or texts per forward pass and process", low=1)
    workers: int = knob(10, "loader processes per process", low=0, aliases=("j",))
    exif: bool = knob(False, "turn images by their EXIF orientation; the originals do not")
    bpe_path: Path | None = knob(None, "BPE merges; none = the run's, else CLIP's")
    tokenizer: str | None = knob(None, "of ALIGN; none = the run's, else bert-base-uncased")
    cache: Path | None = knob(None, "folder for classifiers and shards [$QUINTET_CACHE]")
    device: str = knob("auto", "'auto' (CUDA where present), 'cuda' or 'cpu'")
    precision: str = knob("fp32", "type of the forward pass", choices=("fp32", "bf16", "fp16"))

    @property
    def cache_folder(self) -> Path:
        return cache_folder(self.cache)


class Encoder(NamedTuple):
    """What embeds images (uint8, on the device) and tokens, and what makes their inputs."""

    opened: Opened
    tokenize: Callable[[list[str]], torch.Tensor]
    precision: Precision
    signature: str  # with the prompts, all that a text classifier depends on


def wanted_entries(config: Config) -> list[Entry]:
    """The data sets to evaluate; nothing of them is opened yet."""
    catalog = {name: entry.below(config.root) for name, entry in CATALOG.items()}
    own = read_catalog(config.catalog) if config.catalog else {}
    if config.download and not config.datasets:
        raise UserError(
            "--download fetches what is named: add --datasets, such as --datasets cifar10 food101"
        )
    entries = choose(config.datasets or list(own or catalog), catalog | own)
    return [replace(entry, split=config.split or entry.split) for entry in entries]


def open_all(config: Config) -> tuple[list[OpenSet], dict[str, str]]:
    """The data sets that are here, all checked, and why the others are not evaluated."""
    prompts, sets, skipped = Prompts(config.labels, config.templates), [], {}
    for entry in wanted_entries(config):
        where = config.cache_folder / "shards", load_plain, config.download
        with distributed.rank_0_first():
            found = open_set(entry, prompts, *where)
        if isinstance(found, OpenSet):
            sets.append(found)
        else:
            skipped[entry.name] = str(found)
    if distributed.rank() == 0:
        print(*(f"SKIPPED {why}" for why in skipped.values()), sep="\n", file=sys.stderr)
    if not sets:
        raise UserError(
            f"none of the data sets is on this machine: {', '.join(skipped)}; "
            "see above how to get each"
        )
    return sets, skipped


def open_encoder(config: Config, world: World) -> Encoder:
    """The network of the checkpoint and its tokenizer."""
    file = config.checkpoint
    if is_jit_archive(file):
        weights, about = jit_state_dict(file), {"archive": True}
    else:
        weights, about = read_weights(file), described(file)
    opened = open_dual(weights, about, config.model)
    tokenizer, vocabulary = tokenizer_of(opened, config, about.get("config", {}))
    if tokenizer.vocab_size != opened.vocab_size:
        raise UserError(
            f"{config.checkpoint} knows {opened.vocab_size} tokens, but {tokenizer.path} makes "
            f"{tokenizer.vocab_size}: "
            "give what it was trained with as --bpe-path (ALIGN: --tokenizer)"
        )
    made_with = (
        opened.title,
        vocabulary,
        opened.context_length,
        config.precision,
        world.device.type,
    )
    signature = fingerprint(opened.model, *made_with)
    opened.model.to(world.device)
    return Encoder(
        opened, partial(tokenizer, lengths=()), Precision(config.precision, world.device), signature
    )


def tokenizer_of(
    opened: Opened, config: Config, trained: dict
) -> tuple[ClipTokenizer | AlignTokenizer, str]:
    """The tokenizer, by default of the run with the configuration `trained`, and its identity."""
    if is_align(opened.title):
        source = config.tokenizer or trained.get("tokenizer", "bert-base-uncased")
        tokenizer = AlignTokenizer(source, opened.context_length)
        return tokenizer, tokenizer.pieces.backend.to_str()
    tokenizer = ClipTokenizer(config.bpe_path or trained.get("bpe_path"), opened.context_length)
    return tokenizer, repr(tokenizer.merges)


def evaluate(data: OpenSet, encoder: Encoder, config: Config, world: World) -> dict:
    """Figures of a data set by metric and score, the same on every process."""
    model, pixels, total = encoder.opened.model, encoder.opened.pixels, len(data.images)
    statistics = pixel_statistics(world.device, pixels.mean, pixels.std)
    own = [i for unit in units(total, config.batch_size, world) for i in unit]
    load = Viewed(
        data.images, eval_view(encoder.opened.title, pixels.size, pixels.interpolation)
    ).load
    batches = EvalLoader(
        load,
        own,
        config.batch_size,
        default_collate,
        config.workers,
        pin_memory=world.device.type == "cuda",
        exif=config.exif,
    )
    texts = {"world": world, "batch_size": config.batch_size}

    def embed(image: torch.Tensor) -> dict[str, torch.Tensor]:
        return model.embed_image(normalize(image, statistics))

    about = {"metric": data.entry.metric, "images": total}
    with evaluating(model), encoder.precision.autocast():
        if not data.classes:
            about["captions"] = len(data.images.captions)
            image = embed_images(embed, batches, own, total, world)
            text = embed_texts(model.embed_text, encoder.tokenize, data.images.captions, **texts)
            recalls = retrieve(image, text, data.images.text_image, world)
            return about | recalls | batches.damages()
        about["classes"] = len(data.classes)
        prompts = class_prompts(data.classes, data.templates, data.entry.name)
        key = digest(encoder.signature, config.batch_size, prompts)
        make = partial(text_classifier, model.embed_text, encoder.tokenize, prompts, **texts)
        classifier = cached_classifier(
            config.cache_folder / f"classifiers/{key}.safetensors", make, world
        )
        scores = classify(
            embed, classifier, batches, own, total, world, data.entry.metric, data.entry.name
        )
        return about | scores | batches.damages()


def main(config: Config) -> None:
    world = distributed.init(config.device)
    check_name(config.model)
    if config.checkpoint is None and not config.output_dir.is_dir():
        raise UserError("add --checkpoint FILE, or the folder of a run as --output-dir")
    config.checkpoint = weights_file(config.checkpoint or config.output_dir)
    sets, skipped = open_all(config)
    for data in sets:
        if data.classes:
            class_prompts(data.classes, data.templates, data.entry.name)  # fail before any work
    encoder = open_encoder(config, world)
    results = {data.entry.name: evaluate(data, encoder, config, world) for data in sets}
    title = config.model_name or encoder.opened.title
    figures = {"model": title, "results": results, "skipped": skipped}
    text = f"{title}, {config.checkpoint}\n\n{plain_tables(results)}"
    text += f"\n\n{len(skipped)} SKIPPED, see above: {', '.join(skipped)}" if skipped else ""
    sections = cards(results, skipped)
    write_results(config, f"Zero-shot evaluation of {title}", figures, sections, text)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
