"""Object recognition as next-token prediction (NXTP; Yue et al., 2024): train, name what images show, score.

    train       torchrun Recognition.py --config configs/Recognition/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 Recognition.py --config configs/Recognition/g3m.yaml
    an image   python Recognition.py --checkpoint RUN --image PATH --num_labels 20
    evaluate    python Recognition.py --checkpoint RUN --evaluate --test SHARDS --sentence_encoder all-MiniLM-L6-v2
    all knobs   python Recognition.py --help

The patches of CLIP's image tower are the prefix of a LLaMA decoder cut to its first blocks. It learns the nouns of the
caption as text, `dog, living room, cat,`, and no label sees another. The `num_labels` likeliest first tokens each grow
into a label with a probability: one-shot sampling, a hundred labels for one pass over the image.

Published R / P / F1 at 10 labels, 1.78B parameters on G70M: CC3M .721 / .512 / .593, COCO .765 / .756 / .758,
OpenImages .661 / .563 / .601. Results: result/metrics.json, result/labels_test.json, result/report.html.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from base import distributed
from base.distributed import World
from base.errors import UserError
from dataset.images.clip import normalize
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import StreamLoader
from dataset.tasks.recognition import ImageSet, ImageView, Sequences, clip_statistics, read_image, training_stream
from dataset.text.sentencepiece import PieceTokenizer
from evaluation.predict import over_split
from evaluation.recognition import SentenceEncoder, exact_metrics, means, similarity_scores
from evaluation.report.recognition import attention_page, label_report, save_labels
from evaluation.report.results import write_results
from models.layers.batchnorm import synchronise_batch_norm
from models.recognition.decoding import Decoding, Drafts, label_map
from models.recognition.nxtp import Nxtp
from models.weights.build_nxtp import Networks, read_archive
from models.weights.nxtp import decayed_names, trained_names
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.config.from_checkpoint import saved_config
from runtime.finetune import FineTuning
from runtime.optim.build import Optimizer, Precision
from runtime.optim.schedule import Schedule
from runtime.parallel import parallelize
from runtime.run import RunConfig, evaluating, seed_everything

SHOWN = 7  # labels of --image whose attention is drawn


@dataclass
class Config(RunConfig):
    """Recognition of objects."""

    output_dir: Path = knob(Path("output/Recognition"), "folder of this run: log, checkpoints, result/")
    # the networks: published weights, else random ones of these sizes
    clip: Path | None = knob(None, "CLIP: OpenAI's ViT-L-14.pt, or open_clip's or Hugging Face's weights")
    llama: Path | None = knob(None, "folder of a LLaMA: Meta's (params.json) or Hugging Face's (config.json)")
    tokenizer: Path | None = knob(None, "SentencePiece tokenizer.model, or the folder that holds it; none = llama's")
    network: Networks = section(Networks, flat=True)
    decouple_labels: bool = knob(True, "labels do not see one another")
    # the data
    train_list: list[Path] = knob([], "lists of `path : name,name,...`, or JSON entries {image, labels}")
    shards: list[str] = knob([], "WebDataset shards with .nouns (scripts/data/extract_nouns.py), beside or instead")
    image_root: Path = knob(Path("."), "folder that the lists' paths start from")
    val: str | None = knob(None, "list, or folder or pattern of shards, that chooses the best checkpoint; none = last")
    test: str | None = knob(None, "the same for the final scores and --evaluate")
    whole_image: bool = knob(False, "squeeze the whole image, not its centre", aliases=("whole_picture",))
    crop: float = knob(1.0, "smallest share of an image in random training crops; 1 = as published", low=0.05, high=1)
    max_text: int = knob(256, "tokens of an image's text at most, prompt included", low=16)
    many_prompts: bool = knob(True, "a prompt is drawn for each sample")
    shuffle_buffer: int = knob(1000, "samples of a shard that a worker permutes at a time", low=1)
    error_budget: float = knob(0.01, "share of unusable samples at which the run stops", low=0, high=1)
    # what is trained
    train_vision_blocks: int | None = knob(None, "last blocks of the image tower to train; none = all of it", low=0)
    caption_weight: float = knob(0.0, "weight of the whole caption's loss; 0 = not computed", low=0)
    batch_size: int = knob(16, "images per process and micro-batch", low=1)
    batch_size_test: int = knob(16, "images per forward pass in evaluation", low=1)
    optimizer: Optimizer = section(Optimizer, flat=True, lr=1e-5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    scheduler: Schedule = section(Schedule, epochs="3 epochs", warmup="2000 steps", min_lr=0.0, warmup_lr=0.0)
    eval_every: str = knob("1 epochs", "between two validations: a number of 'steps', 'epochs', 'samples' or '%'")
    compat: str = knob("none", "'original': the last label blind, its decay and mask", choices=("none", "original"))
    # using it
    evaluate: bool = knob(False, "no training: score --checkpoint on --test")
    image: Path | None = knob(None, "no training: print the labels of this image")
    decoding: Decoding = section(Decoding, flat=True)
    sentence_encoder: str | None = knob(None, "folder or hub name for R / P / F1 by meaning; none = exact match alone")
    tensor_parallel: bool = knob(False, "--evaluate and --image: the processes share the decoder's matrices")
    alpha, warm_up = 0.0, False  # FineTuning's; there is no teacher


def settle(config: Config, world: World) -> None:
    """What else the checkpoint's run decides, and what cannot be."""
    saved = saved_config(config.checkpoint)
    if (config.evaluate or config.image) and not config.checkpoint:
        raise UserError("--evaluate and --image need --checkpoint: a file, or the directory of a run")
    for name in ("decoder_heads", "norm_eps", "rope_theta", "prefix_image"):
        setattr(config.network, name, saved.get("network", {}).get(name, getattr(config.network, name)))
    config.network.image_size = config.network.image_size or saved.get("network", {}).get("image_size")
    config.whole_image = saved.get("whole_image", saved.get("whole_picture", config.whole_image))
    found = config.tokenizer or config.llama or saved.get("tokenizer") or saved.get("llama")
    if found is None:
        raise UserError("tokenizer: name the SentencePiece tokenizer.model, such as LLaMA's, or a folder with --llama")
    config.tokenizer = Path(found)
    if config.tensor_parallel:
        if not (config.evaluate or config.image):
            raise UserError("--tensor-parallel is for --evaluate and --image; to train sharded, use --parallel fsdp")
        if world.size == 1:
            raise UserError("--tensor-parallel needs several processes: start with torchrun")
        from fairscale.nn.model_parallel import initialize_model_parallel

        initialize_model_parallel(world.size)


