"""k nearest neighbours, and a linear probe, on the features of any image encoder.

    a run              python eval_knn.py --checkpoint output/main --train-data imagenet/train \\
                           --val-data imagenet/val
    on 8 GPUs          torchrun --nproc_per_node=8 eval_knn.py --checkpoint RUN …
    more neighbours    … --k 1 10 20 --linear-probe
    CLIP's probe       … --linear-probe --probe-val-fraction 0.1      (weight decay by a sweep)
    of libraries       … --model timm/vit_small_patch16_224.dino --checkpoint weights.pth
                       … --model open_clip/ViT-B-16-SigLIP:webli, … --model hf/facebook/dinov2-base
    small              python eval_knn.py --config configs/eval_knn/digitscenes.yaml --checkpoint RUN

Checkpoints: of Classification.py, of main.py (and other dual encoders that eval_zeroshot.py takes),
of Pretrain.py and its fine-tuning scripts, or ViTs under the names of timm, Hugging Face, COYO-ViT,
DINO, DINOv2, MoCo v3 and MAE. What their weights do not say (pixels, activation, eps) is read from
config.json and preprocessor_config.json beside them, else asked for.
knn1 is the class of the image of highest cosine similarity, as COYO-ALIGN counts ImageNet kNN; larger
k vote with equal weights, and with exp(cosine / temperature) as DINO. Features are computed once and
kept under `cache`, keyed by weights, view and data. The search is exact, in tiles: memory does not
grow with the data, and the figures do not depend on the number of processes.

Published ImageNet kNN: COYO-ALIGN-B7-Base 68.6, B3-Mini 46.2 (--features z).
Results: result/metrics.json and result/report.html below output_dir.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from base import distributed
from base.caches import cache_folder
from base.distributed import World
from base.errors import UserError, naming
from base.libraries import of_library
from base.pixels import pixels_digest
from dataset.images.clip import EvalView, normalize, pixel_statistics
from dataset.images.vit import ViTEvalView
from dataset.loading.eval import EvalLoader
from dataset.tasks.classification import (
    LabelCollate,
    LabelOptions,
    Labels,
    Split,
    class_names,
    identity,
    shared_split,
)
from dataset.tasks.dual_inputs import eval_view
from dataset.tasks.loaders import eval_loader
from dataset.tasks.published import benchmark_name
from evaluation.features import Bank, damages_of, feature_bank
from evaluation.knn import knn_accuracy, nearest_neighbours
from evaluation.probe import ProbeOptions, linear_probe
from evaluation.published import data_name, write_probe
from evaluation.report.neighbours import neighbour_report
from evaluation.report.results import write_results
from evaluation.retrieval import units
from evaluation.zeroshot import fingerprint
from models.weights.any_image_encoder import open_encoder
from models.weights.image_encoder import ImageEncoder
from models.weights.libraries import library_encoder
from models.weights.vit_facts import VitFacts
from runtime.checkpoint import read_weights, weights_file
from runtime.config.cli import knob, run_script
from runtime.config.from_checkpoint import description_of
from runtime.optim.build import Precision
from runtime.options import EvaluationConfig
from runtime.run import evaluating


@dataclass
class Config(ProbeOptions, EvaluationConfig):
    """kNN evaluation."""

    checkpoint: Path | None = knob(
        None, "file or run directory; none = weights of the library that --model names"
    )
    output_dir: Path = knob(Path("output/eval_knn"), "where result/ is written")
    model: str | None = knob(
        None,
        "timm/NAME, open_clip/NAME:TAG, hf/NAME-or-folder; or a name that the file lacks",
    )
    pretrained: bool = knob(False, "timm fetches its weights, as it does by default", rare=True)
    mean: tuple[float, float, float] | None = knob(None, "of the pixels, if no file has it")
    std: tuple[float, float, float] | None = knob(None, "of the pixels, likewise", low=1e-6)
    activation: str | None = knob(
        None, "of a ViT, likewise: gelu (exact) or gelu_tanh", choices=("gelu", "gelu_tanh")
    )
    eps: float | None = knob(None, "of a ViT's LayerNorm, likewise", low=0)
    resize: int | None = knob(
        None, "shorter side before the centre crop, likewise; none = whole image squeezed", low=1
    )
    features: str = knob(
        "feats", "output of the encoder: feats, the tower's; z, the projected one; pre_logits, ..."
    )
    train_data: str | None = knob(
        None,
        "labelled images: class folders, .jsonl, shards or torchvision/NAME:SPLIT",
        required=True,
    )
    val_data: str | None = knob(None, "images to classify, likewise", required=True)
    data_root: Path = knob(
        Path("."),
        "folder that a list's paths start from, or of torchvision's data set",
        aliases=("image_root",),
    )
    classes: Path | None = knob(
        None, "file with the name of one class a line; none = the class folders' or torchvision's"
    )
    num_classes: int = knob(1000, "number of classes, if the data do not name them", low=1)
    download: bool = knob(False, "let torchvision fetch its data set")
    k: list[int] = knob([1, 10, 20], "numbers of neighbours", low=1)
    temperature: float = knob(0.07, "of the weighted votes", low=1e-6)
    batch_size: int = knob(64, "images per forward pass and process", low=1)
    cache: Path | None = knob(
        None, "folder of features, one for all processes; none = $QUINTET_CACHE, ~/.cache/quintet"
    )

    def check(self) -> None:
        """Check that the options are compatible."""
        self.check_probe()
        if self.checkpoint is None and not of_library(self.model):
            raise UserError(
                "give --checkpoint, a file or the folder of a run, or --model timm/NAME, "
                "open_clip/NAME:TAG or hf/NAME"
            )
        if self.random_weights and (self.checkpoint or not of_library(self.model)):
            raise UserError("--random-weights needs --model LIBRARY/NAME and no --checkpoint")
        if self.random_weights and self.pretrained:
            raise UserError("--random-weights and --pretrained exclude each other; choose one")


def load_encoder(config: Config) -> ImageEncoder:
    """The encoder on the CPU."""
    torch.manual_seed(0)  # random weights are the same on every process
    file = weights_file(config.checkpoint) if config.checkpoint else None
    stated = VitFacts(
        mean=config.mean,
        std=config.std,
        activation=config.activation,
        eps=config.eps,
        resize=config.resize,
    )
    if not of_library(config.model):
        with naming("--checkpoint", file):
            return open_encoder(read_weights(file), description_of(file), config.model, stated)
    weights = read_weights(file) if file and config.model.startswith("timm/") else None
    return library_encoder(config.model, file, weights, config.random_weights, stated)


def view_of(encoder: ImageEncoder, about: dict) -> tuple[Callable[[Tensor], Tensor], str]:
    """How the encoder's images are resized for evaluation, and the same in words."""
    side, resampling = encoder.pixels.size, encoder.pixels.interpolation
    if encoder.view is not None:
        return encoder.view, repr(encoder.view)
    if encoder.kind == "classifier":
        small = about.get("config", {}).get("views", {}).get("resize_small")
        in_words = f"shorter side {small}, centre {side}" if small else f"squeezed to {side}"
        return ViTEvalView(side, small), in_words
    if encoder.kind == "dual":
        in_words = f"{encoder.title}'s, {side}, {resampling}"
        return eval_view(encoder.title, side, resampling), in_words
    if encoder.resize is None:  # SIMLA, ALBEF and ViTs of others
        return EvalView(side, resampling, squeeze=True), f"squeezed to {side}, {resampling}"
    small = encoder.resize
    return EvalView(side, resampling, small), f"shorter side {small}, centre {side}, {resampling}"


