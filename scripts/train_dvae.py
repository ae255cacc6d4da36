"""Train an image tokenizer (discrete VAE) on one's own images, for SIMLA's masked image modelling.

    python scripts/train_dvae.py --data data/digitscenes/pretrain_train.json --image_root data/digitscenes \\
        --output_dir output/tokenizer
    python scripts/train_dvae.py --data photos --size 128 --groups 4 --width 64 --vocab_size 1024 --scheduler.epochs 20
    python Pretrain.py ... --image_tokenizer_path output/tokenizer/image_tokenizer.safetensors

`--data` takes JSON lists or JSON lines with an `image` field, and folders of images. The step:
encoder -> relaxed code of each place by Gumbel-softmax -> decoder -> reconstruction loss;
`usage_weight` keeps all codes in use. The relaxation's temperature falls over the training (Ramesh
et al. 2021, section 2.1).

The defaults make an 8 x 8 grid of codes from 32-px images, in about half a minute on 2 CPU cores.
In output_dir:
image_tokenizer.safetensors and .json (sizes and figures), preview.png (left-out images, each
followed by its reconstruction), checkpoints and log. The same command resumes.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base import distributed  # noqa: E402
from base.distributed import World  # noqa: E402
from base.errors import UserError  # noqa: E402
from base.files import write_json  # noqa: E402
from dataset.images.albef import random_box, resized_crop  # noqa: E402
from dataset.images.decode import check_image_root, decode_image  # noqa: E402
from dataset.loading.eval import EvalLoader  # noqa: E402
from dataset.loading.stream import RecordSource, Stream, StreamLoader  # noqa: E402
from dataset.sources.records import Records  # noqa: E402
from models.fusion.dvae import ImageTokenizer, TokenizerConfig, code_usage  # noqa: E402
from runtime.config.cli import knob, run, section  # noqa: E402
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate  # noqa: E402
from runtime.optim.schedule import Plan, Schedule  # noqa: E402
from runtime.parallel import gradient_sync, parallelize, to_device  # noqa: E402
from runtime.run import Run, RunConfig, evaluating, seed_everything  # noqa: E402

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEFT_OUT = (
    20  # every 20th image is not trained on: it is what the figures and the preview are about
)


@dataclass
class Config(RunConfig):
    output_dir: Path = knob(
        Path("output/tokenizer"), "folder of this run: tokenizer, preview, log, checkpoints"
    )
    data: list[str] = knob(
        [], "JSON lists or JSON lines with an `image` field, and folders of images"
    )
    image_root: Path = knob(Path(""), "folder that the JSON's relative paths start from")
    size: int = knob(32, "side of the square images, pixels; a multiple of 2^(groups - 1)", low=2)
    crop_scale: tuple[float, float] = knob(
        (0.5, 1.0), "range of the random crop's share of the image", low=0, high=1
    )
    flip: bool = knob(True, "mirror half of the images")
    error_budget: float = knob(
        0.01, "share of unreadable images at which the run stops", low=0, high=1
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
        (1.0, 0.1), "of the Gumbel-softmax, at the first and last update", low=0.01
    )
    straight_through: bool = knob(False, "decode hard codes, with the gradient of the relaxed ones")
    batch_size: int = knob(32, "images per process", low=1)
    workers: int = knob(2, "loader processes per training process", low=0)
    optimizer: Optimizer = section(
        Optimizer, flat=True, lr=1e-2, weight_decay=1e-4, betas=(0.9, 0.95), clip_grad_norm=1.0
    )
    scheduler: Schedule = section(
        Schedule, epochs="300 steps", min_lr=0.0, warmup_lr=1e-4, warmup="10%"
    )


class Crop:
    """An image's random crop, mirrored or not, or with scale=None all of it: float32 [3,size,size]
    in [0,1]."""

    def __init__(self, size: int, scale: tuple[float, float] | None, flip: bool):
        self.size, self.scale, self.flip = size, scale, flip

    def __call__(self, record: dict) -> dict:
        image = decode_image(record["image"])
        box = random_box(image, self.scale) if self.scale else None
        flip = self.flip and bool(torch.rand(()) < 0.5)
        return {"image": resized_crop(image, box, self.size, flip).float().div_(255)}


def find_images(config: Config) -> list[dict]:
    """`{image: absolute path}` of every image, each once; folders are searched through. Raises
    UserError."""
    found: dict[str, None] = {}
    for name in config.data:
        if Path(name).is_dir():
            paths = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in IMAGES)
            if not paths:
                raise UserError(f"{name}: no images ({', '.join(IMAGES)}) in this folder")
            found |= dict.fromkeys(str(path.absolute()) for path in paths)
        else:
            images = [record["image"] for record in Records(name, required=("image",))]
            check_image_root(config.image_root, images)
            found |= dict.fromkeys(str((config.image_root / image).absolute()) for image in images)
    if len(found) < 2 * LEFT_OUT:
        raise UserError(
            f"--data: {len(found)} images; name JSON lists or folders with at least {2 * LEFT_OUT}"
        )
    return [{"image": image} for image in found]


def build_model(config: Config) -> ImageTokenizer:
    outputs = {"mse": 3, "laplace": 6}[config.loss]
    sizes = (config.vocab_size, config.width, config.groups, config.blocks, config.decoder_width)
    tokenizer = ImageTokenizer(TokenizerConfig(*sizes, outputs=outputs))
    if config.size % tokenizer.reduction:
        raise UserError(
            f"--size {config.size} is no multiple of {tokenizer.reduction}, the pixels of a code's side"
        )
    return tokenizer


def evaluate(tokenizer: ImageTokenizer, loader: EvalLoader, folder: Path) -> dict[str, float]:
    """Figures over the left-out images, and preview.png with the first of them above their
    reconstructions."""
    from torchvision.utils import save_image

    counts, error, variance, number = torch.zeros(tokenizer.config.vocab_size), 0.0, 0.0, 0
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


def build_loader(
    config: Config, images: list[dict], world: World, state: dict | None
) -> StreamLoader:
    """Endless batches of this process, beginning at the position `state`."""
    source = RecordSource(images, Crop(config.size, config.crop_scale, config.flip), "data")
    return StreamLoader(
        Stream([source], default_collate),
        batch_size=config.batch_size,
        workers=config.workers,
        world=world,
        seed=config.seed,
        state=state,
        error_budget=config.error_budget,
    )


def train_step(
    model, next_batch, temperature: torch.Tensor, config: Config, precision: Precision
) -> dict:
    """Gradients of one update from `accumulate` micro-batches; returns the last one's losses."""
    for micro in range(config.accumulate):
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(
                **next_batch(), temperature=temperature, straight_through=config.straight_through
            )
            loss = losses["loss_reconstruction"] + config.usage_weight * losses["loss_usage"]
            loss = loss + config.kl_weight * losses["loss_kl"]
        precision.backward(loss / config.accumulate)
    return {name: value.detach() for name, value in {"loss": loss, **losses}.items()}


