"""NLVR2 with SIMLA or ALBEF: is a sentence about two images true? In two stages, by `stage` of the config.

    1 assignment  torchrun --nproc_per_node=8 NLVR.py --config configs/NLVR/assignment.yaml --checkpoint ALBEF.pth
    2 fine-tune   torchrun --nproc_per_node=8 NLVR.py --config configs/NLVR/nlvr2.yaml \\
                      --checkpoint output/NLVR/assignment
    evaluate      python NLVR.py --config configs/NLVR/nlvr2.yaml --checkpoint nlvr.pth --evaluate

The fusion layers are doubled, one for either image, with shared keys and values. Text assignment (stage 1) gets the
new arrangement used to its task: given a caption and two images, is it about the first, the second or neither?
Fine-tuning classifies the [CLS] state, with a momentum teacher's soft targets.

Published accuracy on dev / test-P, 4M images: ALBEF 80.2 / 80.5. Results: result/metrics.json, result/report.html.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from base import distributed
from base.errors import UserError
from dataset.images.decode import check_image_root
from dataset.loading.stream import RecordSource
from dataset.sources.records import Records
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.ve_nlvr import NLVR2, ORIGINAL_NLVR2, CaptionPair, Statements
from dataset.text.wordpiece import TextCollate, Tokenizer
from evaluation.accuracy import class_accuracy, statement_logits, statement_report
from evaluation.report.results import write_results
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.text_assignment import TextAssignment, TextAssignmentConfig, for_two_images
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.finetune import FineTuneConfig, FineTuning, prepare
from runtime.optim.build import Precision
from runtime.optim.schedule import Schedule
from runtime.parallel import parallelize
from runtime.run import evaluating


@dataclass
class Config(FineTuneConfig):
    """NLVR2."""

    output_dir: Path = knob(Path("output/NLVR"), "folder of this run: log, checkpoints, result/")
    stage: str = knob("finetune", "which of the two stages", choices=("text_assignment", "finetune"))
    # text assignment: {image, caption}, as for pre-training; fine-tuning: {images: [left, right], sentence, label}
    train_file: list[Path] = knob([], "annotations to train on")
    val_file: list[Path] = knob([], "pairs that choose the best checkpoint; none = the last one is tested")
    test_file: list[Path] = knob([], "pairs of the final test")
    image_root: Path = knob(Path("."), "folder that image paths start from")
    batch_size_train: int = knob(16, "pairs (captions) per process and micro-batch", low=1, aliases=("batch_size",))
    paired_from: int | None = knob(
        None, "first text layer that is doubled; none = the later half, or as the checkpoint"
    )
    max_tokens: int = knob(25, "tokens kept of a caption in text assignment, [CLS] included", low=2)
    scheduler: Schedule = section(Schedule, aliases=("schedular",), epochs="10 epochs", min_lr=1e-6, warmup="100 steps")


def network(config: Config, tokenizer: Tokenizer, weights) -> TextAssignment | StatementModel:
    """The stage's network on the CPU: at random, or from a checkpoint that fits the stage."""
    vit, bert = networks(config, tokenizer.vocab_size)
    bert, first = for_two_images(bert, config.paired_from, weights)
    if config.stage == "text_assignment":
        model = TextAssignment(TextAssignmentConfig(vit, bert, first, config.embed_dim))
    else:
        model = StatementModel(StatementConfig(vit, bert, 2, first, config.distill, config.compat))
    if weights:
        # the originals' teacher kept its random weights: it was copied before the checkpoint was read
        task = "text_assignment" if config.stage == "text_assignment" else "nlvr"
        left_out = start_from(model, weights, task, fill_momentum=config.compat == "none")
        distributed.on_main(lambda: print(config.checkpoint, left_out.text(), sep="\n", flush=True))
    return model


def read_pairs(files: list[Path], config: Config, view) -> Statements:
    """The statements of annotation files; all labels and pairs are checked."""
    form = NLVR2 if config.compat == "none" else ORIGINAL_NLVR2
    return Statements(files, form, config.image_root, view, config.max_words)


