"""Train an image tokenizer (discrete VAE) on one's own images, for SIMLA's masked image modelling.

    python scripts/train_dvae.py --data data/digitscenes/pretrain_train.json --image_root data/digitscenes \\
        --output_dir output/tokenizer
    python scripts/train_dvae.py --data photos --size 128 --groups 4 --width 64 --vocab_size 1024 --epochs 20
    python Pretrain.py ... --image_tokenizer_path output/tokenizer/image_tokenizer.safetensors

`--data` takes JSON lists or JSON lines with an `image` field, and folders of images. The step:
encoder -> relaxed code of each position by Gumbel-softmax -> decoder -> reconstruction loss;
`usage_weight` keeps all codes in use. The relaxation's temperature falls over the training (Ramesh
et al. 2021, section 2.1).

The defaults make an 8 x 8 grid of codes from 32-px images, in about half a minute on 2 CPU cores.
In output_dir:
image_tokenizer.safetensors and .json (sizes and figures), preview.png (held-out images, each
followed by its reconstruction), checkpoints and log. The same command resumes.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base import distributed
from base.distributed import World, say
from base.errors import UserError
from base.writing import write_json
from dataset.images.albef import random_box, resized_crop
from dataset.images.decode import check_image_root, decode_image
from dataset.images.formats import IMAGE_TYPES, files_below, is_image
from dataset.loading.eval import EvalLoader
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.records import Records
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import list_shards
from dataset.tasks.classification import is_shards
from dataset.tasks.loaders import stream_loader
from models.fusion.dvae import ImageTokenizer, TokenizerConfig, code_usage
from models.weights.loading import load_checkpoint
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, restated, run_script, section
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, evaluating, seed_everything

SHARD_IMAGES = 20_000  # after which no further shard is opened
HELD_OUT = 20  # every 20th image is not trained on: the figures and the preview are about these


@dataclass
class Config(RunConfig):
    output_dir: Path = knob(
        Path("output/tokenizer"), "folder of this run: tokenizer, preview, log, checkpoints"
    )
    data: list[str] = knob(
        [], "lists or tables with an `image` field, folders of images, shards", required=True
    )
    image_root: Path = knob(Path(""), "folder that the JSON's relative paths start from")
    size: int = knob(32, "side of the square images, pixels; a multiple of 2^(groups - 1)", low=2)
    crop_scale: tuple[float, float] = knob(
        (0.5, 1.0), "area of the random crop, as a fraction of the image", low=0, high=1
    )
    flip: bool = knob(True, "horizontal flip with probability 0.5")
    error_budget: float = knob(
        0.01, "fraction of unreadable images at which the run stops", low=0, high=1
    )
    vocab_size: int = knob(128, "codes (OpenAI: 8192)", low=2)
    width: int = knob(
        16, "channels at full resolution, doubled with every group (OpenAI: 256)", low=1
    )
    groups: int = knob(
        3, "resolutions; a code stands for a square of 2^(groups - 1) pixels (OpenAI: 4)", low=1
    )
    blocks: int = knob(1, "residual blocks per group (OpenAI: 2)", low=1)
    decoder_width: int = knob(64, "channels of a code's embedding (OpenAI: 128)", low=1)
    loss: str = knob("mse", "reconstruction loss; laplace is OpenAI's", choices=("mse", "laplace"))
    usage_weight: float = knob(
        0.01, "weight of loss_usage: all codes used alike; about 0.3 for laplace", low=0
    )
    kl_weight: float = knob(0.0, "weight of loss_kl: codes undecided", low=0)
    temperature: tuple[float, float] = knob(
        (1.0, 0.1), "of the Gumbel-softmax, at the first update and behind the last", low=0.01
    )
    straight_through: bool = knob(False, "decode hard codes, with the gradient of the relaxed ones")
    batch_size: int = knob(32, "images per process", low=1)
    workers: int = restated(RunConfig, "workers", 2)
    optimizer: Optimizer = section(
        Optimizer, flat=True, lr=1e-2, weight_decay=1e-4, betas=(0.9, 0.95), clip_grad_norm=1.0
    )
    scheduler: Schedule = section(
        Schedule, flat=True, duration="300 steps", min_lr=0.0, warmup_lr=1e-4, warmup="10%"
    )


class Crop:
    """An image's random crop, flipped or not, or with scale=None all of it: float32 [3,size,size]
    in [0,1]."""

    def __init__(self, size: int, scale: tuple[float, float] | None, flip: bool):
        self.size = size
        self.scale = scale
        self.flip = flip

    def __call__(self, record: dict) -> dict:
        found = record["image"]
        image = decode_image(found if isinstance(found, str) else found[0].image(found[1]))
        box = random_box(image, self.scale) if self.scale else None
        flip = self.flip and bool(torch.rand(()) < 0.5)
        return {"image": resized_crop(image, box, self.size, flip).float().div_(255)}


def find_images(config: Config) -> list[dict]:
    """`{image: absolute path}` of every image, each once; folders are searched through. Of shards
    `{image: (index, place)}`, as many as the first that hold SHARD_IMAGES. Raises UserError."""
    found: dict[Any, None] = {}
    for name in config.data:
        if is_shards(name):
            for shard in list_shards(name):
                if len(found) < SHARD_IMAGES:
                    index = ShardIndex([shard])
                    found |= dict.fromkeys((index, place) for place in range(len(index)))
        elif Path(name).is_dir():
            paths = sorted(path for path in files_below(name) if is_image(path))
            if not paths:
                raise UserError(f"{name}: no images ({', '.join(IMAGE_TYPES)}) in this folder")
            found |= dict.fromkeys(str(path.absolute()) for path in paths)
        else:
            images = [record["image"] for record in Records(name, required=("image",))]
            check_image_root(config.image_root, images)
            found |= dict.fromkeys(str((config.image_root / image).absolute()) for image in images)
    if len(found) < 2 * HELD_OUT:
        raise UserError(
            f"{len(found)} images are too few for an image tokenizer of your own: give {2 * HELD_OUT} or "
            "more (train_dvae.py: --data)"
        )
    return [{"image": image} for image in found]


def build_model(config: Config) -> ImageTokenizer:
    """The tokenizer on the CPU, with the weights of --checkpoint, else random ones."""
    tokenizer = ImageTokenizer(
        TokenizerConfig(
            vocab_size=config.vocab_size,
            width=config.width,
            groups=config.groups,
            blocks_per_group=config.blocks,
            decoder_width=config.decoder_width,
            outputs={"mse": 3, "laplace": 6}[config.loss],
        )
    )
    if config.size % tokenizer.reduction:
        raise UserError(
            f"--size {config.size} is no multiple of {tokenizer.reduction}, the pixels of a code's side"
        )
    if config.checkpoint:
        load_checkpoint(tokenizer, read_weights(config.checkpoint))
    return tokenizer


def evaluate(tokenizer: ImageTokenizer, loader: EvalLoader, folder: Path) -> dict[str, float]:
    """Figures over the held-out images, and preview.png with the first of them above their
    reconstructions."""
    from torchvision.utils import save_image

    counts = torch.zeros(tokenizer.config.vocab_size)
    error = 0.0
    variance = 0.0
    number = 0
    device = next(tokenizer.parameters()).device
    for batch in loader:
        image = batch["image"].to(device)
        codes = tokenizer.codes(image)
        decoded = tokenizer.decode(codes)
        if not number:
            save_image(
                torch.stack([image[:32], decoded[:32]], dim=1).flatten(0, 1),
                folder / "preview.png",
                nrow=16,
            )
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        error += (decoded - image).square().mean(dim=(1, 2, 3)).sum().item()
        variance += (
            (image - image.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(1, 2, 3)).sum().item()
        )
        number += len(image)
    used, perplexity = code_usage(counts)
    figures = {"images": number, "codes_used": used, "code_perplexity": perplexity}
    return figures | {"error": error / number, "explained": 1 - error / max(variance, 1e-12)}


def training_data(config: Config, images: list[dict], world: World, state) -> StreamLoader:
    """Endless batches of this process, from the position `state` on."""
    source = RecordSource(images, Crop(config.size, config.crop_scale, config.flip), "data")
    stream = Stream([source], default_collate, exif=config.exif)
    return stream_loader(stream, config.batch_size, config, world, state)


def train_step(
    model, next_batch, temperature: Tensor, config: Config, precision: Precision
) -> dict[str, Tensor]:
    """Gradients of one update. Returns the losses, 0-d means over the micro-batches."""
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(
                **batch, temperature=temperature, straight_through=config.straight_through
            )
            loss = losses["loss_reconstruction"] + config.usage_weight * losses["loss_usage"]
            loss = loss + config.kl_weight * losses["loss_kl"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def write_report(config: Config, tokenizer: ImageTokenizer, held_out: list[dict]) -> None:
    """Figures of the held-out images, printed and in image_tokenizer.json."""
    whole = Crop(config.size, None, flip=False)
    loader = EvalLoader(whole, held_out, 64, default_collate, workers=0, exif=config.exif)
    with evaluating(tokenizer):
        figures = evaluate(tokenizer, loader, config.output_dir)
    report = {**asdict(tokenizer.config), "size": config.size, **figures}
    write_json(config.output_dir / "image_tokenizer.json", report, indent=1)
    used = figures["codes_used"]
    say(
        f"{used:.0%} of {config.vocab_size} codes used, perplexity {figures['code_perplexity']:.1f}; "
        f"{figures['explained']:.0%} of the variance within {figures['images']} held-out images "
        f"reconstructed: see {config.output_dir / 'preview.png'}"
    )
    if used < 0.1:
        say("few codes are in use: train longer, or raise --usage_weight")


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same initial weights on every rank
    tokenizer = build_model(config)
    images = find_images(config)
    held_out = images[::HELD_OUT]
    kept = [image for i, image in enumerate(images) if i % HELD_OUT]
    run = Run(config, world)
    loader = training_data(config, kept, world, run.data_state())
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    side = config.size // tokenizer.reduction
    model, optimizer, plan = run.begin(
        "image tokenizer",
        tokenizer.to(memory_format=torch.channels_last),
        loader,
        precision,
        codes=f"{side} x {side} of {config.vocab_size}",
    )
    first, last = config.temperature

    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        done = plan.position(step) / plan.position(plan.total)
        temperature = first * (last / first) ** done
        temperature = torch.full((), temperature, device=world.device)
        losses = train_step(model, run.next_batch, temperature, config, precision)
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    run.export("image_tokenizer.safetensors", shown=False)
    tokenizer = whole_model(model)
    run.finish()
    if world.is_main:
        write_report(config, tokenizer, held_out)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
