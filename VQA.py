"""Visual question answering (VQA v2, with Visual Genome) with SIMLA or ALBEF: fine-tune, answer, score.

    fine-tune   torchrun VQA.py --config configs/VQA/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 VQA.py --config configs/VQA/vqa.yaml --checkpoint ALBEF.pth
    answer      python VQA.py --config configs/VQA/vqa.yaml --checkpoint vqa.pth --evaluate
    all knobs   python VQA.py --help

The question is fused with the image; a causal decoder over the fused states learns the answers of ten people, each
weighted by how many gave it, and soft targets of its momentum teacher. Answering ranks a closed list: the `k_test`
answers whose first piece is likeliest are scored whole.

Published, VQA v2 test-dev after 4M images: ALBEF 74.5, on 8 GPUs in a day. Results: result/vqa_result_SPLIT.json for
the server, result/metrics.json with the official accuracy where people's answers are known, result/report.html.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from base import distributed
from base.errors import UserError
from dataset.loading.stream import StreamLoader
from dataset.sources.records import Records
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.vqa import QuestionAnswers, QuestionSet, VqaCollate, encode_answers, read_answer_list, unreachable
from dataset.text.wordpiece import TextCollate, Tokenizer
from evaluation.predict import over_split
from evaluation.report.examples import answer_case, gallery
from evaluation.report.page import card, score_table
from evaluation.report.results import write_results
from evaluation.vqa import answer_score, prior_accuracy, save_answers, vqa_accuracy
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.vqa import Vqa, VqaConfig
from models.weights.albef import depth, start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.finetune import FineTuneConfig, FineTuning, prepare
from runtime.optim.build import Optimizer
from runtime.optim.schedule import Schedule
from runtime.parallel import parallelize
from runtime.run import evaluating

SHOWN = 5  # answers of a question kept for the report


@dataclass
class Config(FineTuneConfig):
    """Visual question answering."""

    output_dir: Path = knob(Path("output/VQA"), "folder of this run: log, checkpoints, result/")
    # entries {image, question, question_id, answer: ten texts} of VQA, {dataset: vg, ..., answer: one text} of Genome
    train_file: list[Path] = knob([], "questions with answers to train on; several files are mixed by their sizes")
    val_file: Path | None = knob(None, "questions with answers that choose the best checkpoint; none = the last one")
    test_file: list[Path] = knob([], "questions to answer in the end")
    test_answers: Path | None = knob(None, "official annotation file of test_file, to score the answers here")
    answer_list: Path | None = knob(None, "closed list of answers to choose from (JSON)")
    vqa_root: Path = knob(Path("."), "folder that image paths of VQA's entries start from")
    vg_root: Path | None = knob(None, "the same for Visual Genome's; none = vqa_root")
    batch_size_test: int = knob(16, "questions per forward pass in evaluation", low=1)
    max_tokens: int = knob(25, "tokens kept of a question in training, [CLS] included", low=2)
    max_words_test: int = knob(50, "words kept of a question in evaluation", low=1)
    k_test: int = knob(128, "answers of the list that are scored whole, per question", low=1)
    decoder_layers: int | None = knob(None, "layers of the answer decoder; none = half of the encoder's, as published")
    eos: str = knob("[SEP]", "accepted from old configurations: the token that ends an answer", choices=("[SEP]",))
    scheduler: Schedule = section(Schedule, aliases=("schedular",), epochs="8 epochs", min_lr=1e-6, warmup="400 steps")
    optimizer: Optimizer = section(Optimizer, lr=2e-5)

    @property
    def roots(self) -> dict[str, Path]:
        return {"vqa": self.vqa_root, "vg": self.vg_root or self.vqa_root}


def build_model(config: Config, tokenizer: Tokenizer, weights) -> Vqa:
    """The network on the CPU, with random weights; the decoder is as deep as a VQA checkpoint's."""
    vit, bert = networks(config, tokenizer.vocab_size)
    layers = config.decoder_layers or depth(weights, "text_decoder") or max(1, bert.num_hidden_layers // 2)
    return Vqa(VqaConfig(vit, bert, layers, config.distill, config.compat))


def training_data(config: Config, world, tokenizer: Tokenizer, state: dict | None) -> StreamLoader:
    """Endless batches of this process."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to answer with a checkpoint")
    build = QuestionAnswers(training_view(config), config.roots, config.max_words)
    sources = [build.source(file) for file in config.train_file]
    return train_loader(sources, VqaCollate(tokenizer, config.max_tokens), config, world, state)


def evaluation_data(config: Config) -> tuple[dict[str, QuestionSet], list[str]]:
    """The splits there are, and the list of answers."""
    files = {"val": (config.val_file, None), "test": (config.test_file or None, config.test_answers)}
    sets = {}
    for split, (file, answers) in files.items():
        if file is not None:
            records, transform = Records(file, ("image", "question", "question_id")), test_view(config)
            name = f"{split}_file"
            sets[split] = QuestionSet(records, config.roots, transform, config.max_words_test, answers, name)
    if "val" in sets and not sets["val"].truth:
        raise UserError(f"val_file {config.val_file}: its entries have no `answer`; give them under test_file")
    if config.evaluate and not sets:
        raise UserError("--evaluate needs test_file or val_file: the questions to answer")
    if config.answer_list is None:
        raise UserError("answer_list: none is given; name the JSON list of the answers to choose from")
    return sets, read_answer_list(config.answer_list)


def warn_of_unreachable(sets: dict[str, QuestionSet], answers: list[str], file: Path) -> None:
    """Say which true answers the closed list lacks; refuse a list that has none of them."""
    for split, data in sets.items():
        lacking = unreachable(data, answers)
        if lacking and not any(a in answers for person in data.truth.values() for a in person["answers"]):
            raise UserError(f"answer_list {file}: holds no answer to any question of {split}_file; is it another's?")
        if lacking:
            print(f"answer_list {file}: lacks {len(lacking)} answers of {split}_file, e.g. {lacking[:5]}", flush=True)


def evaluate(model: Vqa, data: QuestionSet, answers: list[str], tokenizer, config: Config, world, precision):
    """`(numbers of the best answers int64 [Q,5], their probabilities [Q,5])` for all questions, on every process."""
    own, batches = split_loader(data, TextCollate(tokenizer), config, world)
    ids, mask = encode_answers(answers, tokenizer)
    ids, length = ids.to(world.device), mask.sum(1).to(world.device)

    def predict(image, text_ids, text_mask):
        found = model.rank_answers(image, text_ids, text_mask, ids, length, min(config.k_test, len(answers)))
        return tuple(part[:, :SHOWN] for part in found)

    with evaluating(model), precision.autocast():
        return over_split(predict, batches, own, len(data), world, "answering")


def accuracy(data: QuestionSet, answers: list[str], best: torch.Tensor, config: Config) -> dict:
    """Official VQA accuracy in percent, where the truth is known: best int64 [Q,5] as `evaluate` gives."""
    predictions = {question: answers[row[0]] for question, row in zip(data.ids, best.tolist(), strict=True)}
    return vqa_accuracy(predictions, data.truth, one_sided=config.compat == "original") if data.truth else {}


def train(config: Config, world, model: Vqa, tokenizer: Tokenizer, val: QuestionSet | None, answers, precision) -> Path:
    """Fine-tune; the checkpoint to test."""
    tuning = FineTuning(config, world, metric="overall")
    loader = training_data(config, world, tokenizer, tuning.data_state())
    plain, model = model, parallelize(model, world, config).train()
    teacher = MomentumPairs(model, config.momentum) if config.distill else None
    tuning.begin("Visual question answering", model, loader, precision)
    for alpha in tuning:
        if teacher:
            teacher.update()
        tuning.learn(lambda batch, alpha=alpha: model(**batch, alpha=alpha))
        if val is not None and tuning.validation_due:
            network = tuning.network(lambda: Vqa(plain.config))
            best, _ = evaluate(network, val, answers, tokenizer, config, world, precision)
            tuning.keep(accuracy(val, answers, best, config))
    return tuning.result


def report(data: QuestionSet, answers: list[str], best, probability, split: str, config: Config) -> list[str]:
    """Accuracies by kind of question, and questions answered rightly and wrongly."""
    if not data.truth:
        return [card(split, intro=f"{len(data)} questions answered; people's answers are not known here.")]
    scores, prior = accuracy(data, answers, best, config), prior_accuracy(data.truth)
    rows = [("all", scores["overall"], prior["overall"])]
    for group, title in (("question_type", "{}"), ("answer_type", "answers: {}")):
        rows += [(title.format(name), value, prior[group][name]) for name, value in scores.get(group, {}).items()]
    people = [data.truth[question]["answers"] for question in data.ids]
    right = torch.tensor(
        [answer_score(answers[row[0]], p) >= 0.5 for row, p in zip(best.tolist(), people, strict=True)]
    )

    def case(i: int) -> str:
        guesses = [(answers[a], float(p)) for a, p in zip(best[i].tolist(), probability[i], strict=True)]
        true = max(set(people[i]), key=people[i].count)
        return answer_case([data.images[i]], data.questions[i], guesses, true, bool(right[i]))

    head = ["VQA accuracy in %", split, "most frequent answer"]
    return [card(f"{split}: {len(data)} questions", score_table(head, rows)), gallery(f"Answers, {split}", right, case)]


def main(config: Config) -> None:
    world, weights, precision = prepare(config)
    sets, answers = evaluation_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer, weights)
    left_out = start_from(model, weights, "vqa") if weights else None
    if weights and world.is_main:
        print(f"{config.checkpoint}:\n{left_out.text() or '  fits as it is'}", flush=True)
    if world.is_main:
        warn_of_unreachable(sets, answers, config.answer_list)
    if not config.evaluate:
        config.checkpoint = train(config, world, model, tokenizer, sets.get("val"), answers, precision)
        model = Vqa(model.config)
        start_from(model, read_weights(config.checkpoint), "vqa")
    metrics, sections = {"k_test": min(config.k_test, len(answers))}, []
    for split, data in sets.items():
        best, probability = evaluate(model.to(world.device), data, answers, tokenizer, config, world, precision)
        metrics[split] = accuracy(data, answers, best, config) or {"questions": len(data)}
        if world.is_main:
            found = {question: answers[row[0]] for question, row in zip(data.ids, best.tolist(), strict=True)}
            save_answers(config.output_dir / "result" / f"vqa_result_{split}.json", found)
            sections = report(data, answers, best, probability, split, config) + sections
    if world.is_main:
        write_results(config, "Visual question answering", metrics, sections)
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
