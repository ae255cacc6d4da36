"""Image-text retrieval with SIMLA or ALBEF: zero-shot, or fine-tuned on COCO, Flickr30k or pairs of one's own.

    zero-shot   python Retrieval.py --config configs/Retrieval/digitscenes.yaml --evaluate
    fine-tune   torchrun Retrieval.py --config configs/Retrieval/digitscenes.yaml --output_dir output/digits_retrieval
    8 GPUs      torchrun --nproc_per_node=8 Retrieval.py --config configs/Retrieval/flickr.yaml --checkpoint ALBEF.pth
    Slurm       srun -N2 --ntasks-per-node=8 --gpus-per-node=8 python Retrieval.py --config configs/Retrieval/coco.yaml
    all knobs   python Retrieval.py --help

Training: contrast (ITA) against the batch and a queue, where all captions of a picture are its positives, and matching
(ITM) with hard negatives of other pictures. Evaluation: all pictures against all captions by contrast, the best
`k_test` each way re-ranked by matching. The checkpoint with the best mean recall on `val_file` is kept and tested.

Published recall@1 of captions / pictures, 4M images: ALBEF fine-tuned on COCO 73.1 / 56.8, on Flickr30k 94.3 / 82.8,
Flickr30k zero-shot (from the COCO model) 90.5 / 76.8. Checkpoints of the originals and of Pretrain.py load alike; what
the configuration leaves open about the network is as in the checkpoint. Results: result/metrics.json and
result/report.html. SIGTERM and SIGUSR1 save and exit with status 75; the same command goes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.images import check_image_root
from dataset.randaugment import RandAugment
from dataset.records import Records
from dataset.retrieval import RetrievalCollate, RetrievalPair, RetrievalSet, number_images
from dataset.stream import EvalLoader, RecordSource, Stream, StreamLoader
from dataset.text import Tokenizer
from dataset.transforms import TestTransform, TrainTransform
from evaluation.gallery import retrieval_gallery, save_rankings
from evaluation.page import card, page, recall_table
from evaluation.retrieval import Captions, chance, rank, recalls
from models.adapters import start_from
from models.momentum import MomentumPairs
from models.retrieval import Retrieval, RetrievalConfig
from models.vit import ViTConfig
from models.xbert import BertConfig
from runtime import distributed
from runtime.checkpoint import read_weights
from runtime.config import knob, run, save, section
from runtime.distributed import World
from runtime.errors import InputError
from runtime.inherit import Geometry, inherit
from runtime.optim import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.parallel import gradient_sync, parallelize, to_device
from runtime.run import Run, RunConfig, evaluating, seed_everything
from runtime.schedule import Plan, Schedule, ramp


@dataclass
class Config(Geometry, RunConfig):
    """Image-text retrieval."""

    output_dir: Path = knob(Path("output/Retrieval"), "folder of this run: log, checkpoints, result/")
    evaluate: bool = knob(False, "no training: score the checkpoint on val_file and test_file")
    # the data: JSON lists of {image, caption: text or list of texts}
    train_file: list[Path] = knob([], "training annotations")
    val_file: Path | None = knob(None, "annotations that choose the best checkpoint; none = the last one is tested")
    test_file: Path | None = knob(None, "annotations of the final test")
    image_root: Path = knob(Path("."), "folder that the annotations' image paths start from")
    max_words: int = knob(30, "words kept of a caption", low=1)
    max_tokens: int = knob(30, "tokens kept of a caption in evaluation", low=2)
    batch_size_train: int = knob(32, "pairs per process and micro-batch", low=2, aliases=("batch_size",))
    batch_size_test: int = knob(32, "pictures per forward pass in evaluation", low=1)
    eval_every: str = knob("1 epochs", "between two validations: a number of 'steps', 'epochs', 'samples' or '%'")
    crop_scale: tuple[float, float] = knob((0.5, 1.0), "range of the random crop's share of the picture", low=0, high=1)
    flip: bool = knob(True, "mirror half of the pictures; no where captions say left and right")
    augment_level: float = knob(7, "strength of RandAugment's two operations; 0 = none of them", low=0, high=10)
    # the method
    alpha: float = knob(0.4, "weight of the teacher's soft targets", low=0, high=1)
    distill: bool = knob(True, "soft targets at all")
    warm_up: bool = knob(True, "let alpha grow from 0 during the first epoch")
    momentum: float = knob(0.995, "momentum of the teacher, per update", low=0, high=1)
    temp: float = knob(0.07, "initial temperature without a checkpoint", low=0.001, high=0.5)
    freeze_visual_encoder: bool = knob(False, "train all but the vision transformer")
    k_test: int = knob(128, "candidates re-ranked by matching, per picture and per caption", low=1)
    rerank: bool = knob(True, "re-rank at all; --no-rerank orders by contrast alone")
    score: str = knob("matching", "order by 'matching', or by its 'sum' with contrast", choices=("matching", "sum"))
    compat: str = knob("none", "'original' reproduces the published code's numbers", choices=("none", "original"))
    optimizer: Optimizer = section(Optimizer, lr=1e-5)
    scheduler: Schedule = section(Schedule, aliases=("schedular",), epochs="5 epochs", min_lr=1e-6, warmup="100 steps")
    # keys of the originals' files that need no value here
    mlm_probability: float = knob(0.15, "accepted from old configurations; retrieval masks no words")
    save_sims: Path | None = knob(None, "accepted from old configurations; rankings are in result/")


def build_model(config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The network on the CPU, with random weights."""
    if not config.bert_config.is_file():
        raise InputError(f"bert_config: no file {config.bert_config}; name the JSON that the checkpoint was made with")
    given = json.loads(config.bert_config.read_text())
    bert = BertConfig.from_json(given | {"encoder_width": config.vision_width, "vocab_size": tokenizer.vocab_size})
    size = (config.image_res, config.patch_size, config.vision_width, config.vision_depth, config.vision_heads)
    space = (config.embed_dim, config.queue_size, config.temp, config.distill, config.compat)
    model = Retrieval(RetrievalConfig(ViTConfig(*size), bert, *space))
    model.visual_encoder.requires_grad_(not config.freeze_visual_encoder)
    return model


