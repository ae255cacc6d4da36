"""Visual entailment (SNLI-VE) with SIMLA or ALBEF: does the image entail a sentence, contradict it, or neither?

    fine-tune   torchrun VE.py --config configs/VE/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 VE.py --config configs/VE/snli_ve.yaml --checkpoint ALBEF.pth
    evaluate    python VE.py --config configs/VE/snli_ve.yaml --checkpoint ve.pth --evaluate
    all knobs   python VE.py --help

The fusion layers read the sentence with the image; the [CLS] state is classified. The loss is the cross entropy against
(1 - alpha) * label + alpha * the momentum teacher's probabilities. The checkpoint with the best accuracy on `val_file`
is kept and tested.

Published accuracy on val / test, 4M images: ALBEF 80.1 / 80.3. Results: result/metrics.json, result/report.html.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base import distributed
from base.distributed import World
from base.errors import UserError
from dataset.loading.stream import StreamLoader
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.ve_nlvr import SNLI_VE, Statements
from dataset.text.wordpiece import TextCollate, Tokenizer
from evaluation.accuracy import class_accuracy, statement_logits, statement_report
from evaluation.report.results import write_results
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script
from runtime.config.fusion import FineTuneConfig, starting_weights
from runtime.optim.build import Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, ramp
from runtime.parallel import gradient_sync, parallelize, whole_model
from runtime.run import Run, evaluating, seed_everything


@dataclass
class Config(FineTuneConfig):
    """Visual entailment."""

    output_dir: Path = knob(Path("output/VE"), "folder of this run: log, checkpoints, result/")
    # JSON lists of {image: file without .jpg, sentence, label: entailment, neutral or contradiction}
    train_file: Path | None = knob(None, "sentences to train on")
    val_file: Path | None = knob(None, "sentences that choose the best checkpoint; none = the last one is tested")
    test_file: Path | None = knob(None, "sentences of the final test")
    image_root: Path = knob(Path("."), "folder of the images")
    batch_size_test: int = knob(64, "sentences per forward pass in evaluation", low=1)
    warm_up: bool = knob(False, "alpha rises linearly from 0 during the first epoch")


def build_model(config: Config, tokenizer: Tokenizer) -> StatementModel:
    """The network on the CPU, with random weights."""
    vit, bert = networks(config, tokenizer.vocab_size)
    return StatementModel(
        StatementConfig(
            vit=vit,
            bert=bert,
            classes=len(SNLI_VE.classes),
            distill=config.distill,
            compat=config.compat,
        )
    )


def training_data(config: Config, tokenizer: Tokenizer, world: World, state: dict | None) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    view = training_view(config)
    statements = Statements(config.train_file, SNLI_VE, config.image_root, view, config.max_words)
    return train_loader([statements.source()], TextCollate(tokenizer), config, world, state)


def evaluation_data(config: Config) -> dict[str, Statements]:
    """The splits that are given: `val` and `test`."""
    splits = {}
    for split, file in (("val", config.val_file), ("test", config.test_file)):
        if file is not None:
            view = test_view(config)
            splits[split] = Statements(file, SNLI_VE, config.image_root, view, config.max_words)
    return splits


def train_step(
    model, teacher: MomentumPairs | None, next_batch, alpha: float, config: Config, precision: Precision
) -> dict[str, Tensor]:
    """Gradients of one update: the teacher first, then `accumulate` micro-batches. Returns the mean losses, 0-d."""
    if teacher is not None:
        teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=torch.full((), alpha, device=precision.device))
            loss = losses["loss_cls"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def evaluate(
    model: StatementModel, data: Statements, tokenizer: Tokenizer, config: Config, world: World, precision: Precision
) -> Tensor:
    """Logits float32 [R,3] of all sentences of a split, the same on every process."""
    own, batches = split_loader(data, TextCollate(tokenizer), config, world)
    with evaluating(model), precision.autocast():
        return statement_logits(model, batches, own, len(data), world)


def train(
    config: Config,
    world: World,
    model: StatementModel,
    tokenizer: Tokenizer,
    val: Statements | None,
    precision: Precision,
) -> Path:
    """Fine-tune; returns the checkpoint to test."""
    run = Run(config, world, metric="accuracy" if val else None)
    loader = training_data(config, tokenizer, world, run.data_state())
    model = parallelize(model, world, config).train()
    teacher = MomentumPairs(model, config.momentum) if config.distill else None
    seed_everything(config.seed, world.rank)  # from here on ranks differ in dropout
    optimizer = build_optimizer(model, config.optimizer)
    run.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
    plan = Plan.of_loader(config.scheduler, config.optimizer.lr, loader, config.accumulate)
    run.start("Visual entailment", plan)
    parameters = list(model.parameters())
    alpha_steps = plan.epoch_steps if config.warm_up else 0

    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = config.alpha * ramp(step, alpha_steps)
        losses = train_step(model, teacher, run.next_batch, alpha, config, precision)
        grad_norm = precision.step(optimizer, parameters)
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            logits = evaluate(whole_model(model), val, tokenizer, config, world, precision)
            run.keep_best(class_accuracy(logits, val.labels, SNLI_VE.classes), step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    run.close()
    return run.result


def main(config: Config) -> None:
    if not (config.val_file or config.test_file if config.evaluate else config.train_file):
        raise UserError("give train_file, or --evaluate with --checkpoint and a val_file or test_file")
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    weights = starting_weights(config, world)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    splits = evaluation_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer)
    if weights:
        left_out = start_from(model, weights, "ve")
        if world.is_main:
            print(config.checkpoint, left_out.text(), sep="\n", flush=True)
    if not config.evaluate:
        config.checkpoint = train(config, world, model, tokenizer, splits.get("val"), precision)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "ve")
    metrics, sections = {}, []
    for split, data in splits.items():
        logits = evaluate(model.to(world.device), data, tokenizer, config, world, precision)
        metrics[split] = class_accuracy(logits, data.labels, SNLI_VE.classes)
        if world.is_main:
            cards = statement_report(split, logits, data.labels, SNLI_VE.classes, data.records, data.files)
            sections = cards + sections
    if world.is_main:
        write_results(config, "Visual entailment", metrics, sections)
    distributed.shutdown()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