def judge(
    model: StatementModel, pairs: Statements, tokenizer: Tokenizer, config: Config, world, precision
) -> torch.Tensor:
    """Logits float32 [R,2] of all pairs, the same on every process."""
    own, loader = split_loader(pairs, TextCollate(tokenizer), config, world)
    with evaluating(model), precision.autocast():
        return statement_logits(model, loader, own, len(pairs), world)


def assign_texts(config: Config, world, model: TextAssignment, tokenizer: Tokenizer, precision: Precision) -> None:
    """Stage 1. The checkpoint for stage 2 is the newest in output_dir; `model.safetensors` holds its weights."""
    session = FineTuning(config, world, metric="")
    records = Records(config.train_file)
    check_image_root(config.image_root, (records[i]["image"] for i in range(min(10, len(records)))))
    captions = CaptionPair(training_view(config), config.image_root, config.max_words)
    source, collate = RecordSource(records, captions, "train_file"), TextCollate(tokenizer, config.max_tokens)
    data = train_loader([source], collate, config, world, session.data_state())
    wrapped = parallelize(model, world, config).train()
    session.begin("NLVR2 text assignment", wrapped, data, precision)
    for _ in session:
        session.learn(lambda batch: wrapped(**batch))
    session.export()


def finetune(
    config: Config, world, model: StatementModel, tokenizer: Tokenizer, val: Statements | None, precision
) -> Path:
    """Stage 2; the checkpoint to test."""
    session, build = FineTuning(config, world, metric="accuracy"), partial(StatementModel, model.config)
    pairs = read_pairs(config.train_file, config, training_view(config))
    data = train_loader([pairs.source()], TextCollate(tokenizer), config, world, session.data_state())
    wrapped = parallelize(model, world, config).train()
    teacher = MomentumPairs(wrapped, config.momentum) if config.distill else None
    session.begin("NLVR2 fine-tuning", wrapped, data, precision)
    for alpha in session:
        if teacher:
            teacher.update()
        session.learn(lambda batch, alpha=alpha: wrapped(**batch, alpha=alpha))
        if val is not None and session.validation_due:
            logits = judge(session.network(build), val, tokenizer, config, world, precision)
            session.keep(class_accuracy(logits, val.labels, NLVR2.classes))
    return session.result


def check(config: Config) -> None:
    """Mistakes that would show late."""
    if not config.evaluate and not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to score a checkpoint")
    if config.stage == "text_assignment" and (config.evaluate or config.val_file or config.test_file):
        raise UserError("stage text_assignment only trains: leave out --evaluate, val_file and test_file")
    if config.evaluate and not (config.val_file or config.test_file):
        raise UserError("--evaluate needs val_file or test_file: the pairs to judge")
    if config.parallel == "fsdp":
        raise UserError("--parallel fsdp: the doubled layers share parameters, which FSDP2 cannot shard; use ddp")


def main(config: Config) -> None:
    check(config)
    world, weights, precision = prepare(config)
    files = {split: getattr(config, f"{split}_file") for split in ("val", "test")}
    sets = {split: read_pairs(named, config, test_view(config)) for split, named in files.items() if named}
    tokenizer = Tokenizer(config.text_encoder)
    model = network(config, tokenizer, weights)
    if config.stage == "text_assignment":
        assign_texts(config, world, model, tokenizer, precision)
    elif not config.evaluate:
        config.checkpoint = finetune(config, world, model, tokenizer, sets.get("val"), precision)
        model = network(config, tokenizer, read_weights(config.checkpoint))
    found = {
        split: judge(model.to(world.device), data, tokenizer, config, world, precision) for split, data in sets.items()
    }
    if world.is_main and found:
        truth = {split: (logits, sets[split].labels, NLVR2.classes) for split, logits in found.items()}
        metrics = {split: class_accuracy(*answer) for split, answer in truth.items()}
        cards = [statement_report(s, *answer, sets[s].records, sets[s].files) for s, answer in truth.items()]
        write_results(config, "NLVR2", metrics, sum(reversed(cards), []))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
