"""Object recognition as next-token prediction (NXTP; Yue et al., 2024).

    train       torchrun Recognition.py --config configs/Recognition/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 Recognition.py --config configs/Recognition/g3m.yaml
    one image   python Recognition.py --checkpoint RUN --image PATH --num_labels 20
    evaluate    python Recognition.py --checkpoint RUN --evaluate --test SHARDS \\
                    --sentence_encoder sentence-transformers/all-MiniLM-L6-v2
    all knobs   python Recognition.py --help

The patch tokens of CLIP's image tower are the prefix of a LLaMA decoder that is cut to its first
blocks. The decoder learns the nouns of the caption as text, `dog, living room, cat,`, and no label
attends to another. The `num_labels` likeliest first tokens each grow into a label with a
probability: one-shot sampling, a hundred labels for one pass over the image.

Published R / P / F1 at 10 labels, 1.78B parameters on G70M: CC3M .721 / .512 / .593, COCO .765 /
.756 / .758, OpenImages .661 / .563 / .601. In result/: metrics.json, labels_test.json, report.html.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from base import distributed
from base.distributed import World, say
from base.errors import UserError
from dataset.images.clip import normalize
from dataset.loading.eval import shard_indices
from dataset.loading.stream import StreamLoader
from dataset.tasks.loaders import eval_loader, stream_loader
from dataset.tasks.recognition import (
    ImageSet,
    ImageView,
    Sequences,
    image_statistics,
    read_image,
    training_stream,
)
from dataset.text.sentencepiece import PieceTokenizer
from evaluation.predict import over_split
from evaluation.recognition import SentenceEncoder, label_metrics
from evaluation.report.recognition import attention_page, label_report, save_labels
from evaluation.report.results import write_results
from models.layers.batchnorm import synchronise_batch_norm
from models.recognition.decoding import Decoding, Drafts
from models.recognition.labeller import Labeller
from models.recognition.nxtp import Nxtp, with_counts
from models.weights.build_nxtp import NetworkOptions
from models.weights.nxtp import choose_parameters
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.from_checkpoint import description_of
from runtime.config.nxtp import RecognitionData, fill_network
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig
from runtime.parallel import gradient_sync, share_matrices, whole_model
from runtime.run import Run, evaluating, seed_everything

SHOWN = 7  # labels of --image whose attention is drawn
NAME = "Object recognition as next-token prediction"


@dataclass
class Config(RecognitionData, RunConfig):
    """Recognition of objects."""

    METHOD = "decoding.strategy"
    output_dir: Path = knob(Path("output/Recognition"), "this run: log, checkpoints, result/")
    # the networks: published weights, else random ones of these sizes
    clip: Path | None = knob(None, "OpenAI's ViT-L-14.pt, or CLIP of open_clip or Hugging Face")
    llama: Path | None = knob(None, "folder of a LLaMA: Meta's or Hugging Face's")
    tokenizer: Path | None = knob(None, "SentencePiece model, or trained; none = llama's")
    network: NetworkOptions = section(NetworkOptions, flat=True)
    # what is trained
    train_vision_blocks: int | None = knob(None, "last image blocks to train; none = all", low=0)
    caption_weight: float = knob(0.0, "weight of the caption's loss; 0 = not computed", low=0)
    optimizer: Optimizer = section(
        Optimizer, flat=True, lr=1e-5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6
    )
    scheduler: Schedule = section(
        Schedule, flat=True, duration="3 epochs", warmup="2000 steps", min_lr=0.0, warmup_lr=0.0
    )
    compat: str = knob("none", "'original': the published numbers", choices=("none", "original"))
    # using it
    evaluate: bool = knob(False, "no training: score --checkpoint on --test")
    image: Path | None = knob(None, "no training: print its labels; maps in output_dir/result")
    decoding: Decoding = section(Decoding, flat=True)
    sentence_encoder: str | None = knob(None, "folder or hub name for R / P / F1 by meaning")
    tensor_parallel: bool = knob(False, "to evaluate, the processes share the decoder's matrices")


def check(config: Config, world: World) -> None:
    """Check that the options are compatible; fill what is open from the checkpoint's run."""
    applies = config.evaluate or config.image
    if applies and not config.checkpoint:
        raise UserError("--evaluate and --image need --checkpoint: a file or the folder of a run")
    fill_network(config)
    if config.tensor_parallel and not applies:
        raise UserError("--tensor-parallel is for --evaluate and --image; train by --parallel fsdp")
    if config.tensor_parallel:
        share_matrices(world)


def build_model(config: Config, tokenizer: PieceTokenizer, world: World) -> Nxtp:
    """The network on the CPU: of `--checkpoint`, of CLIP and LLaMA, or random."""
    checkpoint = read_weights(config.checkpoint) if config.checkpoint else None
    clip = config.network.read_clip(config.clip, checkpoint, read_weights, description_of)
    part = (world.rank, world.size) if config.tensor_parallel else None
    return config.network.build(tokenizer, clip, config.llama, checkpoint, part, read_weights)


def training_data(config: Config, tokenizer: PieceTokenizer, world: World, state) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    if not (config.train_list or config.shards):
        raise UserError("nothing to train on: give train_list or shards, or --evaluate or --image")
    original = config.compat == "original"
    text = Sequences(
        tokenizer, config.max_text, config.many_prompts, original, decouple=config.decouple_labels
    )
    view = ImageView(config.network.image_size, config.whole_image, config.crop)
    stream = training_stream(view, text, config, captions=config.caption_weight > 0)
    return stream_loader(stream, config.batch_size, config, world, state)


