"""Train dual encoders on image-caption pairs: CLIP, CL2L, SiamLIP, BYOLIP, BarLIP, SwALIP, SLIP,
SimCLR, SigLIP, ALIGN.

    one process   python main.py --config configs/main/digitscenes.yaml --output-dir output/rocket
    8 GPUs        torchrun --nproc_per_node=8 main.py --config configs/main/yfcc15m_r50_cl2l.yaml
    Slurm         python run_with_submitit.py main.py --nodes 4 --ngpus 8 -- --config CONFIG
    all knobs     python main.py --help

--model names the network: <CLIP|CL2L>_<backbone>_<head> with the head CLIP, CL2L, SIAMLIP, BARLIP,
SWALIP, SWALIPV1 or SIGLIP; <CLIP|SLIP|SIMCLR>_<backbone> of SLIP; ALIGN_<B0..B7>_<MINI|BASE|LARGE>;
RN50, ViT-B/32 of OpenAI (ViT-B-32 with GELU), which --checkpoint starts from any layout of weights;
open_clip/NAME:TAG or hf/FOLDER, a CLIP or SigLIP of a library with its weights. CL2L's step takes a
weak (global) view of image and caption and `num_augs` strong (local) ones. Global images find their
global captions in the batch, local ones their local captions; with --separate-proj these have
projectors and a temperature of their own. --momentum makes SiamLIP BYOLIP. SIGTERM saves, exits 75.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from base import distributed
from base.distributed import World
from base.errors import UserError
from dataset.images.clip import ViewOptions
from dataset.loading.eval import shard_indices
from dataset.loading.stream import Stream, StreamLoader
from dataset.sources.class_folder import ClassFolder
from dataset.tasks.captions import CaptionCollate, CaptionOptions, pair_sources
from dataset.tasks.catalog import class_prompts, in_order_of, named_list
from dataset.tasks.dual_inputs import (
    NormalizedBatches,
    eval_view,
    input_statistics,
    normalized,
    text_tokenizer,
    training_views,
)
from dataset.tasks.loaders import stream_loader
from dataset.text.augment import TextOptions, TextViews
from evaluation.report.runs import write_index
from evaluation.zeroshot import text_classifier, zero_shot_accuracy
from models.dual_encoder.base import DualEncoder, names_by_decay
from models.dual_encoder.config import DualConfig, TargetOptions
from models.dual_encoder.factory import (
    ANY,
    build_dual,
    check_compiled_pooling,
    parts_of,
    with_library_sizes,
)
from models.dual_encoder.grad_cache import FeatureCache
from models.layers.average import WeightAverage
from models.layers.batchnorm import synchronise_batch_norm
from models.layers.library_towers import start_towers
from models.weights.clip import load_text_transformer
from models.weights.start_dual import start_dual
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.clip_rocket import RocketRunConfig
from runtime.config.from_checkpoint import check_architecture, description_of, saved_config
from runtime.flops import training_flops
from runtime.optim.build import Precision, set_learning_rate
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, evaluating, seed_everything
from runtime.safe_pickle import load_plain
from runtime.scores import print_scores


@dataclass
class Config(RocketRunConfig, CaptionOptions, TargetOptions):
    METHOD = "network.model"
    OF_CHECKPOINT = ("network", "bpe_path")
    output_dir: Path = knob(Path("output/main"), "folder of this run: config, log, checkpoints")
    network: DualConfig = section(DualConfig, flat=True)
    cache_features: bool = knob(False, "micro-batches make one contrastive batch (Gao et al. 2021)")
    views: ViewOptions = section(ViewOptions, flat=True)
    texts: TextOptions = section(TextOptions, flat=True)

    def check(self) -> None:
        """Check that the options are compatible."""
        super().check()
        name = self.network.model
        parts_of(name)  # UserError for an unknown one
        taught = name.endswith(("_SIAMLIP", "_SWALIPV1")) and self.parallel == "ddp"
        if self.momentum and not taught:
            raise UserError("--momentum is for *_SIAMLIP (BYOLIP) or *_SWALIPV1, --parallel ddp")
        if self.network.separate_proj and not self.views.num_augs:
            raise UserError("--separate-proj projects local views: set --num-augs to at least 1")
        if self.val_folder and name.startswith("SIMCLR"):
            raise UserError("SIMCLR has no text encoder to validate with: leave out --val-folder")

    @property
    def local_views(self) -> tuple[int, int]:
        """Local images and local captions of a sample."""
        wanted = parts_of(self.network.model).local_views  # SLIP's two have no caption of their own
        given = self.views.num_augs
        return (given, given) if wanted == ANY else (wanted, 0)


def training_data(config: Config, tokenizer, world: World, state: dict | None) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    local_images, local_captions = config.local_views
    views = training_views(config.network, config.views, local_images)
    texts = TextViews(config.texts, local_captions, stop_words_always=config.network.original)
    sources = pair_sources(config, views, texts, load_plain)
    collate = CaptionCollate(tokenizer, config.text_lengths)
    stream = Stream(sources, collate, config.weights, config.exif)
    return stream_loader(stream, config.batch_size, config, world, state)


def build_model(config: Config) -> DualEncoder:
    """The network on the CPU with its initial weights and, for BYOLIP, its `momentum_model`."""
    model = build_dual(config.network)
    start_towers(model, read_weights, config.lock, load=config.loads_published)
    if config.init_text_encoder:
        load_text_transformer(model, read_weights(config.init_text_encoder))
    if config.checkpoint:
        check_architecture(config, saved_config(config.checkpoint))
        start_dual(model, config.checkpoint, read_weights, description_of, config.evaluate)
    if config.momentum:
        model.momentum_model = copy.deepcopy(model).requires_grad_(False)
    return model


def total_loss(losses: dict, network: DualConfig) -> torch.Tensor:
    """What is minimised, 0-d: the method's named losses by their weights."""
    weights = {
        "clip_loss": 1.0,
        "siglip_loss": 1.0,
        "barlip_loss": 1.0,
        "siamlip_loss": 1.0,
        "swalip_loss": network.swalip_weight,
        "ssl_loss": network.ssl_scale if "clip_loss" in losses else 1.0,  # SLIP's, or SimCLR alone
    }
    if "clip_loss_image" in losses and network.loss_avg_or_sum == "sum":
        weights["clip_loss"] = 2.0  # both directions of CL2L's family and ALIGN added, not averaged
    return sum(weight * losses[name] for name, weight in weights.items() if name in losses)


