"""Image-text retrieval with SIMLA or ALBEF: zero-shot, or fine-tuned on COCO, Flickr30k or pairs of one's own.

    zero-shot   python Retrieval.py --config configs/Retrieval/digitscenes.yaml --evaluate
    fine-tune   torchrun Retrieval.py --config configs/Retrieval/digitscenes.yaml --output_dir output/digits_retrieval
    8 GPUs      torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval/flickr.yaml --checkpoint ALBEF.pth
    Slurm       srun -N2 --ntasks-per-node=8 --gpus-per-node=8 python Retrieval.py --config configs/Retrieval/coco.yaml
    all knobs   python Retrieval.py --help

Training: contrast (ITA) against the batch and a queue, where all captions of an image are its positives, and matching
(ITM) with hard negatives of other images. Evaluation: all images against all captions by contrast, the best
`k_test` each way re-ranked by matching. The checkpoint with the best mean recall on `val_file` is kept and tested.

Published recall@1 of captions / images, 4M images: ALBEF fine-tuned on COCO 73.1 / 56.8, on Flickr30k 94.3 / 82.8,
Flickr30k zero-shot (from the COCO model) 90.5 / 76.8. Checkpoints of the originals and of Pretrain.py load alike; what
the configuration leaves open about the network is as in the checkpoint. Results: result/metrics.json and
result/report.html. SIGTERM and SIGUSR1 save and exit with status 75; the same command goes on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from base import distributed
from base.errors import UserError
from dataset.images.decode import check_image_root
from dataset.loading.eval import EvalLoader
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.tasks.loaders import test_view, train_loader, training_view
from dataset.tasks.retrieval import RetrievalCollate, RetrievalPair, RetrievalSet, number_images
from dataset.text.wordpiece import Tokenizer
from evaluation.report.page import card, recall_table
from evaluation.report.results import write_results
from evaluation.report.retrieval import retrieval_gallery, save_rankings
from evaluation.retrieval import Captions, chance, rank, recalls
from models.fusion.config import networks
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.finetune import FineTuneConfig, FineTuning, Setting, prepare
from runtime.optim.build import Optimizer
from runtime.parallel import parallelize
from runtime.run import evaluating


@dataclass
class Config(FineTuneConfig):
    """Image-text retrieval."""

    output_dir: Path = knob(Path("output/Retrieval"), "folder of this run: log, checkpoints, result/")
    # the data: JSON lists of {image, caption: text or list of texts}
    train_file: list[Path] = knob([], "training annotations")
    val_file: Path | None = knob(None, "annotations that choose the best checkpoint; none = the last one is tested")
    test_file: Path | None = knob(None, "annotations of the final test")
    image_root: Path = knob(Path("."), "folder that the annotations' image paths start from")
    max_tokens: int = knob(30, "tokens kept of a caption in evaluation", low=2)
    batch_size_train: int = knob(32, "pairs per process and micro-batch", low=2, aliases=("batch_size",))
    temp: float = knob(0.07, "initial temperature without a checkpoint", low=0.001, high=0.5)
    freeze_visual_encoder: bool = knob(False, "train all but the vision transformer")
    k_test: int = knob(128, "candidates re-ranked by matching, per image and per caption", low=1)
    rerank: bool = knob(True, "re-rank at all; --no-rerank orders by contrast alone")
    score: str = knob("matching", "order by 'matching', or by its 'sum' with contrast", choices=("matching", "sum"))
    optimizer: Optimizer = section(Optimizer, lr=1e-5)
    save_sims: Path | None = knob(None, "accepted from old configurations; rankings are in result/")


def build_model(config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The network on the CPU, with random weights."""
    space = (config.embed_dim, config.queue_size, config.temp, config.distill, config.compat)
    model = Retrieval(RetrievalConfig(*networks(config, tokenizer.vocab_size), *space))
    model.visual_encoder.requires_grad_(not config.freeze_visual_encoder)
    return model