def evaluation_data(config: Config) -> dict[str, ImageSet]:
    """The splits that are given: `val` and `test`."""
    view = ImageView(config.network.image_size, config.whole_image)
    options = {"view": view, "root": config.image_root, "error_budget": config.error_budget}
    given = {"val": config.val, "test": config.test}
    splits = {split: ImageSet(source, **options) for split, source in given.items() if source}
    if config.evaluate and not splits:
        raise UserError("--evaluate needs --test: a list, or shards with .nouns")
    return splits


def labeller(model: Nxtp, tokenizer: PieceTokenizer, config: Config, world: World) -> Labeller:
    """The network with its prompt and the way of decoding."""
    prompt = torch.tensor(Sequences(tokenizer, config.max_text).opening, device=world.device)
    return Labeller(model, config.decoding, tokenizer, prompt, config.decouple_labels)


def evaluate(model: Nxtp, data: ImageSet, tokenizer, config: Config, world: World, precision):
    """`(found, damaged images)`: `(label, probability)`s of every image of a split, best first."""
    reader = labeller(model, tokenizer, config, world)
    statistics = image_statistics(config.network.image_tower, world.device)
    shared = config.tensor_parallel  # every process has a part of the decoder, and all images
    own = range(len(data)) if shared else shard_indices(len(data), world.rank, world.size)
    batches = eval_loader(data.load, own, config.batch_size_test, default_collate, config, world)

    def predict(image: Tensor) -> tuple[Tensor, ...]:
        return reader.drafts(normalize(image, statistics)).padded(config.decoding.longest)

    with evaluating(model), precision.autocast():
        drafts = Drafts(*over_split(predict, batches, own, len(data), world))
    return [reader.labels(drafts, i) for i in range(len(data))], batches.damages(shared)


def show(model: Nxtp, tokenizer, config: Config, world: World, precision: Precision) -> None:
    """Print the labels of --image and save it with their attention maps."""
    reader = labeller(model, tokenizer, config, world)
    raw = ImageView(config.network.image_size, config.whole_image)(read_image(config.image))
    statistics = image_statistics(config.network.image_tower, world.device)
    image = normalize(raw[None].to(world.device), statistics)
    with evaluating(model), precision.autocast():
        found = reader.labels(reader.drafts(image), 0)
        maps = reader.attention(image, [text for text, _ in found[:SHOWN]])
    if world.is_main:
        target = config.output_dir / f"result/{config.image.stem}_labels.png"
        attention_page(target, raw, found, maps)
        say(*(f"| prob: {score:.5f} - {text}" for text, score in found))
        say(f"attention maps: {target}")


def train_step(model, statistics, next_batch, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update. Returns the losses, 0-d means over the micro-batches."""
    total = {}
    batches = with_counts([next_batch() for _ in range(config.accumulate)])
    for micro, batch in enumerate(batches):
        image = normalize(batch.pop("image"), statistics)
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(image, **batch)
            loss = losses["loss_objs"]
            if config.caption_weight:
                loss = loss + config.caption_weight * losses["loss_caps"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def train(config: Config, tokenizer, val: ImageSet | None, encoder, model, world, precision):
    """Train or resume; returns the path of the checkpoint to test."""
    metric = "f1" if encoder else "exact_f1"
    run = Run(config, world, metric=metric if val else None)
    loader = training_data(config, tokenizer, world, run.data_state())
    decayed = choose_parameters(model, config.train_vision_blocks, config.compat == "original")
    model = synchronise_batch_norm(model.to(world.device))
    model, optimizer, plan = run.begin(NAME, model, loader, precision, decayed)
    statistics = image_statistics(config.network.image_tower, world.device)

    if run.validation_due(run.step):  # resumed after a kill in a validation
        found, damages = evaluate(whole_model(model), val, tokenizer, config, world, precision)
        run.keep_best(label_metrics(found, val.references, encoder) | damages, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        losses = train_step(model, statistics, run.next_batch, config, precision)
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            found, damages = evaluate(whole_model(model), val, tokenizer, config, world, precision)
            run.keep_best(label_metrics(found, val.references, encoder) | damages, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    check(config, world)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    tokenizer = PieceTokenizer(config.tokenizer)
    config.decoding.check(tokenizer.vocab_size, config.batch_size_test)
    model = build_model(config, tokenizer, world)
    if config.image:
        return show(model.to(world.device), tokenizer, config, world, precision)
    source = config.sentence_encoder
    encoder = SentenceEncoder(source, world.device) if source else None
    splits = evaluation_data(config)
    if not config.evaluate:
        val = splits.get("val")
        config.checkpoint = train(config, tokenizer, val, encoder, model, world, precision)
        model = build_model(config, tokenizer, world)
        if "test" in splits:
            splits.pop("val", None)  # scored in training
    metrics, sections = {}, []
    for split, data in splits.items():
        found, damages = evaluate(model.to(world.device), data, tokenizer, config, world, precision)
        metrics[split] = label_metrics(found, data.references, encoder) | damages
        if world.is_main:
            save_labels(config.output_dir / f"result/labels_{split}.json", data, found)
            sections += label_report(data, found, metrics[split], split)
    write_results(config, NAME, metrics, sections)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
