"""Classification with vision transformers, as COYO-ViT: multi-label pre-training, fine-tuning.

    pre-train   torchrun --nproc_per_node=8 Classification.py \\
                    --config configs/Classification/vit_l16_coyo300m.yaml
    fine-tune   torchrun --nproc_per_node=8 Classification.py \\
                    --config configs/Classification/vit_l16_i1k_downstream.yaml
    evaluate    python Classification.py --evaluate --checkpoint RUN --val-data DIR --real FILE
    small       python Classification.py --config configs/Classification/digitscenes_pretrain.yaml
    Slurm       python run_with_submitit.py Classification.py --nodes 4 --ngpus 8 -- --config CONFIG

Pre-training sums a sigmoid cross entropy over all classes (21,841; the head's bias starts at -10)
behind a tanh layer, which fine-tuning drops; position embeddings are resized to larger images.

Published top-1 / ReaL of ViT-L/16 from COYO-Labeled-300M: 86.72 / 89.84 at 384 px, 87.24 / 90.03 at
512 px. Interrupted runs resume exactly. Results: result/metrics.json, model.safetensors.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from base import distributed
from base.distributed import World, say
from base.errors import UserError
from dataset.images.clip import normalize, pixel_statistics
from dataset.images.vit import ViTEvalView, ViTTrainView, ViTViews
from dataset.loading.stream import Stream, StreamLoader
from dataset.tasks.classification import (
    LabelCollate,
    LabelOptions,
    Labels,
    Split,
    class_names,
    shared_split,
    training_source,
)
from dataset.tasks.loaders import split_loader, stream_loader
from evaluation.classification import Validation, read_real, score, validate
from evaluation.report.classes import classification_report
from evaluation.report.results import write_results
from models.classification.classifier import (
    ClassifierConfig,
    VisionClassifier,
    build_classifier,
    ema_decay,
)
from models.classification.mixup import mix
from models.layers.average import WeightAverage
from models.layers.batchnorm import synchronise_batch_norm
from models.weights.vit_facts import load_agreeing
from runtime.checkpoint import export_safetensors, read_weights, weights_file
from runtime.config.classification import ClassificationRunConfig
from runtime.config.cli import knob, run_script, section
from runtime.config.from_checkpoint import description_of
from runtime.optim.build import Precision, set_learning_rate
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, evaluating, seed_everything


@dataclass
class Config(ClassificationRunConfig):
    """Classification."""

    OF_CHECKPOINT = ("network", "views.resize_small", "classes", "multi_label")
    output_dir: Path = knob(Path("output/Classification"), "this run: log, checkpoints, result/")
    evaluate: bool = knob(False, "no training: score --checkpoint on val_data")
    network: ClassifierConfig = section(ClassifierConfig, flat=True)
    ema_decay: float = knob(0.0, "decay of the weights' average to evaluate; 0 = none", low=0)
    ema_start: int = knob(0, "update that the average begins at; before, it is the weights", low=0)
    # the data: class folders, .jsonl of COYO-Labeled-300M, shards, or torchvision/NAME:SPLIT
    train_data: list[str] = knob([], "training data: folders, lists, shards, torchvision's sets")
    val_data: str | None = knob(None, "the same for validation; none = no validation")
    data_root: Path = knob(
        Path("."), "folder of relative paths, or of torchvision's sets", aliases=("image_root",)
    )
    classes: Path | None = knob(None, "file with a class name a line; none = folders, num_classes")
    multi_label: bool | None = knob(None, "images have any number of labels; none = if sigmoid")
    real: Path | None = knob(None, "real.json of ImageNet-ReaL, to be scored as well")
    download: bool = knob(False, "let torchvision fetch its data set")
    targets: LabelOptions = section(LabelOptions, flat=True)
    views: ViTViews = section(ViTViews, flat=True)
    mixup_alpha: float = knob(0.0, "mixup with ratios from Beta(alpha, alpha); 0 = none", low=0)
    cutmix_alpha: float = knob(0.0, "CutMix likewise; with mixup each takes half of a batch", low=0)

    def check(self) -> None:
        """Check that the options are compatible."""
        if not (self.checkpoint and self.val_data if self.evaluate else self.train_data):
            raise UserError("give --train-data, or --evaluate with --checkpoint and --val-data")
        if self.multi_label is None:
            self.multi_label = self.network.loss == "sigmoid"
        if self.real and (self.multi_label or not self.val_data):
            raise UserError("--real labels ImageNet's val: give --val-data, no --multi-label")
        if self.ema_decay and self.parallel == "fsdp":
            raise UserError("--ema-decay keeps a second copy of the weights: use --parallel ddp")

    @property
    def metric(self) -> str:
        """What the best checkpoint is best by."""
        return "mAP" if self.multi_label else "top1"


def training_data(config: Config, names: list[str], world: World, state) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    view = ViTTrainView(config.network.image_size, config.views, exact=config.network.original)
    sources = []
    for number, data in enumerate(config.train_data):
        labels = Labels(config.network.num_classes, config.targets, data, names)
        samples = config.samples[number] if config.samples else None
        sources.append(training_source(data, view, labels, names, config, samples))
    stream = Stream(sources, LabelCollate(), config.weights, config.exif)
    return stream_loader(stream, config.batch_size, config, world, state)


def evaluation_data(config: Config, names: list[str]) -> Split | None:
    """The images of val_data with their labels."""
    if config.val_data is None:
        return None
    network = config.network
    view = ViTEvalView(network.image_size, config.views.resize_small, exact=network.original)
    labels = Labels(network.num_classes, config.targets, config.val_data, names)
    return shared_split(config.val_data, view, labels, names, config)


def build_model(config: Config) -> VisionClassifier:
    """The network on the CPU with its starting weights and, as `ema`, its moving average."""
    model = build_classifier(config.network)
    if config.checkpoint:
        about = description_of(weights_file(config.checkpoint))
        left_out = load_agreeing(model, read_weights(config.checkpoint), about, config.evaluate)
        if config.evaluate and "head.weight" in left_out.missing:
            classes = config.network.num_classes
            raise UserError(f"{config.checkpoint}: no head for {classes} classes to evaluate")
        say(f"{config.checkpoint}: {left_out.note()}")
    if config.ema_decay and not config.evaluate:
        model.ema = copy.deepcopy(model).requires_grad_(False)
        if config.network.original:
            torch._foreach_zero_(list(model.ema.parameters()))
    return model


def averaged(model: VisionClassifier) -> VisionClassifier:
    """The network to evaluate and to publish: the moving average if there is one."""
    return getattr(model, "ema", model)


def train_step(model, statistics, next_batch, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update. Returns the losses, 0-d means over the micro-batches."""
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        batch["image"] = normalize(batch["image"], statistics)
        batch = mix(batch, config.mixup_alpha, config.cutmix_alpha, config.network.original)
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch)
        precision.backward(losses["loss"] / config.accumulate)
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def evaluate(model: VisionClassifier, val: Split, config, world: World, precision) -> Validation:
    """Scores of the network or its average on val_data, the same on every process."""
    model = averaged(model)
    real = read_real(config.real, val.file_names) if config.real else None
    own, batches = split_loader(val, LabelCollate(), config, world)
    statistics = pixel_statistics(world.device, *config.network.statistics)

    def predict(image: Tensor) -> Tensor:
        return model.logits(normalize(image, statistics))

    with evaluating(model), precision.autocast():
        scores = score(predict, batches, own, len(val), world)
    return validate(scores, config.multi_label, real, batches.damages(), config.network.original)


