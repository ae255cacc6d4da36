"""Pre-train SIMLA (Khan et al., ECCV 2022) or ALBEF (Li et al., NeurIPS 2021) on image-text pairs.

    one process  torchrun Pretrain.py --config configs/Pretrain/digitscenes.yaml
    8 GPUs       torchrun --nproc_per_node=8 Pretrain.py --config configs/Pretrain/simla.yaml
    Slurm        srun -N2 --ntasks-per-node=8 --gpus-per-node=8 python Pretrain.py --config FILE
    all knobs    python Pretrain.py --help

The step: images and captions are encoded separately and aligned by the contrastive loss (ITA); the
fusion layers tell hard negatives found there from true pairs (ITM); masked tokens (MLM) and, for
SIMLA, masked patches (MIM) and keywords (PSEUDO) are predicted. A momentum teacher gives soft
targets, weighted by alpha.

Published, 4M images: 30 epochs at batch 8 x 64 take 3-4 days of 8 A100; Flickr30k zero-shot
text/image R@1 90.5 / 76.8 (ALBEF 4M). DigitScenes: 6 minutes on 2 CPU cores. Runs resume exactly.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base import distributed
from base.distributed import World
from base.errors import UserError, naming
from dataset.images.albef import PretrainTransform
from dataset.images.block_mask import BlockMask
from dataset.images.randaugment import RandAugment
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.records import Records
from dataset.sources.shards import shard_sources
from dataset.tasks.loaders import stream_loader
from dataset.tasks.pretrain import CodeCache, PretrainCollate, PretrainPair, write_codes
from dataset.text.wordpiece import Tokenizer
from evaluation.report.runs import write_index
from models.fusion.config import networks, warn_of_queue
from models.fusion.dvae import ImageTokenizer, existing_tokenizer
from models.fusion.momentum import MomentumPairs
from models.fusion.simla import Simla, SimlaConfig, with_counts
from models.weights.albef import load_bert, load_bert_folder, start_from
from models.weights.starting_vit import start_vision
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.from_checkpoint import check_architecture, description_of, saved_config
from runtime.config.networks import FusionNetworks
from runtime.flops import training_flops
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig, StreamConfig
from runtime.parallel import gradient_sync
from runtime.run import Run, seed_everything


@dataclass
class Config(FusionNetworks, StreamConfig, RunConfig):
    """Pre-training of fusion encoders."""

    METHOD = "method"
    output_dir: Path = knob(Path("output/Pretrain"), "this run: config.yaml, log, checkpoints")
    # the method
    method: str = knob("simla", "losses and text transformer", choices=("simla", "albef"))
    alpha: float = knob(0.4, "weight of the teacher's soft targets after alpha_ramp", low=0, high=1)
    alpha_ramp: str = knob("1 epochs", "length of alpha's linear rise from 0, with a unit")
    momentum: float = knob(0.995, "momentum of the teacher, per update", low=0, high=1)
    temp: float = knob(0.07, "initial temperature of the contrastive loss", low=0.001, high=0.5)
    queue_size: int = knob(65536, "momentum features kept as negatives", low=0, high=1 << 30)
    mlm_probability: float = knob(0.15, "fraction of tokens masked", low=0, high=1)
    mask_ratio: float = knob(75 / 256, "MIM: fraction masked", low=0, high=1, methods="simla")
    compat: str = knob("none", "'original': the published numbers", choices=("none", "original"))
    # what the networks start from
    vision_weights: Path | None = knob(None, "of the ViT: file, timm/NAME[:FILE], hf/FOLDER")
    text_weights: str | None = knob(None, "of BERT: folder or hub name; none = random")
    image_tokenizer_path: Path | None = knob(None, "dVAE's file, or trained", methods="simla")
    code_cache: Path | None = knob(None, ".npy of codes; needs fixed_geometry", rare=True)
    # the data
    train_file: list[str] = knob([], "annotation lists {image, caption}, JSON or JSON lines")
    image_root: Path = knob(Path(""), "folder that the images' relative paths start from")
    shards: list[str] = knob([], "WebDataset: paths, {00000..00099}, globs, s3:// or gs:// URLs")
    crop_scale: tuple[float, float] = knob((0.2, 1.0), "area of the random crop", low=0, high=1)
    flip: bool = knob(True, "horizontal flip, probability 0.5; no if captions say left and right")
    augment_level: float = knob(7, "strength of RandAugment; 0 = none", low=0, high=10)
    fixed_geometry: bool = knob(False, "always the whole image; colour operations alone", rare=True)
    max_words: int = knob(30, "words of a caption kept", low=1)
    max_tokens: int = knob(25, "tokens of a caption kept, [CLS] included", low=2)
    batch_size: int = knob(64, "pairs per process and micro-batch", low=2)
    optimizer: Optimizer = section(Optimizer, flat=True)
    scheduler: Schedule = section(Schedule, aliases=("schedular",), flat=True)

    def check(self) -> None:
        """Check that the options are compatible."""
        if self.code_cache and (self.shards or not (self.is_simla and self.fixed_geometry)):
            raise UserError("code_cache needs SIMLA, --fixed_geometry and train_file, no shards")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_res // self.patch_size

    @property
    def is_simla(self) -> bool:
        return self.method == "simla"


def build_model(
    config: Config, tokenizer: Tokenizer, image_tokenizer: ImageTokenizer | None
) -> Simla:
    """The networks on the CPU, with their starting weights."""
    vit, bert = networks(config, tokenizer.vocab_size, mask_token=config.is_simla)
    model = Simla(
        SimlaConfig(
            vit=vit,
            bert=bert,
            embed_dim=config.embed_dim,
            queue_size=config.queue_size,
            temp=config.temp,
            mim=config.is_simla,
            keywords=5 if config.is_simla else 0,
            visual_vocab=image_tokenizer.config.vocab_size if image_tokenizer else 8192,
            max_masked_patches=max(1, BlockMask(config.grid, ratio=config.mask_ratio).total),
            special_ids=tuple(tokenizer.special_ids),
            cls_id=tokenizer.cls_id,
            compat=config.compat,
        )
    )
    if config.text_weights:
        with naming("text_weights", config.text_weights):
            load_bert(model.text_encoder, *load_bert_folder(config.text_weights))
    start_vision(model.visual_encoder, config.vision_weights, read_weights, description_of)
    MomentumPairs(model).copy()
    if config.checkpoint:
        check_architecture(config, saved_config(config.checkpoint))
        start_from(model, read_weights(config.checkpoint), "pretrain")
    return model


def load_image_tokenizer(config: Config, world: World) -> ImageTokenizer | None:
    """The frozen tokenizer on the device, in the precision of the run; ALBEF needs none."""
    if not config.is_simla:
        return None
    path = existing_tokenizer(config.image_tokenizer_path)
    image_tokenizer = ImageTokenizer.load(path, read_weights, config.precision).to(world.device)
    return image_tokenizer.compiled() if config.compile else image_tokenizer


def image_transform(config: Config, token_side: int | None) -> PretrainTransform:
    """Random view of an image and, `token_side` pixels wide, what the image tokenizer sees."""
    return PretrainTransform(
        config.image_res,
        token_resolution=token_side,
        shared_view=config.compat == "none",
        fixed_geometry=config.fixed_geometry,
        scale=config.crop_scale,
        flip=config.flip,
        augment=RandAugment(2 if config.augment_level else 0, config.augment_level, config.compat),
    )


def training_data(
    config: Config,
    tokenizer: Tokenizer,
    image_tokenizer: ImageTokenizer | None,
    world: World,
    state: dict | None,
) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    token_side = config.grid * image_tokenizer.reduction if image_tokenizer else None  # pixels
    records = Records(config.train_file) if config.train_file else []
    codes = None
    if config.code_cache:
        images = PretrainPair(image_transform(config, token_side), config.image_root)
        how = {"workers": config.workers, "world": world, "exif": config.exif}
        write_codes(config.code_cache, records, images, image_tokenizer, **how)
        codes = CodeCache(config.code_cache, len(records))
        token_side = None
    pair = PretrainPair(
        image_transform(config, token_side),
        config.image_root,
        patch_mask=BlockMask(config.grid, ratio=config.mask_ratio) if config.is_simla else None,
        codes=codes,
        max_words=config.max_words,
    )
    sources = [RecordSource(records, pair, "train_file")] if records else []
    sources += shard_sources(config.shards, pair, config.shuffle_buffer, config.samples)
    if not sources:
        raise UserError("no training data: name lists in train_file or WebDataset shards in shards")
    collate = PretrainCollate(tokenizer, config.max_tokens, config.mlm_probability)
    stream = Stream(sources, collate, config.weights, config.exif)
    warn_of_queue(config.queue_size, len(stream))
    return stream_loader(stream, config.batch_size, config, world, state)


def train_step(
    model, teacher: MomentumPairs, image_tokenizer, next_batch, alpha, config: Config, precision
) -> dict[str, Tensor]:
    """Gradients of one update; the teacher moves first. Returns the losses, 0-d means."""
    teacher.update()
    total = {}
    batches = with_counts([next_batch() for _ in range(config.accumulate)])
    for micro, batch in enumerate(batches):
        if "token_image" in batch:
            batch["mim_positions"] = distributed.unwrap(model).mim_positions(batch["patch_mask"])
            images = batch.pop("token_image")
            batch["visual_codes"] = image_tokenizer.codes_at(images, batch["mim_positions"])
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=alpha)
            loss = losses["loss_ita"] + losses["loss_itm"] + losses["loss_mlm"]
            if config.is_simla:
                loss = loss + losses["loss_mim"] + losses["loss_pseudo"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    run = Run(config, world)
    tokenizer = Tokenizer(config.text_encoder)
    image_tokenizer = load_image_tokenizer(config, world)
    loader = training_data(config, tokenizer, image_tokenizer, world, run.data_state())
    model = build_model(config, tokenizer, image_tokenizer)
    example = model.example_batch(config.batch_size, config.max_tokens)
    flops = config.accumulate * training_flops(model, example) if run.peak_flops else 0.0
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    title = f"{config.method.upper()} pre-training"
    model, optimizer, plan = run.begin(title, model, loader, precision, flops=flops)
    teacher = MomentumPairs(model, config.momentum)

    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        ramp = plan.ramp(step, config.alpha_ramp)
        # a tensor: for every new number torch.compile would compile again
        alpha = torch.full((), config.alpha * ramp, device=world.device)
        losses = train_step(
            model, teacher, image_tokenizer, run.next_batch, alpha, config, precision
        )
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    run.export()
    run.finish()
    write_index(run.folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