def finish(session: Run, config: Config, tokenizer: ImageTokenizer, held_out: list[dict]) -> None:
    """Figures over the left-out images, for people and as image_tokenizer.json."""
    whole = Crop(config.size, None, flip=False)
    loader = EvalLoader(
        lambda i: whole(held_out[i]), range(len(held_out)), 64, default_collate, workers=0
    )
    with evaluating(tokenizer):
        figures = evaluate(tokenizer, loader, session.folder)
    report = asdict(tokenizer.config) | {"size": config.size} | figures
    write_json(session.folder / "image_tokenizer.json", report, indent=1)
    used, perplexity, explained = (
        figures[key] for key in ("codes_used", "code_perplexity", "explained")
    )
    session.log.say(
        f"{used:.0%} of {config.vocab_size} codes used, perplexity {perplexity:.1f}; {explained:.0%} of the variance "
        f"within {figures['images']} left-out images reconstructed: see {session.folder / 'preview.png'}"
    )
    if used < 0.1:
        session.log.say("few codes are in use: train longer, or raise --usage_weight")


def main(config: Config) -> None:
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)
    tokenizer = build_model(config)
    images = find_images(config)
    held_out, kept = images[::LEFT_OUT], [image for i, image in enumerate(images) if i % LEFT_OUT]
    session = Run(config, world)
    loader = build_loader(config, kept, world, session.data_state())
    model = parallelize(tokenizer.to(memory_format=torch.channels_last), world, config).train()
    seed_everything(config.seed, world.rank)
    optimizer = build_optimizer(model, config.optimizer)
    precision = Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    session.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
    plan = Plan.of(
        config.scheduler,
        config.optimizer.lr,
        loader_steps=loader.steps_per_epoch,
        accumulate=config.accumulate,
        batch=config.batch_size * config.accumulate * world.size,
    )
    side = config.size // tokenizer.reduction
    facts = {"images": f"{len(kept):,}", "codes": f"{side} x {side} of {config.vocab_size}"}
    session.start("image tokenizer", plan, sum(p.numel() for p in model.parameters()), **facts)

    def next_batch() -> dict[str, torch.Tensor]:
        return to_device(session.watch.waiting(loader), world.device)

    first, last = config.temperature
    step = session.step
    while step < plan.total:
        set_learning_rate(optimizer, plan.lr(step))
        temperature = torch.tensor(
            first * (last / first) ** (step / plan.total), device=world.device
        )
        losses = train_step(model, next_batch, temperature, config, precision)
        precision.step(optimizer, list(model.parameters()))
        step += 1
        session.log_step(step, **losses)
        session.save_if_due(step)
        session.leave_if_interrupted(step)
    session.export("image_tokenizer.safetensors")
    if world.is_main:
        finish(session, config, tokenizer, held_out)
    session.close()
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