def images_of(data: str, split: str, view: Callable, names: list[str], config: Config) -> Split:
    """The images of a data set with their labels. UserError where one has no class."""
    labels = Labels(len(names) or config.num_classes, LabelOptions(), data, names)
    return shared_split(data, view, labels, names, config, split)


def bank_of(
    images: Split, data: str, encoder: ImageEncoder, in_words: str, config: Config, world: World
) -> Bank:
    """Features and labels of a data set, from the cache where they are there. in_words: the view."""
    of_data = partial(identity, images.records, data, config.data_root, images.classes)
    content = distributed.on_main(of_data)
    how = (config.precision, config.batch_size, config.exif, world.device.type)
    key = pixels_digest(fingerprint(encoder), in_words, encoder.pixels, content, *how)
    own = [i for unit in units(len(images), config.batch_size, world) for i in unit]
    statistics = pixel_statistics(world.device, encoder.pixels.mean, encoder.pixels.std)
    autocast = Precision(config.precision, world.device).autocast

    def batches() -> EvalLoader:
        return eval_loader(images.load, own, config.batch_size, LabelCollate(), config, world)

    def encode(image: Tensor) -> Tensor:
        with autocast():
            return encoder(image if encoder.view else normalize(image, statistics))

    with evaluating(encoder):
        path = cache_folder(config.cache) / "features" / key
        return feature_bank(encode, batches, own, len(images), encoder.width, path, world)


def main(config: Config) -> None:
    world = distributed.init(config.device)
    with distributed.rank_0_first():
        both = [config.train_data, config.val_data]
        names = class_names(both, config.classes, config.data_root, config.download)
    encoder = load_encoder(config)
    encoder.choose(config.features)
    about = description_of(weights_file(config.checkpoint)) if config.checkpoint else {}
    view, in_words = view_of(encoder.to(world.device), about)
    splits = {"train": config.train_data, "test": config.val_data, "val": config.probe_val_data}
    images = {}
    for split, data in splits.items():
        if data is not None:
            images[split] = images_of(data, split, view, names, config)
    banks = {}
    classes = len(names) or config.num_classes
    for split, found in images.items():
        banks[split] = bank_of(found, splits[split], encoder, in_words, config, world)
        banks[split].check_labels(classes, splits[split])
    train, test = banks["train"], banks["test"]
    neighbours = nearest_neighbours(train, test, max(config.k), world)
    metrics = {"images": len(test), "train_images": len(train), "width": encoder.width}
    metrics |= damages_of(banks)
    metrics["chance"] = 100 * test.labels.bincount().max().item() / len(test)
    labels = (train.labels, test.labels)
    metrics |= knn_accuracy(neighbours, *labels, classes, config.k, config.temperature)
    if config.linear_probe:
        metrics |= linear_probe(
            train,
            test,
            classes,
            world,
            l2=config.probe_l2,
            iterations=config.probe_iterations,
            val=banks.get("val"),
            val_fraction=config.probe_val_fraction,
        )
    title = f"{encoder.title}, {config.features}, on {config.val_data}"
    views = (images["train"].image, images["test"].image)
    cards = neighbour_report(title, names, metrics, neighbours, labels, views, config.temperature)
    write_results(config, "Nearest neighbours", {"model": encoder.title, **metrics}, cards)
    if config.linear_probe:
        data_set = config.data_name or benchmark_name(data_name(config.val_data))
        write_probe(config, encoder.title, data_set, metrics, classes)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