def training_data(config: Config, world: World, tokenizer: Tokenizer, longest: int, state: dict | None) -> StreamLoader:
    """Endless batches of this process. Captions of one picture share its number; they are cut at `longest` tokens."""
    if not config.train_file:
        raise InputError("train_file: none is given; give one, or --evaluate to score a checkpoint")
    records = Records(config.train_file)
    check_image_root(config.image_root, (record["image"] for record in records))
    image_ids = number_images(record["image"] for record in records)
    augment = RandAugment(2 if config.augment_level else 0, config.augment_level, config.compat)
    transform = TrainTransform(config.image_res, config.crop_scale, config.flip, augment)
    pair = RetrievalPair(transform, config.image_root, image_ids, config.max_words)
    stream = Stream([RecordSource(records, pair, "train_file")], RetrievalCollate(tokenizer, longest))
    place = {"rank": world.rank, "world_size": world.size, "seed": config.seed, "state": state}
    return StreamLoader(stream, config.batch_size_train, config.workers, pin_memory=True, **place)


def evaluation_data(config: Config) -> dict[str, RetrievalSet]:
    """The splits there are: `val` and `test`."""
    files, transform = {"val": config.val_file, "test": config.test_file}, TestTransform(config.image_res)
    records = {split: Records(file) for split, file in files.items() if file is not None}
    for entries in records.values():
        check_image_root(config.image_root, (entry["image"] for entry in entries))
    return {split: RetrievalSet(r, config.image_root, transform, config.max_words) for split, r in records.items()}


def evaluate(model: Retrieval, data: RetrievalSet, tokenizer: Tokenizer, config: Config, world, precision: Precision):
    """Recalls in percent, and both rankings, of one split; the same on every process."""
    captions = Captions(*tokenizer(data.captions, config.max_tokens, lengths=None), torch.tensor(data.txt2img))

    def load_images(indices: list[int]):
        return EvalLoader(data.load, indices, config.batch_size_test, torch.stack, config.workers, pin_memory=True)

    k = config.k_test if config.rerank else max(10, config.k_test)
    options = {"k": k, "rerank": config.rerank, "image_batch": config.batch_size_test}
    options["keep_text_states"] = not model.config.bert.single_stream
    options["similarity_weight"] = 1 / model.temp.item() if config.score == "sum" else 0.0  # both are logits then
    with evaluating(model), precision.autocast():
        rankings = rank(model, load_images, len(data), captions, world, **options)
    return recalls(*rankings, captions.image), rankings


