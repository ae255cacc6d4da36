"""NLVR2 with SIMLA or ALBEF: is a sentence about two images true? In two stages (--stage).

    1 assignment  torchrun --nproc_per_node=8 NLVR.py --config configs/NLVR/assignment.yaml \\
                      --checkpoint ALBEF.pth
    2 fine-tune   torchrun --nproc_per_node=8 NLVR.py --config configs/NLVR/nlvr2.yaml \\
                      --checkpoint output/NLVR/assignment
    evaluate      python NLVR.py --config configs/NLVR/nlvr2.yaml --checkpoint nlvr.pth --evaluate

The fusion layers are doubled, one for each image, with shared keys and values. Text assignment
(stage 1) prepares the new arrangement: given a caption and two images, is it about the first, the
second or neither? Fine-tuning (stage 2) classifies the [CLS] state, with the momentum teacher's
soft targets.

Published accuracy on dev / test-P, 4M images: ALBEF 80.2 / 80.5. Results: result/metrics.json,
result/report.html.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError
from dataset.images.decode import check_image_root
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.ve_nlvr import NLVR2, ORIGINAL_NLVR2, CaptionPair, Statements
from dataset.text.wordpiece import TextCollate, Tokenizer, WholeTexts
from evaluation.accuracy import class_accuracy, class_results, statement_logits
from evaluation.report.results import write_results
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.text_assignment import TextAssignment, TextAssignmentConfig, for_two_images
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.layers.xbert import BertConfig
from models.weights.albef import check_kind, start_task
from runtime.checkpoint import read_weights
from runtime.config import originals
from runtime.config.cli import knob, run_script
from runtime.config.fusion import FineTuneConfig, Start, fine_tuning_schedule, prepare
from runtime.optim.build import set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run


@dataclass
class Config(FineTuneConfig):
    """NLVR2."""

    translate = staticmethod(originals.nlvr)

    output_dir: Path = knob(Path("output/NLVR"), "folder of this run: log, checkpoints, result/")
    stage: str = knob(
        "finetune", "which of the two stages", choices=("text_assignment", "finetune")
    )
    # text assignment: {image, caption}, as for pre-training
    # fine-tuning: {images: [left, right], sentence, label}
    train_file: list[Path] = knob([], "annotations to train on")
    val_file: list[Path] = knob(
        [], "pairs that choose the best checkpoint; none = the last one is tested"
    )
    test_file: list[Path] = knob([], "pairs of the final test")
    image_root: Path = knob(Path("."), "folder that image paths start from")
    batch_size_train: int = knob(
        16, "pairs (captions) per process and micro-batch", low=1, aliases=("batch_size",)
    )
    paired_from: int | None = knob(
        None, "first text layer that is doubled; none = the later half, or as the checkpoint", low=0
    )
    max_tokens: int = knob(25, "tokens kept of a caption in text assignment, [CLS] included", low=2)
    scheduler: Schedule = fine_tuning_schedule(duration="10 epochs", warmup="100 steps")

    @property
    def text_fields(self) -> list[str]:
        """The field that `text_encoder: trained` learns from."""
        return ["caption"] if self.stage == "text_assignment" else ["sentence"]

    @property
    def kind(self) -> str:
        """The kind of checkpoint that the stage makes."""
        return "text_assignment" if self.stage == "text_assignment" else "nlvr"


def build_model(config: Config, tokenizer: Tokenizer, weights: dict[str, Tensor]):
    """The stage's network on the CPU: random, or from a checkpoint that fits the stage."""
    vit, bert = networks(config, tokenizer.vocab_size)
    bert, first = for_two_images(bert, config.paired_from, weights)
    if config.stage == "text_assignment":
        model = TextAssignment(
            TextAssignmentConfig(vit=vit, bert=bert, paired_from=first, embed_dim=config.embed_dim)
        )
    else:
        model = StatementModel(
            StatementConfig(
                vit=vit,
                bert=bert,
                classes=len(NLVR2.classes),
                paired_from=first,
                distill=config.distill,
                compat=config.compat,
            )
        )
    # the originals' teacher kept its random weights: copied before the checkpoint was read
    fill_momentum = config.compat == "none"
    start_task(model, weights, config.kind, config.checkpoint, fill_momentum)
    return model


def read_pairs(files: list[Path], config: Config, view) -> Statements:
    """The sentences of annotation files with their two images; all labels and pairs are checked."""
    form = NLVR2 if config.compat == "none" else ORIGINAL_NLVR2
    return Statements(files, form, config.image_root, view, config.max_words)