def train_step(model, next_batch, pixels, config: Config, precision: Precision) -> dict:
    """Gradients of one update. Returns the losses, 0-d means over the micro-batches."""
    total = {}
    for micro in range(config.accumulate):
        batch = normalized(next_batch(), pixels)
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch)
            loss = total_loss(losses, config.network)
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def train_step_cached(model, next_batch, pixels, config: Config, precision: Precision) -> dict:
    """As `train_step`, but the micro-batches make one contrastive batch (Gao et al. 2021)."""
    batches = [normalized(next_batch(), pixels) for _ in range(config.accumulate)]
    with precision.autocast():
        cache = FeatureCache(model, batches)
    losses = distributed.unwrap(model).losses(cache.features, cache.targets)
    loss = total_loss(losses, config.network)
    precision.backward(loss)  # as far as the cached features
    for micro, batch in enumerate(cache.with_fixed(batches)):
        with gradient_sync(model, last=micro == config.accumulate - 1), cache.replay(micro):
            with precision.autocast():
                surrogate = model(feature_grads=cache.gradients(micro), **batch)["surrogate"]
            surrogate.backward()  # the loss scale is in the gradients of the features already
    return {name: value.detach() for name, value in {"loss": loss, **losses}.items()}


def validation_data(config: Config) -> tuple[ClassFolder, list[list[str]]]:
    """Labelled images, and every class's prompts: all templates filled with its names."""
    classes = named_list(config.labels, config.val_dataset)
    templates = named_list(config.templates, config.val_dataset)
    view = eval_view(config.network.model, config.network.image_size)
    images = ClassFolder(config.val_folder, view, classes)
    classes = in_order_of(images.folders, classes, config.val_dataset)
    return images, class_prompts(classes, templates, config.val_dataset)


def evaluate(model: DualEncoder, data, prompts, tokenizer, config: Config, world: World) -> dict:
    """Zero-shot accuracy in percent by z, h and their ensembles; exact on any number of ranks."""
    own = shard_indices(len(data), world.rank, world.size)
    batches = NormalizedBatches(data.load, own, config, world.device)
    with evaluating(model):
        classes = text_classifier(model.embed_text, tokenizer, prompts, world)
        scores = zero_shot_accuracy(model.embed_image, classes, batches, own, data.labels, world)
    scores["chance"] = 100 / len(prompts)
    return scores | batches.damages()


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    method = with_library_sizes(config.network)
    vocabulary = method.text_tower or config.tokenizer
    tokenizer = text_tokenizer(method.model, method.context_length, config.bpe_path, vocabulary)
    config.network = replace(method, vocab_size=tokenizer.vocab_size)
    config.resolve_auto(world.device)
    if config.compile:
        check_compiled_pooling(config.network, world.device)
    data, prompts = validation_data(config) if config.val_folder else (None, None)
    if config.evaluate:
        model = build_model(config).to(world.device)
        scores = evaluate(model, data, prompts, tokenizer, config, world)
        return print_scores(scores)
    run = Run(config, world, metric="acc1_z" if data else None)
    loader = training_data(config, tokenizer, world, run.data_state())
    network = build_model(config)
    decayed, _ = names_by_decay(network, method.original)
    example = network.example_batch(config.batch_size, *config.local_views)
    flops = config.accumulate * training_flops(network, example) if run.peak_flops else 0.0
    network = synchronise_batch_norm(network.to(world.device))
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    model, optimizer, plan = run.begin(method.model, network, loader, precision, decayed, flops)
    teacher = WeightAverage([(network.momentum_model, network)]) if config.momentum else None
    pixels = input_statistics(config.network, world.device)
    freeze = config.swalip_freeze_proto_iters if hasattr(network, "freeze_prototypes") else 0

    if run.validation_due(run.step):  # resumed after a kill in a validation
        scores = evaluate(whole_model(model), data, prompts, tokenizer, config, world)
        run.keep_best(scores, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        if config.cache_features:
            losses = train_step_cached(model, run.next_batch, pixels, config, precision)
        else:
            losses = train_step(model, run.next_batch, pixels, config, precision)
        if step < freeze:
            network.freeze_prototypes()
        grad_norm = precision.step(optimizer, model.parameters())
        if teacher:
            teacher.update(config.momentum_tau)
        network.after_update()
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            scores = evaluate(whole_model(model), data, prompts, tokenizer, config, world)
            run.keep_best(scores, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    run.export()
    run.finish()
    write_index(run.folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
