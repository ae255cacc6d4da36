"""Image-text retrieval with SIMLA or ALBEF: zero-shot, or fine-tuned on any pairs.

    zero-shot   python Retrieval.py --config configs/Retrieval/digitscenes.yaml --evaluate
    fine-tune   torchrun Retrieval.py --config configs/Retrieval/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval/flickr.yaml \\
                    --checkpoint ALBEF.pth
    Slurm       srun -N2 --ntasks-per-node=8 --gpus-per-node=8 \\
                    python Retrieval.py --config configs/Retrieval/coco.yaml
    all knobs   python Retrieval.py --help

Training: the image-text contrastive loss (ITA) against the batch and a queue, where all captions of
an image are its positives, and image-text matching (ITM) with hard negatives of other images.
Evaluation: all images against all captions by similarity; the best `k_test` each way are re-ranked
by ITM. The checkpoint with the best mean recall on `val_file` is kept and tested.

Published recall@1 of captions / images, 4M images: ALBEF fine-tuned on COCO 73.1 / 56.8, on
Flickr30k 94.3 / 82.8, Flickr30k zero-shot (from the COCO model) 90.5 / 76.8. Checkpoints of the
originals and of Pretrain.py load alike; architecture options that are unset are the checkpoint's.
Results: result/metrics.json, result/report.html. SIGTERM and SIGUSR1 save and exit with status 75;
the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError
from base.names import check_stems
from dataset.images.decode import check_image_root
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.tasks.compositional import CaptionChoices, ViewedChoices, choices_of_file
from dataset.tasks.loaders import ImageBatches, test_view, train_loader, training_view
from dataset.tasks.retrieval import RetrievalCollate, RetrievalPair, RetrievalSet, number_images
from dataset.text.wordpiece import Tokenizer, pre_caption
from evaluation.compositional import match_examples
from evaluation.report.page import card, choices_table, recall_table
from evaluation.report.results import write_results
from evaluation.report.retrieval import retrieval_gallery, save_rankings
from evaluation.retrieval import Captions, chance, rank, recalls
from models.fusion.config import retrieval_config
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval
from models.weights.albef import check_kind, start_from, start_task
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.fusion import FineTuneConfig, Start, prepare
from runtime.optim.build import Optimizer, set_learning_rate
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, evaluating


@dataclass
class Config(FineTuneConfig):
    """Image-text retrieval."""

    output_dir: Path = knob(
        Path("output/Retrieval"), "folder of this run: log, checkpoints, result/"
    )
    # the data: JSON lists of {image, caption: text or list of texts}
    train_file: list[Path] = knob([], "training annotations")
    val_file: Path | None = knob(
        None, "annotations that choose the best checkpoint; none = the last one is tested"
    )
    test_file: Path | None = knob(None, "annotations of the final test")
    choices: list[Path] = knob([], "SugarCrepe's files, Winoground's examples.jsonl, to test on")
    image_root: Path = knob(Path("."), "folder that the annotations' image paths start from")
    max_tokens: int = knob(30, "tokens kept of a caption in evaluation", low=2)
    batch_size_train: int = knob(
        32, "pairs per process and micro-batch", low=2, aliases=("batch_size",)
    )
    temp: float = knob(0.07, "initial temperature without a checkpoint", low=0.001, high=0.5)
    freeze_visual_encoder: bool = knob(False, "train all but the vision transformer")
    k_test: int = knob(
        128, "candidates re-ranked by ITM, per image and caption; R@10 needs 10", low=1
    )
    rerank: bool = knob(True, "re-rank the top k with ITM; --no-rerank orders by similarity alone")
    score: str = knob(
        "matching", "re-rank by ITM, or by its sum with the similarity", choices=("matching", "sum")
    )
    optimizer: Optimizer = section(Optimizer, flat=True, lr=1e-5)


def build_model(config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The network on the CPU, with random weights."""
    model = Retrieval(retrieval_config(config, tokenizer.vocab_size))
    model.visual_encoder.requires_grad_(not config.freeze_visual_encoder)
    return model


