"""Visual entailment (SNLI-VE) with SIMLA or ALBEF: does an image entail a sentence?

    fine-tune   torchrun VE.py --config configs/VE/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 VE.py --config configs/VE/snli_ve.yaml \\
                    --checkpoint ALBEF.pth
    evaluate    python VE.py --config configs/VE/snli_ve.yaml --checkpoint ve.pth --evaluate
    all knobs   python VE.py --help

Data: JSON lists of {image, sentence, label}. `image` is a file below `image_root`, without .jpg as
in the published lists; `label` is entailment, neutral or contradiction. Every label is checked
before training begins.

Network: the text tokens attend to the image tokens in the fusion layers; an MLP on the [CLS] state
gives the logits of the three classes. It starts from a checkpoint of SIMLA's or ALBEF's
pre-training, with an MLP of random weights, or from a fine-tuned checkpoint of the originals or of
this script. Architecture options that are unset are the checkpoint's.

Loss: cross entropy against (1 - alpha) * label + alpha * the probabilities of the momentum teacher,
which follows the student at every update. --no-distill trains on the labels alone; with --warm-up
alpha rises from 0 during the first epoch.

Evaluation: accuracy, overall and by class, beside that of always giving the most frequent class.
`val_file` is scored every `eval_every`; the best checkpoint is kept, and tested on `test_file`.

Published accuracy on val / test, 4M images: ALBEF 80.1 / 80.3. Results: result/metrics.json and
result/report.html, with sentences judged right and wrong. SIGTERM and SIGUSR1 save and exit with
status 75; the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from base.errors import UserError
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.ve_nlvr import SNLI_VE, Statements
from dataset.text.wordpiece import Tokenizer, WholeTexts
from evaluation.accuracy import class_accuracy, class_results, statement_logits
from evaluation.report.results import write_results
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.weights.albef import check_kind, start_from, start_task
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, restated, run_script, section
from runtime.config.fusion import FineTuneConfig, Start, prepare
from runtime.optim.build import Optimizer, set_learning_rate
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run


@dataclass
class Config(FineTuneConfig):
    """Visual entailment."""

    output_dir: Path = knob(Path("output/VE"), "folder of this run: log, checkpoints, result/")
    train_file: Path | None = knob(None, "sentences to train on")
    val_file: Path | None = knob(
        None, "sentences that choose the best checkpoint; none = the last one is tested"
    )
    test_file: Path | None = knob(None, "sentences of the final test")
    image_root: Path = knob(Path("."), "folder of the images")
    batch_size_test: int = knob(64, "sentences per forward pass in evaluation", low=1)
    warm_up: bool = restated(FineTuneConfig, "warm_up", False)
    optimizer: Optimizer = section(Optimizer, flat=True, lr=2e-5, weight_decay=0.02)
    text_fields = ("sentence",)  # that `text_encoder: trained` learns from


def build_model(config: Config, tokenizer: Tokenizer) -> StatementModel:
    """The network on the CPU, with random weights."""
    vit, bert = networks(config, tokenizer.vocab_size)
    options = StatementConfig(vit=vit, bert=bert, classes=len(SNLI_VE.classes))
    options.distill = config.distill
    options.compat = config.compat
    return StatementModel(options)


def read_sentences(file: Path, config: Config, view) -> Statements:
    """The sentences of a file with their images, which `view` transforms."""
    return Statements(file, SNLI_VE, config.image_root, view, config.max_words)


def evaluation_data(config: Config) -> dict[str, Statements]:
    """The sentences to judge, under `val` and `test`."""
    splits = {}
    if config.val_file:
        splits["val"] = read_sentences(config.val_file, config, test_view(config)).complete()
    if config.test_file:
        splits["test"] = read_sentences(config.test_file, config, test_view(config)).complete()
    return splits


def train_step(student, teacher, next_batch, alpha, config, precision) -> dict:
    """Gradients of one update. Returns the losses by name, 0-d means over the micro-batches.

    The teacher moves first; without one (--no-distill) alpha has no effect.
    """
    if teacher is not None:
        teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(student, last=micro == config.accumulate - 1), precision.autocast():
            losses = student(**batch, alpha=alpha)
            loss = losses["loss_cls"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def judge(model: StatementModel, data: Statements, tokenizer, config, start: Start):
    """`(logits float32 [R,3], damaged images)` of all sentences of a split, the same on every
    process."""
    model.to(start.world.device)
    own, batches = split_loader(data, WholeTexts(tokenizer, model.positions), config, start.world)
    return statement_logits(model, batches, own, len(data), start.world, start.precision)


def train(model: StatementModel, val: Statements | None, tokenizer, config, start: Start) -> Path:
    """Fine-tune; returns the checkpoint to test."""
    world, precision = start.world, start.precision
    run = Run(config, world, metric="accuracy" if val else None)
    sentences = read_sentences(config.train_file, config, training_view(config))
    collate = WholeTexts(tokenizer, model.positions)
    loader = train_loader([sentences.source()], collate, config, world, run.data_state())
    model, optimizer, plan = run.begin("Visual entailment", model, loader, precision)
    teacher = MomentumPairs(model, config.momentum) if config.distill else None

    if run.validation_due(run.step):  # resumed after a kill in a validation
        logits, damages = judge(whole_model(model), val, tokenizer, config, start)
        run.keep_best(class_accuracy(logits, val.labels, SNLI_VE.classes) | damages, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha_at(step, plan), device=world.device)
        losses = train_step(model, teacher, run.next_batch, alpha, config, precision)
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            logits, damages = judge(whole_model(model), val, tokenizer, config, start)
            run.keep_best(class_accuracy(logits, val.labels, SNLI_VE.classes) | damages, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()


def main(config: Config) -> None:
    if config.evaluate and not (config.val_file or config.test_file):
        raise UserError("--evaluate needs val_file or test_file: the sentences to judge")
    if not config.evaluate and config.train_file is None:
        raise UserError("give train_file, or --evaluate and a --checkpoint to score")
    start = prepare(config)
    check_kind(start.weights, "ve")
    splits = evaluation_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer)
    start_task(model, start.weights, "ve", config.checkpoint)
    if not config.evaluate:
        val = splits.get("val")
        config.checkpoint = train(model, val, tokenizer, config, start)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "ve")
    judged = {split: judge(model, data, tokenizer, config, start) for split, data in splits.items()}
    metrics, cards = class_results(judged, splits, SNLI_VE.classes)
    write_results(config, "Visual entailment", metrics, cards)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
