"""Visual entailment (SNLI-VE) with SIMLA or ALBEF: does the image entail, contradict or leave open a sentence?

    fine-tune   torchrun VE.py --config configs/VE/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 VE.py --config configs/VE/snli_ve.yaml --checkpoint ALBEF.pth
    evaluate    python VE.py --config configs/VE/snli_ve.yaml --checkpoint ve.pth --evaluate

The sentence is fused with the image and the [CLS] state classified, with cross entropy against (1 - alpha) * label +
alpha * the momentum teacher's probabilities. The checkpoint best on `val_file` is kept and tested.

Published accuracy on val / test, 4M images: ALBEF 80.1 / 80.3. Results: result/metrics.json, result/report.html.
"""

from dataclasses import dataclass
from pathlib import Path

from base import distributed
from base.errors import UserError
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
from runtime.config.cli import knob, run
from runtime.finetune import FineTuneConfig, FineTuning, Setting, prepare
from runtime.parallel import parallelize
from runtime.run import evaluating


@dataclass
class Config(FineTuneConfig):
    """Visual entailment."""

    output_dir: Path = knob(Path("output/VE"), "folder of this run: log, checkpoints, result/")
    # JSON lists of {image: file without .jpg, sentence, label: entailment, neutral or contradiction}
    train_file: Path | None = knob(None, "statements to train on")
    val_file: Path | None = knob(None, "statements that choose the best checkpoint; none = the last one is tested")
    test_file: Path | None = knob(None, "statements of the final test")
    image_root: Path = knob(Path("."), "folder of the images")
    batch_size_test: int = knob(64, "statements per forward pass in evaluation", low=1)
    warm_up: bool = knob(False, "let alpha grow from 0 during the first epoch")


def read(file: Path, config: Config, view) -> Statements:
    """The statements of a file; all labels are checked."""
    return Statements(file, SNLI_VE, config.image_root, view, config.max_words)


def judge(model: StatementModel, data: Statements, tokenizer: Tokenizer, config: Config, job: Setting):
    """Logits float32 [R,3] of all statements, the same on every process."""
    own, loader = split_loader(data, TextCollate(tokenizer), config, job.world)
    with evaluating(model), job.precision.autocast():
        return statement_logits(model, loader, own, len(data), job.world)


def train(model: StatementModel, val: Statements | None, tokenizer: Tokenizer, config: Config, job: Setting) -> Path:
    """Fine-tune; the checkpoint to test."""
    tuning, settings = FineTuning(config, job.world, metric="accuracy"), model.config
    source = read(config.train_file, config, training_view(config)).source()
    loader = train_loader([source], TextCollate(tokenizer), config, job.world, tuning.data_state())
    student = parallelize(model, job.world, config).train()
    teacher = MomentumPairs(student, config.momentum) if config.distill else None
    tuning.begin("Visual entailment", student, loader, job.precision)
    for alpha in tuning:
        if teacher is not None:
            teacher.update()
        tuning.learn(lambda batch, alpha=alpha: student(**batch, alpha=alpha))
        if val and tuning.validation_due:
            logits = judge(tuning.network(lambda: StatementModel(settings)), val, tokenizer, config, job)
            tuning.keep(class_accuracy(logits, val.labels, SNLI_VE.classes))
    return tuning.result


def main(config: Config) -> None:
    if not (config.val_file or config.test_file if config.evaluate else config.train_file):
        raise UserError("give train_file, or --evaluate with --checkpoint and a val_file or test_file")
    job = prepare(config)
    files = {"val": config.val_file, "test": config.test_file}
    sets = {split: read(file, config, test_view(config)) for split, file in files.items() if file}
    tokenizer = Tokenizer(config.text_encoder)
    geometry = networks(config, tokenizer.vocab_size)
    settings = StatementConfig(*geometry, len(SNLI_VE.classes), distill=config.distill, compat=config.compat)
    model = StatementModel(settings)
    if job.weights:
        left_out = start_from(model, job.weights, "ve")
        distributed.on_main(lambda: print(config.checkpoint, left_out.text(), sep="\n", flush=True))
    if not config.evaluate:
        config.checkpoint = train(model, sets.get("val"), tokenizer, config, job)
        model = StatementModel(settings)
        start_from(model, read_weights(config.checkpoint), "ve")
    metrics, cards = {}, []
    for split, data in sets.items():
        answers = (judge(model.to(job.world.device), data, tokenizer, config, job), data.labels, SNLI_VE.classes)
        metrics[split] = class_accuracy(*answers)
        cards = statement_report(split, *answers, data.records, data.files) + cards if job.world.is_main else []
    distributed.on_main(lambda: write_results(config, "Visual entailment", metrics, cards))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
