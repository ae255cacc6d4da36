"""Train dual encoders on image-caption pairs: CLIP, CLIP-rocket with Siam-, BYO-, Bar- and SwALIP, SLIP, SigLIP, ALIGN.

    one process    python main.py --config configs/main/digitscenes.yaml --output-dir output/rocket
    8 GPUs         torchrun --nproc_per_node=8 main.py --config configs/main/yfcc15m_r50_cl2l.yaml
    Slurm          python run_with_submitit.py main.py --nodes 4 --ngpus 8 -- --config configs/main/cc12m_r50_cl2l.yaml
    all knobs      python main.py --help

--model is <CLIP|CL2L>_<backbone>_<head>, head CLIP, CL2L, SIAMLIP, BARLIP, SWALIP, SWALIPV1 or SIGLIP, SLIP's
<CLIP|SLIP|SIMCLR>_<backbone>, or ALIGN_<B0..B7>_<MINI|BASE|LARGE>. CL2L's step: a weak (global) view of image and
caption and `num_augs` strong (local) ones; global images find their global captions in the batch, local ones their
local captions, with projectors and a temperature of their own (--separate-proj). --momentum turns SiamLIP to BYOLIP.
Flags and defaults are clip-rocket's; COYO-ALIGN's are in configs/main/align.yaml. SIGTERM saves and exits with 75.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from base import distributed
from base.distributed import World
from base.errors import UserError
from dataset.images.clip import ViewOptions, normalize
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.class_folder import ClassFolder, named_list
from dataset.sources.shards import ShardSource
from dataset.tasks import captions
from dataset.tasks.dual_inputs import eval_view, input_statistics, text_tokenizer, training_views
from dataset.text.augment import TextOptions, TextViews
from evaluation.zeroshot import class_prompts, text_classifier, zero_shot_accuracy
from models.dual_encoder.base import NOT_LOADED, DualConfig, DualEncoder, names_by_decay
from models.dual_encoder.factory import build_dual, parts_of
from models.dual_encoder.grad_cache import cached_step
from models.layers.batchnorm import synchronise_batch_norm
from models.weights.clip import load_text_transformer
from models.weights.loading import load_checkpoint
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.config.clip_rocket import RocketRunConfig
from runtime.finetune import FineTuning
from runtime.log import training_flops
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, Schedule
from runtime.parallel import gradient_sync, parallelize, to_device
from runtime.run import evaluating, seed_everything
from runtime.safe_pickle import load_plain


@dataclass
class Config(RocketRunConfig):
    """Training of dual encoders."""

    output_dir: Path = knob(Path("output/main"), "folder of this run: config.yaml, log.jsonl, checkpoints")
    network: DualConfig = section(DualConfig, flat=True)
    momentum: bool = knob(False, "targets of SiamLIP's predictors come from a momentum teacher: BYOLIP")
    momentum_tau: float = knob(0.99, "momentum of the teacher, per update", low=0, high=1)
    swalip_freeze_proto_iters: int = knob(100, "first updates in which SWALIPV1's prototypes stay", low=0)
    init_text_encoder: Path | None = knob(None, "checkpoint to take the blocks of the text transformer from")
    # the data
    dataset: str = knob(
        "yfcc15m", "collection; wds: --shards alone; pairs: JSON {image, caption}", choices=captions.DATASETS
    )
    root: str = knob("datasets/yfcc100m", "folder of the images; merged_opendata: three, joined by ---")
    metadata: str = knob("datasets/yfcc15m_v1/yfcc15m.pkl", "samples: .pkl, .npy, .json, .jsonl; three likewise")
    shards: list[str] = knob([], "WebDataset shards beside or instead: paths, {00000..00099}, s3:// or gs:// URLs")
    shuffle_buffer: int = knob(1000, "samples of a shard that a worker permutes at a time", low=1)
    error_budget: float = knob(0.01, "share of unreadable samples at which the run stops", low=0, high=1)
    bpe_path: Path | None = knob(None, "BPE merges; none = CLIP's, from the package open_clip_torch")
    tokenizer: str = knob("bert-base-uncased", "ALIGN's: a folder, vocab.txt or tokenizer.json of BERT, or a hub name")
    text_lengths: list[int] = knob([], "lengths that texts are padded to, in tokens; none = multiples of 8")
    views: ViewOptions = section(ViewOptions, flat=True)
    texts: TextOptions = section(TextOptions, flat=True)
    # the optimisation
    batch_size: int = knob(64, "pairs per process and micro-batch", low=2)
    optimizer: Optimizer = section(Optimizer, flat=True, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98))
    epochs: str = knob("25 epochs", "length of training")
    warmup_epochs: str = knob("1 epochs", "length of the linear warm-up")
    sched: str = knob("rocket", "shape of the schedule; ALIGN's is vit_linear", choices=("rocket", "vit_linear"))
    lr_start: float = knob(1e-6, "learning rate at the first update", low=0)
    lr_end: float = knob(1e-5, "learning rate at the end", low=0)
    cache_features: bool = knob(False, "the micro-batches of an update are one contrastive batch (Gao et al. 2021)")
    # validation
    val_folder: Path | None = knob(None, "class folders for zero-shot validation, such as ImageNet's val; none = none")
    val_dataset: str = knob("imagenet", "its name in the two files")
    labels: Path = knob(Path("labels.json"), "class names by data set, in alphabetical order of the class folders")
    templates: Path = knob(Path("templates.json"), "templates with {} by data set")
    eval_every: str = knob("1 epochs", "between two validations", aliases=("eval_freq",))
    evaluate: bool = knob(False, "no training: validate --checkpoint")

    def check(self) -> None:
        """Refuse what cannot be."""
        model = self.network.model
        if self.momentum and (self.parallel == "fsdp" or not model.endswith(("_SIAMLIP", "_SWALIPV1"))):
            raise UserError("--momentum is a teacher for *_SIAMLIP (then BYOLIP) or *_SWALIPV1, with --parallel ddp")
        if self.network.separate_proj and not self.views.num_augs:
            raise UserError("--separate-proj trains projectors of local views: it needs --num-augs of at least 1")
        if self.val_folder and model.startswith("SIMCLR"):
            raise UserError("SIMCLR has no text encoder to validate zero-shot with: leave out --val-folder")

    @property
    def local_views(self) -> tuple[int, int]:
        """Local images and local captions of a sample."""
        wanted = parts_of(self.network.model)[2]  # SLIP's two images show no caption of their own
        return (self.views.num_augs,) * 2 if wanted < 0 else (wanted, 0)


def build_data(config: Config, tokenizer: Callable, world: World, state: dict | None) -> StreamLoader:
    """Endless batches of this process (see dataset.loading.stream), beginning at the position `state`."""
    local_images, local_captions = config.local_views
    views = training_views(config.network, config.views, local_images)
    texts = TextViews(config.texts, local_captions, stop_words_always=config.network.original)
    sources, pair = [], captions.ImageTextPair(views, texts)
    for kind, file, root in captions.collections_of(config.dataset, config.metadata, config.root, config.shards):
        records = distributed.main_first(partial(captions.caption_records, kind, file, load_plain))
        distributed.on_main(partial(captions.check_images, root, records))
        sources.append(RecordSource(records, captions.ImageTextPair(views, texts, root), kind))
    sources += [ShardSource(url, pair, shuffle_buffer=config.shuffle_buffer) for url in config.shards]
    stream = Stream(sources, captions.CaptionCollate(tokenizer, config.text_lengths))
    options = {"world": world, "seed": config.seed, "state": state, "error_budget": config.error_budget}
    return StreamLoader(stream, config.batch_size, config.workers, **options)


def build_model(config: Config) -> DualEncoder:
    """The network on the CPU with its starting weights and, for BYOLIP, its teacher as `momentum_model`."""
    model = build_dual(config.network)
    if config.init_text_encoder:
        load_text_transformer(model, read_weights(config.init_text_encoder))
    if config.checkpoint:
        load_checkpoint(model, read_weights(config.checkpoint), allowed_unexpected=NOT_LOADED)
    if config.momentum:
        model.momentum_model = copy.deepcopy(model).requires_grad_(False)
    return model


def weigh(losses: dict, network: DualConfig) -> dict:
    """The named losses and `loss`, the sum that is minimised: the method's terms by their weights."""
    both_ways = network.loss_avg_or_sum == "sum" and "clip_loss_image" in losses
    weights = {"clip_loss": 2 if both_ways else 1, "siglip_loss": 1, "barlip_loss": 1, "siamlip_loss": 1}
    weights["swalip_loss"] = network.swalip_weight
    weights["ssl_loss"] = network.ssl_scale if "clip_loss" in losses else 1
    return losses | {"loss": sum(weight * losses[name] for name, weight in weights.items() if name in losses)}