def train(config, names: list[str], val: Split | None, world: World, precision) -> Validation:
    """Train or resume; returns the last validation, with the best score beside its own."""
    run = Run(config, world, metric=config.metric if val else None)
    loader = training_data(config, names, world, run.data_state())
    model = build_model(config)
    # COYO-ViT decays every parameter, biases too
    decayed = [name for name, _ in model.named_parameters()] if config.network.original else None
    title = f"{config.network.model}, {config.network.num_classes:,} classes"
    model = synchronise_batch_norm(model.to(world.device))  # those of a stem; others have none
    model, optimizer, plan = run.begin(title, model, loader, precision, decayed)
    network = distributed.unwrap(model)
    average = None
    if config.ema_decay:
        average = WeightAverage([(network.ema, network)], average_buffers=True)
    statistics = pixel_statistics(world.device, *config.network.statistics)
    last = Validation()
    if run.validation_due(run.step):  # resumed after a kill in a validation
        last = evaluate(whole_model(model), val, config, world, precision)
        run.keep_best(last.metrics, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        losses = train_step(model, statistics, run.next_batch, config, precision)
        grad_norm = precision.step(optimizer, model.parameters())
        if average:
            average.update(ema_decay(step + 1, config.ema_decay, config.ema_start))
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            last = evaluate(whole_model(model), val, config, world, precision)
            run.keep_best(last.metrics, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    whole = whole_model(model)
    if val is not None:
        if not last.metrics:  # a finished run was started again
            last = evaluate(whole, val, config, world, precision)
        last.metrics[f"best_{config.metric}"] = max(run.best, last.metrics[config.metric])
    if world.is_main:
        export_safetensors(averaged(whole).state_dict(), run.folder / "model.safetensors")
    run.finish()
    return last


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    data = [*config.train_data, config.val_data] if config.val_data else config.train_data
    with distributed.rank_0_first():
        names = class_names(data, config.classes, config.data_root, config.download)
    if names:
        config.network = replace(config.network, num_classes=len(names))
    val = evaluation_data(config, names)
    if config.evaluate:
        last = evaluate(build_model(config).to(world.device), val, config, world, precision)
    else:
        last = train(config, names, val, world, precision)
        config.checkpoint = config.output_dir / "model.safetensors"  # what the scores are of
    title = f"{config.network.model} on {config.val_data}"
    sections = classification_report(title, names, last, val.image) if val else []
    write_results(config, "Classification", last.metrics, sections)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