def training_data(config: Config, world, tokenizer: Tokenizer, longest: int, state: dict | None) -> StreamLoader:
    """Endless batches of this process. Captions of one image share its number; they are cut at `longest` tokens."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to score a checkpoint")
    records = Records(config.train_file)
    check_image_root(config.image_root, (record["image"] for record in records))
    image_ids = number_images(record["image"] for record in records)
    pair = RetrievalPair(training_view(config), config.image_root, image_ids, config.max_words)
    source = RecordSource(records, pair, "train_file")
    return train_loader([source], RetrievalCollate(tokenizer, longest), config, world, state)


def evaluation_data(config: Config) -> dict[str, RetrievalSet]:
    """The splits there are: `val` and `test`."""
    files, view = {"val": config.val_file, "test": config.test_file}, test_view(config)
    records = {split: Records(file) for split, file in files.items() if file is not None}
    for entries in records.values():
        check_image_root(config.image_root, (entry["image"] for entry in entries))
    return {split: RetrievalSet(r, config.image_root, view, config.max_words) for split, r in records.items()}


def evaluate(model: Retrieval, data: RetrievalSet, tokenizer: Tokenizer, config: Config, start: Setting):
    """Recalls in percent, and both rankings, of one split; the same on every process."""
    captions = Captions(*tokenizer(data.captions, config.max_tokens, lengths=None), torch.tensor(data.txt2img))

    def load_images(indices: list[int]):
        return EvalLoader(data.load, indices, config.batch_size_test, torch.stack, config.workers, pin_memory=True)

    k = config.k_test if config.rerank else max(10, config.k_test)
    options = {"k": k, "rerank": config.rerank, "image_batch": config.batch_size_test}
    options["keep_text_states"] = not model.config.bert.single_stream
    options["similarity_weight"] = 1 / model.temp.item() if config.score == "sum" else 0.0  # both are logits then
    with evaluating(model), start.precision.autocast():
        rankings = rank(model, load_images, len(data), captions, start.world, **options)
    return recalls(*rankings, captions.image), rankings


def train(config: Config, start: Setting, model: Retrieval, tokenizer: Tokenizer, val: RetrievalSet | None) -> Path:
    """Fine-tune; the checkpoint to test: the one with the best mean recall on val, else the last."""
    session = FineTuning(config, start.world, metric="r_mean")
    longest = model.config.bert.max_position_embeddings
    loader = training_data(config, start.world, tokenizer, longest, session.data_state())
    student = parallelize(model, start.world, config).train()
    teacher = MomentumPairs(student, config.momentum)
    session.begin("Retrieval fine-tuning", student, loader, start.precision)
    for alpha in session:
        teacher.update()
        session.learn(lambda batch, alpha=alpha: student(**batch, alpha=alpha))
        if val is not None and session.validation_due:
            whole = session.network(lambda: build_model(config, tokenizer))
            recall, _ = evaluate(whole, val, tokenizer, config, start)
            session.keep(recall)
    return session.result


def report(split: str, data: RetrievalSet, scores: dict, rankings) -> list[str]:
    """Recalls beside chance, and queries with their first hits."""
    files, owner = [data.image_root / name for name in data.images], torch.tensor(data.txt2img)
    rows = {split: scores, "chance": chance(owner, len(files))}
    tables = card(f"{split}: {len(files)} images, {len(owner)} captions", recall_table(rows))
    return [tables, retrieval_gallery(files, data.captions, owner, *rankings)]


def main(config: Config) -> None:
    if config.evaluate and not (config.val_file or config.test_file):
        raise UserError("--evaluate needs a val_file or test_file: the pairs to rank")
    start = prepare(config)
    tokenizer = Tokenizer(config.text_encoder)
    sets, model = evaluation_data(config), build_model(config, tokenizer)
    if start.weights:
        left_out = start_from(model, start.weights, "retrieval")
        distributed.on_main(lambda: print(config.checkpoint, left_out.text() or "fits as it is", sep="\n", flush=True))
    if not config.evaluate:
        config.checkpoint = train(config, start, model, tokenizer, sets.get("val"))
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "retrieval")
    metrics, sections = {"k_test": config.k_test if config.rerank else 0}, []
    for split, data in sets.items():
        metrics[split], rankings = evaluate(model.to(start.world.device), data, tokenizer, config, start)
        if start.world.is_main:
            save_rankings(config.output_dir / "result" / f"ranking_{split}.safetensors", *rankings)
            sections = report(split, data, metrics[split], rankings) + sections
    distributed.on_main(lambda: write_results(config, "Image-text retrieval", metrics, sections))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