def training_data(
    config: Config, tokenizer: Tokenizer, bert: BertConfig, world, state: dict | None
) -> StreamLoader:
    """Endless batches of this process for the stage, from the position `state` on. bert: of the
    network."""
    view = training_view(config)
    if config.stage == "text_assignment":
        records = Records(config.train_file)
        check_image_root(config.image_root, (record["image"] for record in records))
        captions = CaptionPair(view, config.image_root, config.max_words)
        source = RecordSource(records, captions, "train_file")
        collate = TextCollate(tokenizer, config.max_tokens)
    else:
        source = read_pairs(config.train_file, config, view).source()
        collate = WholeTexts(tokenizer, bert.max_position_embeddings)
    return train_loader([source], collate, config, world, state)


def evaluation_data(config: Config) -> dict[str, Statements]:
    """The splits that are given: `val` and `test`."""
    files = {"val": config.val_file, "test": config.test_file}
    view = test_view(config)
    return {
        split: read_pairs(named, config, view).complete() for split, named in files.items() if named
    }


def train_step(model, teacher, next_batch, alpha, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update of a stage. Returns the losses, 0-d means over the micro-batches.

    Text assignment has no teacher and takes no alpha.
    """
    if teacher is not None:
        teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            if config.stage == "text_assignment":
                losses = model(**batch)
                loss = losses["loss_ta"]
            else:
                losses = model(**batch, alpha=alpha)
                loss = losses["loss_cls"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def evaluate(model: StatementModel, pairs: Statements, tokenizer, config: Config, start: Start):
    """`(logits float32 [R,2], damaged images)` of all pairs of a split, the same on every
    process."""
    own, batches = split_loader(pairs, WholeTexts(tokenizer, model.positions), config, start.world)
    return statement_logits(model, batches, own, len(pairs), start.world, start.precision)


def train(model, val: Statements | None, tokenizer: Tokenizer, config, start: Start) -> Path:
    """Either stage. Returns the checkpoint to test, or to start stage 2 from; stage 1 also writes
    its weights as model.safetensors."""
    finetunes = config.stage == "finetune"
    run = Run(config, start.world, metric="accuracy" if val else None)
    loader = training_data(config, tokenizer, model.config.bert, start.world, run.data_state())
    title = "NLVR2 fine-tuning" if finetunes else "NLVR2 text assignment"
    model, optimizer, plan = run.begin(title, model, loader, start.precision)
    teacher = MomentumPairs(model, config.momentum) if finetunes and config.distill else None

    if run.validation_due(run.step):  # resumed after a kill in a validation
        logits, damages = evaluate(whole_model(model), val, tokenizer, config, start)
        run.keep_best(class_accuracy(logits, val.labels, NLVR2.classes) | damages, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha_at(step, plan), device=start.world.device)
        losses = train_step(model, teacher, run.next_batch, alpha, config, start.precision)
        grad_norm = start.precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            logits, damages = evaluate(whole_model(model), val, tokenizer, config, start)
            run.keep_best(class_accuracy(logits, val.labels, NLVR2.classes) | damages, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    if not finetunes:
        run.export()
    return run.finish()


def check(config: Config) -> None:
    """Fail early on inconsistent options."""
    assigns = config.stage == "text_assignment"
    if not config.evaluate and not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to score a checkpoint")
    if assigns and (config.evaluate or config.val_file or config.test_file):
        raise UserError(
            "stage text_assignment only trains: leave out --evaluate, val_file and test_file"
        )
    if config.evaluate and not (config.val_file or config.test_file):
        raise UserError("--evaluate needs val_file or test_file: the pairs to judge")
    if config.parallel == "fsdp":
        raise UserError(
            "--parallel fsdp: FSDP2 cannot shard the parameters that doubled layers share; use ddp"
        )


def main(config: Config) -> None:
    check(config)
    start = prepare(config)
    check_kind(start.weights, config.kind)
    splits = evaluation_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer, start.weights)
    if not config.evaluate:
        config.checkpoint = train(model, splits.get("val"), tokenizer, config, start)
    if config.stage == "text_assignment":
        return
    if not config.evaluate:
        model = build_model(config, tokenizer, read_weights(config.checkpoint))
    model.to(start.world.device)
    judged = {}
    for split, pairs in splits.items():
        judged[split] = evaluate(model, pairs, tokenizer, config, start)
    if splits:
        write_results(config, "NLVR2", *class_results(judged, splits, NLVR2.classes))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