def build_model(config: Config, tokenizer: PieceTokenizer, world: World) -> Nxtp:
    """The network on the CPU: of `--checkpoint`, else with CLIP's and LLaMA's weights, else random."""
    clip = config.clip and (read_archive(config.clip) or read_weights(config.clip))
    checkpoint = config.checkpoint and read_weights(config.checkpoint)
    part = (world.rank, world.size) if config.tensor_parallel else None
    return config.network.build(tokenizer, clip, config.llama, checkpoint, part)


def training_data(config: Config, tokenizer: PieceTokenizer, world: World, state: dict | None) -> StreamLoader:
    """Endless batches of this process."""
    if not (config.train_list or config.shards):
        raise UserError("nothing to train on: give train_list or shards, or --evaluate or --image with a checkpoint")
    original = config.compat == "original"
    text = Sequences(tokenizer, config.max_text, config.many_prompts, original, decouple=config.decouple_labels)
    view = ImageView(config.network.image_size, config.whole_image, config.crop)
    files = (config.train_list, config.image_root, config.shards, config.shuffle_buffer)
    stream = distributed.main_first(partial(training_stream, view, text, *files, config.caption_weight > 0))
    options = {"world": world, "seed": config.seed, "state": state, "error_budget": config.error_budget}
    return StreamLoader(stream, config.batch_size, config.workers, **options)


