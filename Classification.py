"""Vision transformers for classification, as COYO-ViT: multi-label pre-training, then fine-tuning on one label each.

    pre-train   torchrun --nproc_per_node=8 Classification.py --config configs/Classification/vit_l16_coyo300m.yaml
    fine-tune   torchrun --nproc_per_node=8 Classification.py --config .../vit_l16_i1k_downstream.yaml
    evaluate    python Classification.py --config CONFIG --checkpoint RUN_OR_FILE --evaluate --real real.json
    small       python Classification.py --config configs/Classification/digitscenes_pretrain.yaml
    Slurm       python run_with_submitit.py Classification.py --nodes 4 --ngpus 8 -- --config CONFIG

Pre-training sums a sigmoid cross entropy over all classes (21,841 of ImageNet-21k) behind a tanh layer, which
fine-tuning drops; positions are resized to the larger images. The head's bias begins at -10: no class is likely.

Published top-1 / ReaL of ViT-L/16 from COYO-Labeled-300M: 86.72 / 89.84 at 384 px, 87.24 / 90.03 at 512 px.
A killed run goes on exactly where its last checkpoint stands. Results: result/metrics.json, model.safetensors.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from base import distributed
from base.distributed import World
from base.errors import UserError
from dataset.images.clip import normalize, pixel_statistics
from dataset.images.vit import EvalView, TrainView, ViTViews
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import Stream, StreamLoader
from dataset.tasks.classification import LabelCollate, LabelOptions, Labels, Split, class_names, training_source
from evaluation.classification import multi_label_metrics, read_real, score, single_label_metrics
from evaluation.report.page import card, table
from evaluation.report.results import write_results
from models.classification.classifier import ClassifierConfig, VisionClassifier, averages, follow, trained
from models.classification.mixup import mix
from models.layers.batchnorm import synchronise_batch_norm
from models.weights.vit import load_vit
from runtime.checkpoint import export_safetensors, read_weights
from runtime.config.cli import knob, run, section
from runtime.finetune import FineTuning
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, Schedule
from runtime.parallel import gradient_sync, parallelize, to_device
from runtime.run import RunConfig, evaluating, seed_everything

Metrics = dict[str, float]


@dataclass
class Config(RunConfig):
    """Classification."""

    output_dir: Path = knob(Path("output/Classification"), "folder of this run: log, checkpoints, result/")
    evaluate: bool = knob(False, "no training: score --checkpoint on val_data")
    network: ClassifierConfig = section(ClassifierConfig, flat=True)
    ema_decay: float = knob(
        0.0, "largest decay of a moving average of the weights, which is evaluated; 0 = none", low=0
    )
    ema_start: int = knob(0, "first updates in which the average is the weights themselves", low=0)
    # the data
    train_data: list[str] = knob([], "class folders, .jsonl of COYO-Labeled-300M, shards, or torchvision/NAME:SPLIT")
    val_data: str | None = knob(None, "the same for validation; none = no validation")
    data_root: Path = knob(Path("."), "folder that a list's paths start from, or of torchvision's data set")
    classes: Path | None = knob(
        None, "file with the name of one class a line; none = as class folders or num_classes say"
    )
    multi_label: bool | None = knob(None, "score images as having any number of labels; none = with the sigmoid loss")
    real: Path | None = knob(None, "real.json of ImageNet-ReaL, to be scored beside ImageNet's own labels")
    download: bool = knob(False, "let torchvision fetch its data set")
    targets: LabelOptions = section(LabelOptions, flat=True)
    views: ViTViews = section(ViTViews, flat=True)
    shuffle_buffer: int = knob(1000, "samples of a shard that a worker permutes at a time", low=1)
    error_budget: float = knob(0.01, "share of unreadable samples at which the run stops", low=0, high=1)
    mixup_alpha: float = knob(0.0, "mixup by shares from Beta(alpha, alpha); 0 = none", low=0)
    cutmix_alpha: float = knob(0.0, "CutMix likewise; with mixup each takes half of a batch", low=0)
    # the optimisation
    batch_size: int = knob(64, "images per process and micro-batch", low=1)
    batch_size_test: int = knob(64, "images per forward pass in evaluation", low=1)
    optimizer: Optimizer = section(Optimizer, flat=True, lr=1e-3, clip_grad_norm=1.0)
    scheduler: Schedule = section(Schedule, epochs="8 epochs", min_lr=0.0, warmup_lr=0.0, warmup="500 steps")
    eval_every: str = knob("1 epochs", "between two validations: a number of 'steps', 'epochs', 'samples' or '%'")

    def check(self) -> None:
        """Refuse what cannot be."""
        self.network.check()
        self.views.check()
        if not (self.checkpoint and self.val_data if self.evaluate else self.train_data):
            raise UserError("give --train-data, or --evaluate with --checkpoint and --val-data")
        if self.multi_label is None:
            self.multi_label = self.network.loss == "sigmoid"
        if self.real and (self.multi_label or not self.val_data):
            raise UserError("--real holds labels of ImageNet's validation images: give --val-data, no --multi-label")
        if self.ema_decay and self.parallel == "fsdp":
            raise UserError("--ema-decay keeps a whole second copy of the weights: use --parallel ddp")

    @property
    def metric(self) -> str:
        """What the best checkpoint is best by."""
        return "mAP" if self.multi_label else "top1"


def build_data(config: Config, names: list[str], world: World, state: dict | None) -> StreamLoader:
    """Endless batches of this process (see dataset.loading.stream), beginning at the position `state`."""
    view = TrainView(config.network.image_size, config.views, exact=config.network.original)
    sources, options = [], {"download": config.download, "shuffle_buffer": config.shuffle_buffer}
    for data in config.train_data:
        labels = Labels(config.network.num_classes, config.targets, data)
        opened = partial(training_source, data, config.data_root, view, labels, names, **options)
        sources.append(distributed.main_first(opened))
    return StreamLoader(
        Stream(sources, LabelCollate()),
        batch_size=config.batch_size,
        workers=config.workers,
        world=world,
        seed=config.seed,
        state=state,
        error_budget=config.error_budget,
    )


def validation(config: Config, names: list[str], world: World) -> Callable[[VisionClassifier], Metrics]:
    """Function model -> scores on all of `val_data`, the same on any number of processes."""
    view = EvalView(config.network.image_size, config.views.resize_small, exact=config.network.original)
    labels = Labels(config.network.num_classes, config.targets, config.val_data)
    data = Split(config.val_data, config.data_root, view, labels, names, config.download)
    real = read_real(config.real, data.file_names) if config.real else None
    own = shard_indices(len(data), world.rank, world.size)
    statistics = pixel_statistics(world.device, *config.network.statistics)
    autocast = Precision(config.precision, world.device, None).autocast

    def validate(model: VisionClassifier) -> Metrics:
        batches = EvalLoader(data.load, own, config.batch_size_test, LabelCollate(), config.workers)
        with evaluating(model), autocast():
            scores = score(lambda image: model.logits(normalize(image, statistics)), batches, own, len(data), world)
        return multi_label_metrics(scores) if config.multi_label else single_label_metrics(scores, real)

    return validate


def build_model(config: Config) -> VisionClassifier:
    """The network on the CPU with its starting weights and, as `ema`, its moving average."""
    model = VisionClassifier(config.network)
    if config.checkpoint:
        left_out = load_vit(model, read_weights(config.checkpoint))
        if config.evaluate and "head.weight" in left_out.missing:
            raise UserError(f"{config.checkpoint}: no head for {config.network.num_classes} classes to evaluate")
        distributed.on_main(lambda: print(f"{config.checkpoint}: all but", left_out.text() or "nothing", flush=True))
    if config.ema_decay:
        average = copy.deepcopy(model).requires_grad_(False)
        if config.network.original:
            torch._foreach_zero_(list(average.parameters()))
        model.ema = average
    return model


def averaged(model: VisionClassifier) -> VisionClassifier:
    """The network to evaluate and to publish."""
    return getattr(model, "ema", model)


def train_step(model, next_batch: Callable[[], dict[str, Tensor]], config: Config, precision: Precision) -> Tensor:
    """Gradients of one update; returns the loss, averaged over the micro-batches."""
    total = 0
    for micro in range(config.accumulate):
        batch = mix(next_batch(), config.mixup_alpha, config.cutmix_alpha, config.network.original)
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            loss = model(**batch)["loss"] / config.accumulate
        precision.backward(loss)
        total = total + loss.detach()
    return total


def train(config: Config, names: list[str], validate: Callable | None, world: World) -> Metrics:
    """Train, or go on; returns the scores of the best and of the last validation."""
    session = FineTuning(config, world, config.metric)
    loader = build_data(config, names, world, session.data_state())
    network = build_model(config).train()
    decayed = [name for name, _ in network.named_parameters()] if config.network.original else None
    parameters = sum(p.numel() for p in trained(network))
    network = synchronise_batch_norm(network.to(world.device))  # those of a stem; others have none
    model = parallelize(network, world, config)
    seed_everything(config.seed, world.rank)  # dropout and mixing differ from here on
    optimizer = build_optimizer(network, config.optimizer, decayed)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    session.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
    sizes = {"loader_steps": loader.steps_per_epoch, "accumulate": config.accumulate}
    batch = config.batch_size * config.accumulate * world.size
    plan = Plan.of(config.scheduler, config.optimizer.lr, batch=batch, **sizes)
    session.every = max(1, plan.steps(config.eval_every))
    about = f"{config.network.model}, {config.network.num_classes:,} classes"
    session.start(about, plan, parameters, samples_an_epoch=len(loader.stream))
    statistics, metrics = pixel_statistics(world.device, *config.network.statistics), {}
    weights, (average, followed) = trained(network), averages(network)

    def next_batch() -> dict[str, Tensor]:
        moved = to_device(session.watch.waiting(loader), world.device)
        return moved | {"image": normalize(moved["image"], statistics)}

    for step in range(session.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        loss = train_step(model, next_batch, config, precision)
        grad_norm = precision.step(optimizer, weights)
        if average:
            follow(average, followed, step + 1, config.ema_decay, config.ema_start)
        session.log_step(step + 1, loss=loss, grad_norm=grad_norm)
        if validate and session.validation_due:
            metrics = validate(averaged(session.network(partial(VisionClassifier, config.network))))
            session.keep(metrics)
        else:
            session.save_if_due(step + 1)
        session.leave_if_interrupted(step + 1)
    final = averaged(session.network(partial(VisionClassifier, config.network))).state_dict()
    distributed.on_main(lambda: export_safetensors(final, session.folder / "model.safetensors"))
    session.close()
    return metrics | ({f"best_{config.metric}": session.best} if validate else {})


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    config.check()
    data = [*config.train_data, *filter(None, [config.val_data])]
    names = distributed.main_first(partial(class_names, data, config.classes, config.data_root, config.download))
    if names:
        config.network = replace(config.network, num_classes=len(names))
    validate = validation(config, names, world) if config.val_data else None
    if config.evaluate:
        metrics = validate(averaged(build_model(config).to(world.device)))
    else:
        metrics = train(config, names, validate, world)
    rows = [(name, f"{value:.4g}") for name, value in metrics.items()]
    cards = [card(str(config.val_data), table([config.network.model, ""], rows))] if metrics else []
    distributed.on_main(lambda: write_results(config, "Classification", metrics, cards))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
