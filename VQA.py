"""Visual question answering (VQA v2, Visual Genome) with SIMLA or ALBEF.

    fine-tune   torchrun VQA.py --config configs/VQA/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 VQA.py --config configs/VQA/vqa.yaml \\
                    --checkpoint ALBEF.pth
    answer      python VQA.py --config configs/VQA/vqa.yaml --checkpoint vqa.pth --evaluate
    all knobs   python VQA.py --help

Fusion layers read the question with the image; a causal decoder over their states learns the
answers of ten annotators, each weighted by how many gave it, and soft targets of its momentum
teacher. Answering ranks a closed list: the `k_test` answers with the likeliest first token are
scored whole.

Published, VQA v2 test-dev after 4M images: ALBEF 74.5, on 8 GPUs in a day. Results:
result/vqa_result_SPLIT.json for the server, result/metrics.json with the official accuracy where
annotators' answers are known, result/report.html.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError
from dataset.loading.stream import StreamLoader
from dataset.sources.records import Records
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.vqa import (
    QuestionAnswers,
    QuestionSet,
    VqaCollate,
    encode_answers,
    read_answer_list,
)
from dataset.text.wordpiece import Tokenizer, WholeTexts
from evaluation import vqa
from evaluation.predict import over_split
from evaluation.report.results import write_results
from evaluation.report.vqa import answer_report
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.vqa import Vqa, VqaConfig
from models.weights.albef import check_kind, depth, start_from, start_task
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.fusion import FineTuneConfig, Start, fine_tuning_schedule, prepare
from runtime.config.old_names import QUESTION_ANSWERING
from runtime.optim.build import Optimizer, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, evaluating

SHOWN = 5  # answers of a question kept for the report


@dataclass
class Config(FineTuneConfig):
    """Visual question answering."""

    output_dir: Path = knob(Path("output/VQA"), "folder of this run: log, checkpoints, result/")
    # VQA: {image, question, question_id, answer: ten texts}
    # Visual Genome: {dataset: vg, image, question, question_id, answer: one text}
    train_file: list[Path] = knob(
        [], "questions with answers to train on; several files are mixed by their sizes"
    )
    val_file: Path | None = knob(
        None, "questions with answers that choose the best checkpoint; none = the last one"
    )
    test_file: list[Path] = knob([], "questions to answer in the end")
    test_answers: Path | None = knob(
        None, "official annotation file of test_file, to score the answers here"
    )
    answer_list: Path | None = knob(None, "closed list of answers to choose from (JSON)")
    vqa_root: Path = knob(
        Path("."), "folder that image paths of VQA's entries start from", aliases=("image_root",)
    )
    vg_root: Path | None = knob(None, "the same for Visual Genome's; none = vqa_root")
    batch_size_test: int = knob(16, "questions per forward pass in evaluation", low=1)
    max_tokens: int = knob(25, "tokens kept of a question in training, [CLS] included", low=2)
    max_words_test: int = knob(50, "words kept of a question in evaluation", low=1)
    k_test: int = knob(128, "answers of the list that are scored whole, per question", low=1)
    decoder_layers: int | None = knob(
        None, "layers of the answer decoder; none = half of the encoder's, as published", low=1
    )
    scheduler: Schedule = fine_tuning_schedule(duration="8 epochs", warmup="400 steps")

    text_fields = ("question", "answer")  # that `text_encoder: trained` learns from
    IGNORED = QUESTION_ANSWERING
    optimizer: Optimizer = section(Optimizer, flat=True, lr=2e-5)

    @property
    def roots(self) -> dict[str, Path]:
        return {"vqa": self.vqa_root, "vg": self.vg_root or self.vqa_root}


def build_model(config: Config, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> Vqa:
    """The network on the CPU, with random weights; the decoder is as deep as a VQA checkpoint's."""
    vit, bert = networks(config, tokenizer.vocab_size)
    layers = config.decoder_layers or depth(weights, "text_decoder")
    return Vqa(
        VqaConfig(
            vit=vit,
            bert=bert,
            decoder_layers=layers or max(1, bert.num_hidden_layers // 2),
            distill=config.distill,
            compat=config.compat,
        )
    )


def training_data(config: Config, tokenizer: Tokenizer, world, state: dict | None) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate a --checkpoint")
    build = QuestionAnswers(training_view(config), config.roots, config.max_words)
    sources = [build.source(file) for file in config.train_file]
    return train_loader(sources, VqaCollate(tokenizer, config.max_tokens), config, world, state)


def evaluation_data(config: Config) -> tuple[dict[str, QuestionSet], list[str]]:
    """The splits that are given, and the list of answers."""
    files = {"val": (config.val_file, None), "test": (config.test_file, config.test_answers)}
    splits = {}
    for split, (file, answers) in files.items():
        if file:
            records = Records(file, ("image", "question", "question_id")).complete()
            view = test_view(config)
            splits[split] = QuestionSet(
                records, config.roots, view, config.max_words_test, answers, f"{split}_file"
            )
    if "val" in splits and not splits["val"].truth:
        raise UserError(
            f"val_file {config.val_file}: its entries have no `answer`; give them under test_file"
        )
    if config.evaluate and not splits:
        raise UserError("--evaluate needs test_file or val_file: the questions to answer")
    if config.answer_list is None:
        raise UserError(
            "answer_list: none is given; name the JSON list of the answers to choose from"
        )
    return splits, read_answer_list(config.answer_list)


def train_step(model, teacher, next_batch, alpha, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update. Returns the losses, 0-d means over the micro-batches.

    The teacher of answers moves first; where there is none (--no-distill), alpha has no effect.
    """
    if teacher is not None:
        teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=alpha)
            loss = losses["loss_vqa"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def evaluate(
    model: Vqa, data: QuestionSet, answers: list[str], tokenizer, config: Config, start: Start
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """`(indices of the best answers int64 [Q,5], their probabilities [Q,5], damaged images)` for
    all questions, the same on every process."""
    own, batches = split_loader(data, WholeTexts(tokenizer, model.positions), config, start.world)
    ids, mask = encode_answers(answers, tokenizer)
    ids = ids.to(start.world.device)
    length = mask.sum(1).to(start.world.device)
    k = min(config.k_test, len(answers))

    def predict(image: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        best, probability = model.rank_answers(image, text_ids, text_mask, ids, length, k)
        return best[:, :SHOWN], probability[:, :SHOWN]

    with evaluating(model), start.precision.autocast():
        found = over_split(predict, batches, own, len(data), start.world, "answering")
    return *found, batches.damages()


def accuracy(data: QuestionSet, answers: list[str], best: Tensor, config: Config) -> dict:
    """Official VQA accuracy in percent; {} if the truth is unknown. best: int64 [Q,5]."""
    if not data.truth:
        return {}
    found = vqa.likeliest_answers(data.ids, answers, best)
    one_sided = config.compat == "original"
    scores = vqa.vqa_accuracy(found, data.truth, one_sided)
    return scores | {"chance": vqa.prior_accuracy(data.truth, one_sided)["overall"]}


def train(model: Vqa, val: QuestionSet | None, answers, tokenizer, config, start: Start) -> Path:
    """Fine-tune; returns the checkpoint to test."""
    run = Run(config, start.world, metric="overall" if val else None)
    loader = training_data(config, tokenizer, start.world, run.data_state())
    model, optimizer, plan = run.begin("Visual question answering", model, loader, start.precision)
    teacher = MomentumPairs(model, config.momentum) if config.distill else None

    if run.validation_due(run.step):  # resumed after a kill in a validation
        best, _, damages = evaluate(whole_model(model), val, answers, tokenizer, config, start)
        run.keep_best(accuracy(val, answers, best, config) | damages, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha_at(step, plan), device=start.world.device)
        losses = train_step(model, teacher, run.next_batch, alpha, config, start.precision)
        grad_norm = start.precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            best, _, damages = evaluate(whole_model(model), val, answers, tokenizer, config, start)
            run.keep_best(accuracy(val, answers, best, config) | damages, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()


def main(config: Config) -> None:
    start = prepare(config)
    check_kind(start.weights, "vqa")
    splits, answers = evaluation_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer, start.weights)
    start_task(model, start.weights, "vqa", config.checkpoint)
    one_sided = config.compat == "original"
    for split, data in splits.items():
        vqa.check_answer_list(config.answer_list, answers, data.truth, split, one_sided)
    if not config.evaluate:
        config.checkpoint = train(model, splits.get("val"), answers, tokenizer, config, start)
        model = Vqa(model.config)
        start_from(model, read_weights(config.checkpoint), "vqa")
    model.to(start.world.device)
    metrics = {"k_test": min(config.k_test, len(answers))}
    sections = []
    for split, data in splits.items():
        best, probability, damages = evaluate(model, data, answers, tokenizer, config, start)
        scores = accuracy(data, answers, best, config) or {"questions": len(data)}
        metrics[split] = scores | damages
        if start.world.is_main:
            file = config.output_dir / f"result/vqa_result_{split}.json"
            vqa.save_answers(file, vqa.likeliest_answers(data.ids, answers, best))
            cards = answer_report(
                split, data, answers, best, probability, metrics[split], one_sided
            )
            sections = cards + sections
    write_results(config, "Visual question answering", metrics, sections)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