def training_data(config: Config, tokenizer, longest: int, world, state) -> StreamLoader:
    """Endless batches of this process, from the position `state` on. Captions of one image share
    its number; they are cut at `longest` tokens."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to score a checkpoint")
    records = Records(config.train_file)
    check_image_root(config.image_root, (record["image"] for record in records))
    image_ids = number_images((each["image"] for each in records), config.image_root)
    view = training_view(config)
    pair = RetrievalPair(view, config.image_root, image_ids, config.max_words)
    source = RecordSource(records, pair, "train_file")
    return train_loader([source], RetrievalCollate(tokenizer, longest), config, world, state)


def evaluation_data(config: Config) -> dict[str, RetrievalSet]:
    """The splits that are given: `val` and `test`."""
    splits = {}
    for split, file in (("val", config.val_file), ("test", config.test_file)):
        if file is not None:
            records = Records(file).complete()
            check_image_root(config.image_root, (record["image"] for record in records))
            view = test_view(config)
            splits[split] = RetrievalSet(records, config.image_root, view, config.max_words)
    return splits


def train_step(model, teacher, next_batch, alpha, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update: the teacher first, whose features fill the queues, then
    `accumulate` micro-batches. Returns the losses, 0-d means over them."""
    teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=alpha)
            loss = losses["loss_ita"] + losses["loss_itm"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def choose(model: Retrieval, data: CaptionChoices, tokenizer, config: Config, start: Start) -> dict:
    """Accuracies in percent of going for the right caption and image, by ITM and ITC."""
    texts = [pre_caption(caption, config.max_words) for caption in data.captions]
    ids, mask = tokenizer(texts, config.max_tokens, lengths=None)
    images = ImageBatches(ViewedChoices(data, test_view(config)), config, start.world)
    with evaluating(model), start.precision.autocast():
        found = match_examples(
            model,
            images,
            Captions(ids, mask, data.example_captions),
            data.example_images,
            data.example_captions,
            start.world,
            image_batch=config.batch_size_test,
            keep_text_states=not model.config.bert.single_stream,
        )
    return found | images.damages()


def evaluate(model: Retrieval, data: RetrievalSet, tokenizer, config: Config, start: Start):
    """`(recalls in percent, both rankings)` of one split, the same on every process."""
    ids, mask = tokenizer(data.captions, config.max_tokens, lengths=None)
    captions = Captions(ids, mask, torch.tensor(data.txt2img))
    images = ImageBatches(data, config, start.world)
    with evaluating(model), start.precision.autocast():
        rankings = rank(
            model,
            images,
            len(data),
            captions,
            start.world,
            k=config.k_test if config.rerank else max(10, config.k_test),
            rerank=config.rerank,
            image_batch=config.batch_size_test,
            keep_text_states=not model.config.bert.single_stream,
            # as a logit, like the score of ITM
            similarity_weight=1 / model.temp.item() if config.score == "sum" else 0.0,
        )
    by_chance = chance(captions.image, len(data))["r_mean"]
    scores = recalls(*rankings, captions.image) | {"chance": by_chance}
    return scores | images.damages(), rankings


def train(model: Retrieval, val: RetrievalSet | None, tokenizer, config, start: Start) -> Path:
    """Fine-tune; returns the checkpoint to test: the best mean recall on val, else the last."""
    run = Run(config, start.world, metric="r_mean" if val else None)
    longest = model.config.bert.max_position_embeddings
    loader = training_data(config, tokenizer, longest, start.world, run.data_state())
    model, optimizer, plan = run.begin("Retrieval fine-tuning", model, loader, start.precision)
    teacher = MomentumPairs(model, config.momentum)

    if run.validation_due(run.step):  # resumed after a kill in a validation
        recall, _ = evaluate(whole_model(model), val, tokenizer, config, start)
        run.keep_best(recall, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha_at(step, plan), device=start.world.device)
        losses = train_step(model, teacher, run.next_batch, alpha, config, start.precision)
        grad_norm = start.precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            recall, _ = evaluate(whole_model(model), val, tokenizer, config, start)
            run.keep_best(recall, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()


def report(split: str, data: RetrievalSet, scores: dict, rankings) -> list[str]:
    """Recalls beside chance, and queries with their first hits."""
    files = [data.image_root / name for name in data.images]
    owner = torch.tensor(data.txt2img)
    rows = {split: scores, "chance": chance(owner, len(files))}
    recall = card(f"{split}: {len(files)} images, {len(owner)} captions", recall_table(rows))
    return [recall, retrieval_gallery(files, data.written, owner, *rankings)]


def main(config: Config) -> None:
    if config.evaluate and not (config.val_file or config.test_file or config.choices):
        raise UserError("--evaluate needs a val_file or test_file (pairs to rank), or choices")
    check_stems(config.choices, "--choices", taken=("checkpoint", "k_test", "val", "test"))
    examples = {file.stem: choices_of_file(file, config.image_root) for file in config.choices}
    start = prepare(config)
    check_kind(start.weights, "retrieval")
    tokenizer = Tokenizer(config.text_encoder)
    splits = evaluation_data(config)
    model = build_model(config, tokenizer)
    start_task(model, start.weights, "retrieval", config.checkpoint)
    if not config.evaluate:
        config.checkpoint = train(model, splits.get("val"), tokenizer, config, start)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "retrieval")
    model.to(start.world.device)
    metrics = {"k_test": config.k_test if config.rerank else 0}
    sections = []
    for split, data in splits.items():
        scores, rankings = evaluate(model, data, tokenizer, config, start)
        metrics[split] = scores
        if start.world.is_main:
            save_rankings(config.output_dir / f"result/ranking_{split}.safetensors", *rankings)
            sections = report(split, data, scores, rankings) + sections
    for name, data in examples.items():
        metrics[name] = choose(model, data, tokenizer, config, start)
        sections.append(card(name, choices_table(metrics[name])))
    write_results(config, "Image-text retrieval", metrics, sections)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