def whole(model: torch.nn.Module, config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The network to evaluate: itself out of its wrappers, or a gathered copy where its parameters are sharded."""
    if config.parallel == "ddp":
        return distributed.unwrap(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with torch.device("meta"):  # draws no random numbers, which would change the training
        copy = build_model(config, tokenizer)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy.load_state_dict(weights, assign=True)
    return copy


def train_step(model, teacher: MomentumPairs, next_batch, alpha, config: Config, precision: Precision) -> dict:
    """Gradients of one update; returns the losses of its last micro-batch."""
    teacher.update()
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=alpha)
            loss = losses["loss_ita"] + losses["loss_itm"]
        precision.backward(loss / config.accumulate)
    return {"loss": loss, **losses}


def train(config: Config, world: World, model: Retrieval, tokenizer: Tokenizer, val: RetrievalSet | None, precision):
    """Fine-tune. Returns the path of the checkpoint to test: the best on `val`, without it the last one."""
    session = Run(config, world)
    best = distributed.on_main(lambda: best_before(session))
    loader = training_data(config, world, tokenizer, model.config.bert.max_position_embeddings, session.data_state())
    model = parallelize(model, world, config).train()
    optimizer, teacher = build_optimizer(model, config.optimizer), MomentumPairs(model, config.momentum)
    session.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
    batch = config.batch_size_train * config.accumulate * world.size
    sizes = {"loader_steps": loader.steps_per_epoch, "accumulate": config.accumulate, "batch": batch}
    plan = Plan.of(config.scheduler, config.optimizer.lr, **sizes)
    eval_every, warm_up = max(1, plan.steps(config.eval_every)), plan.epoch_steps if config.warm_up else 0
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    session.start("Retrieval fine-tuning", plan, parameters, pairs=len(loader.stream))

    def next_batch() -> dict[str, torch.Tensor]:
        return to_device(session.watch.waiting(loader), world.device)

    for step in range(session.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha * ramp(step, warm_up), device=world.device)
        losses = train_step(model, teacher, next_batch, alpha, config, precision)
        losses["grad_norm"] = precision.step(optimizer, list(model.parameters()))
        done = step + 1
        session.log_step(done, **losses)
        if val is not None and (done % eval_every == 0 or done == plan.total):
            recall, _ = evaluate(whole(model, config, tokenizer), val, tokenizer, config, world, precision)
            session.log.write(done, **{f"val_{name}": value for name, value in recall.items()})
            session.save(done, tag="best" if recall["r_mean"] >= best else None, r_mean=recall["r_mean"])
            best = max(best, recall["r_mean"])
            session.watch.restart()
        else:
            session.save_if_due(done)
        session.leave_if_interrupted(done)
    session.close()
    return distributed.on_main(lambda: (session.checkpoints.best if val else None) or session.checkpoints.numbered()[0])


def best_before(session: Run) -> float:
    """Validation recall of the best checkpoint so far of a run that goes on."""
    best = session.checkpoints.best if session.first_step else None
    return torch.load(best, map_location="cpu", weights_only=True, mmap=True)["r_mean"] if best else 0.0


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    if config.evaluate and not (config.checkpoint and (config.val_file or config.test_file)):
        raise InputError("--evaluate needs --checkpoint (a file or run directory), and a val_file or test_file")
    weights = read_weights(config.checkpoint) if config.checkpoint else {}
    taken, tokenizer = inherit(config, weights), Tokenizer(config.text_encoder)
    sets, model = evaluation_data(config), build_model(config, tokenizer)
    left_out = start_from(model, weights, "retrieval") if weights else MomentumPairs(model).copy()
    if world.is_main and weights:
        print(f"{config.checkpoint}:", *taken, left_out.text() or "fits as it is", sep="\n  ", flush=True)
    seed_everything(config.seed, world.rank)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    if not config.evaluate:
        config.checkpoint = train(config, world, model, tokenizer, sets.get("val"), precision)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "retrieval")
    result, scores, sections = config.output_dir / "result", {}, []
    for split, data in sets.items():
        scores[split], rankings = evaluate(model.to(world.device), data, tokenizer, config, world, precision)
        if world.is_main:
            save_rankings(result / f"ranking_{split}.safetensors", *rankings)
            files, owner = [data.image_root / name for name in data.images], torch.tensor(data.txt2img)
            rows = {split: scores[split], "chance": chance(owner, len(files))}
            sections.append(card(f"{split}: {len(files)} pictures, {len(owner)} captions", recall_table(rows)))
            sections.append(retrieval_gallery(files, data.captions, owner, *rankings))
    if world.is_main:
        metrics = {"checkpoint": str(config.checkpoint), "k_test": config.k_test if config.rerank else 0, **scores}
        save(config, result / "config.yaml")
        (result / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (result / "report.html").write_text(page("Image-text retrieval", sections, str(config.checkpoint)))
        print(json.dumps(metrics, indent=2))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