def train_step(model, next_batch, config: Config, precision: Precision) -> dict:
    """Gradients of one update; returns the losses, 0-d tensors, averaged over the micro-batches."""
    network = distributed.unwrap(model)
    teacher = network.momentum_model if config.momentum else None
    batches = (next_batch() for _ in range(config.accumulate))
    if config.cache_features:

        def losses_of(*features):
            return weigh(network.losses(*features), config.network)

        sync = partial(gradient_sync, model)
        return cached_step(model, losses_of, list(batches), precision.backward, precision.autocast, sync, teacher)
    total = {}
    for micro, batch in enumerate(batches):
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            with torch.no_grad():
                targets = teacher(features_only=True, **batch) if teacher else None
            losses = weigh(model(momentum=targets, **batch), config.network)
        precision.backward(losses["loss"] / config.accumulate)
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def validation(config: Config, tokenizer: Callable, world: World) -> Callable[[DualEncoder], dict[str, float]]:
    """Function model -> zero-shot accuracy on `val_folder`, by z, h and ensembles; exact on any number of processes."""
    classes, templates = (named_list(file, config.val_dataset) for file in (config.labels, config.templates))
    prompts = class_prompts(classes, templates, config.val_dataset)
    data = ClassFolder(config.val_folder, eval_view(config.network.model, config.network.image_size), classes)
    own, statistics = shard_indices(len(data), world.rank, world.size), input_statistics(config.network, world.device)

    def validate(model: DualEncoder) -> dict[str, float]:
        def embed(image: torch.Tensor) -> dict[str, torch.Tensor]:
            return model.embed_image(normalize(image, statistics))

        batches = EvalLoader(data.load, own, config.batch_size, torch.utils.data.default_collate, config.workers)
        with evaluating(model):
            classifier = text_classifier(model.embed_text, tokenizer, prompts, world)
            return zero_shot_accuracy(embed, classifier, batches, own, data.labels, world)

    return validate


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    parts_of(config.network.model)  # complain now of an unknown one
    tokenizer = text_tokenizer(config.network, config.bpe_path, config.tokenizer)
    config.network = replace(config.network, vocab_size=tokenizer.vocab_size)
    config.settle(world.device)
    config.check()
    validate = validation(config, tokenizer, world) if config.val_folder else None
    if config.evaluate:
        if not (config.checkpoint and validate):
            raise UserError("--evaluate needs --checkpoint and --val-folder")
        print(json.dumps(validate(build_model(config).to(world.device)), indent=2))
        return distributed.shutdown()
    session = FineTuning(config, world, "acc1_z")
    loader = build_data(config, tokenizer, world, session.data_state())
    model = build_model(config).train()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = config.accumulate * training_flops(model, model.example_batch(config.batch_size, *config.local_views))
    network, decayed = model, names_by_decay(model, config.network.original)[0]
    model = parallelize(synchronise_batch_norm(model.to(world.device)), world, config)
    teacher = list(network.momentum_model.parameters()) if config.momentum else []  # stands behind all others
    seed_everything(config.seed, world.rank)
    optimizer = build_optimizer(network, config.optimizer, decayed)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    session.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
    shape = Schedule(config.sched, config.epochs, config.lr_end, config.lr_start, config.warmup_epochs)
    sizes = {"loader_steps": loader.steps_per_epoch, "accumulate": config.accumulate}
    plan = Plan.of(shape, config.optimizer.lr, batch=config.batch_size * config.accumulate * world.size, **sizes)
    session.start(config.network.model, plan, parameters, flops, samples_an_epoch=len(loader.stream))
    session.every, statistics = max(1, plan.steps(config.eval_every)), input_statistics(config.network, world.device)

    def next_batch() -> dict[str, torch.Tensor]:
        moved = to_device(session.watch.waiting(loader), world.device)
        return {k: normalize(v, statistics) if k.startswith("image") else v for k, v in moved.items()}

    for step in range(session.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        losses = train_step(model, next_batch, config, precision)
        if config.network.model.endswith("_SWALIPV1") and step < config.swalip_freeze_proto_iters:
            network.freeze_prototypes()
        grad_norm = precision.step(optimizer, list(network.parameters()))
        if config.momentum:
            with torch.no_grad():  # the teacher follows
                torch._foreach_lerp_(teacher, list(network.parameters())[: len(teacher)], 1 - config.momentum_tau)
        network.after_update()
        session.log_step(step + 1, **losses, grad_norm=grad_norm)
        if validate and session.validation_due:
            session.keep(validate(session.network(partial(build_dual, config.network))))
        else:
            session.save_if_due(step + 1)
        session.leave_if_interrupted(step + 1)
    session.export()
    session.close()
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