class Reader:
    """Names what images show with one network."""

    def __init__(self, config: Config, tokenizer: PieceTokenizer, world: World, precision: Precision):
        self.config, self.tokenizer, self.world, self.precision = config, tokenizer, world, precision
        self.view = ImageView(config.network.image_size, config.whole_image)
        self.statistics = clip_statistics(world.device)
        self.prompt = torch.tensor(Sequences(tokenizer, config.max_text).opening, device=world.device)
        self.encoder = SentenceEncoder(config.sentence_encoder, world.device) if config.sentence_encoder else None

    def drafts(self, model: Nxtp, image: Tensor) -> Drafts:
        """Rows of label tokens for images uint8 [B,3,S,S]."""
        images = model.encode_image(normalize(image, self.statistics))
        tokenizer, config = self.tokenizer, self.config
        return config.decoding.find(
            model, images, self.prompt, tokenizer.delimiter, tokenizer.eos, config.decouple_labels
        )

    def labels(self, model: Nxtp, data: ImageSet) -> list[list[tuple[str, float]]]:
        """The labels of every image of a split with their scores, best first, on every process."""
        config, decoding = self.config, self.config.decoding
        own = range(len(data)) if config.tensor_parallel else shard_indices(len(data), self.world.rank, self.world.size)
        batches = EvalLoader(data.load, own, config.batch_size_test, default_collate, config.workers)
        with evaluating(model), self.precision.autocast():
            columns = over_split(
                lambda image: self.drafts(model, image).padded(decoding.longest), batches, own, len(data), self.world
            )
        drafts, tokenizer = Drafts(*columns), self.tokenizer
        return [decoding.labels(drafts, i, tokenizer.delimiter, tokenizer.decode) for i in range(len(data))]

    def scores(self, data: ImageSet, found: list[list[tuple[str, float]]]) -> dict[str, float]:
        """Exact scores in percent and, with a sentence encoder, the published ones."""
        texts = [[text for text, _ in labels] for labels in found]
        metrics = exact_metrics(texts, data.references)
        if self.encoder:
            metrics |= means(similarity_scores(texts, data.references, self.encoder))
        return metrics

    def show(self, model: Nxtp, path: Path) -> None:
        """Print the labels of one image and save it with their attention maps."""
        raw_image, decoding, tokenizer = self.view(read_image(path)), self.config.decoding, self.tokenizer
        with evaluating(model), self.precision.autocast():
            image = raw_image[None].to(self.world.device)
            found = decoding.labels(self.drafts(model, image), 0, tokenizer.delimiter, tokenizer.decode)
            images, pieces = model.encode_image(normalize(image, self.statistics)), tokenizer.pieces
            maps = [label_map(model, images, self.prompt, pieces.encode(text)) for text, _ in found[:SHOWN]]
        if self.world.is_main:
            print(*(f"| prob: {score:.5f} - {text}" for text, score in found), sep="\n")
            target = self.config.output_dir / "result" / f"{path.stem}_labels.png"
            attention_page(target, raw_image, found, maps)
            print(f"attention maps: {target}", flush=True)


def train(config: Config, tokenizer: PieceTokenizer, val: ImageSet | None, reader: Reader, model: Nxtp) -> Path:
    """Train; the checkpoint to test."""
    world, plain = reader.world, model
    tuning = FineTuning(config, world, "f1" if config.sentence_encoder else "exact_f1")
    loader = training_data(config, tokenizer, world, tuning.data_state())
    trained = trained_names([name for name, _ in model.named_parameters()], config.train_vision_blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    original = config.compat == "original"
    decayed = decayed_names({n: p for n, p in model.named_parameters() if n in trained}) if original else None
    model = parallelize(synchronise_batch_norm(model.to(world.device)), world, config).train()
    weights = {"loss_objs": 1.0, "loss_caps": config.caption_weight}
    tuning.begin("Object recognition as next-token prediction", model, loader, reader.precision, decayed)

    def forward(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = normalize(batch.pop("image"), reader.statistics)
        return {name: weights[name] * loss for name, loss in model(image=image, **batch).items()}

    for _ in tuning:
        tuning.learn(forward)
        if val is not None and tuning.validation_due:
            network = tuning.network(lambda: Nxtp(plain.config))
            tuning.keep(reader.scores(val, reader.labels(network, val)))
    return tuning.result


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    settle(config, world)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    tokenizer = PieceTokenizer(config.tokenizer)
    model = build_model(config, tokenizer, world)
    reader = Reader(config, tokenizer, world, precision)
    if config.image:
        reader.show(model.to(world.device), config.image)
        return distributed.shutdown()
    splits = {"val": config.val, "test": config.test}
    data = {name: ImageSet(source, reader.view, config.image_root) for name, source in splits.items() if source}
    if config.evaluate and not data:
        raise UserError("--evaluate needs --test: a list, or shards with .nouns")
    if not config.evaluate:
        config.checkpoint = train(config, tokenizer, data.get("val"), reader, model)
        model = build_model(config, tokenizer, world)
    metrics, sections = {}, []
    for split in data if config.evaluate or "test" not in data else ["test"]:
        found = reader.labels(model.to(world.device), data[split])
        metrics[split] = reader.scores(data[split], found)
        names = [data[split].name(i) for i in range(len(data[split]))]
        if world.is_main:
            save_labels(config.output_dir / f"result/labels_{split}.json", names, data[split].references, found)
            sections += label_report(data[split], found, metrics[split], split)
    if world.is_main:
        write_results(config, "Object recognition as next-token prediction", metrics, sections)
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
