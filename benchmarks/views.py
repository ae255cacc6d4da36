"""Samples per second and core of the dual encoders' input pipeline, beside the published kind.

    python -m benchmarks.views      # 512 x 384 JPEGs of about 60 kB, as files and in zips of 1000

A sample is a decoded image, one weak and two strong views of it at 224 pixels, and three texts as
token ids. The reference does the same with Pillow and torchvision on Pillow's images, and parses a
zip file's directory for every member, as clip-rocket does; the texts are ours in both. One thread;
rates are samples per second of processor time.
"""

import io
import random
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageFilter

from base.pixels import IMAGENET
from base.zip_member import image_source, read_member
from benchmarks.runner import OURS, Options, take_turns
from benchmarks.table import Column, publish
from dataset.images.clip import ImageViews, ViewOptions
from dataset.images.decode import decode_image
from dataset.text.augment import TextOptions, TextViews
from dataset.text.bpe import ClipTokenizer
from runtime.config.cli import knob, restated, run_script

WIDTH, HEIGHT, IMAGES, MEMBERS = 512, 384, 50, 1000
ZIP = "000.zip"
REFERENCE = "reference"
WARMUP = 3  # samples before the clock starts
CAPTIONS = (
    "a photo of a large dog running in the park with a red ball",
    "Sunset over the ocean with my friends, Canon EOS 5D",
    "the old house by the river (room 12), evening",
)
COLUMNS = [
    Column("samples per CPU second", "rate", "{:.1f}"),
    Column("ours is faster by", "rate", "{:.2f} x", ratio="higher"),
]


@dataclass
class Config(Options):
    items: int = knob(200, "samples of each pipeline", low=10)
    threads: int = restated(Options, "threads", 1)
    report: str = restated(Options, "report", "")


def write_images(folder: Path) -> int:
    """Write smooth images with some grain and the zip file; returns the mean size in bytes."""
    rng = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        coarse = torch.rand(1, 3, HEIGHT // 16, WIDTH // 16, generator=rng)
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        grain = 0.09 * torch.randn(3, HEIGHT, WIDTH, generator=rng)
        pixels = (smooth + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", "JPEG", quality=80)
    with zipfile.ZipFile(folder / ZIP, "w") as bundle:
        for number in range(MEMBERS):
            bundle.write(folder / f"{number % IMAGES:03d}.jpg", f"{number:03d}.jpg")
    return sum(file.stat().st_size for file in folder.glob("*.jpg")) // IMAGES


def published_views() -> Callable:
    """Strong, strong and weak view of a Pillow image as normalised tensors, by torchvision."""
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))
    tensor = T.Compose([T.ToTensor(), T.Normalize(*IMAGENET)])
    weak = T.Compose([T.RandomResizedCrop(224, (0.5, 1), interpolation=bicubic), tensor])
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    colours = [jitter, T.RandomGrayscale(0.2), T.RandomApply([blur], 0.5)]
    crop = T.RandomResizedCrop(224, (0.08, 1), interpolation=bicubic)
    strong = T.Compose([crop, *colours, T.RandomHorizontalFlip(), tensor])
    return lambda image: (strong(image), strong(image), weak(image))


def rates(options: SimpleNamespace) -> dict:
    """Samples per second of processor time of a side's pipelines, after some to warm up."""
    torch.manual_seed(0)
    random.seed(0)
    folder = Path(options.exchange)
    texts = TextViews(TextOptions(), local=2)
    tokenizer = ClipTokenizer()
    ours = options.side == OURS
    views = ImageViews(224, ViewOptions()) if ours else published_views()

    def read(member: str) -> bytes:
        zip = folder / ZIP
        return read_member(zip, member) if ours else zipfile.ZipFile(zip).read(member)

    def decode(name: str) -> torch.Tensor | Image.Image:
        """FILE, or ZIP/MEMBER."""
        if ours:
            return decode_image(image_source(folder, name), name)
        inside, _, member = name.rpartition("/")
        return Image.open(io.BytesIO(read(member)) if inside else folder / name).convert("RGB")

    def sample(name: str, n: int) -> tuple:
        return views(decode(name)), tokenizer(texts([CAPTIONS[n % len(CAPTIONS)]]))

    files = [f"{n % IMAGES:03d}.jpg" for n in range(options.items)]
    # in an order that jumps about the zip file
    members = [f"{n * 37 % MEMBERS:03d}.jpg" for n in range(options.items)]
    pipelines = {
        "decode": lambda n: decode(files[n]),
        "read a zip member": lambda n: read(members[n]),
        "decode, 3 views": lambda n: views(decode(files[n])),
        "sample from files": lambda n: sample(files[n], n),
        "sample from zips": lambda n: sample(f"{ZIP}/{members[n]}", n),
    }
    found = {}
    for name, make in pipelines.items():
        for n in range(WARMUP):
            make(n)
        begin = time.process_time()
        for n in range(options.items):
            make(n)
        found[name] = options.items / (time.process_time() - begin)
    return {"rates": found}


def main(config: Config) -> None:
    sides = dict.fromkeys((OURS, REFERENCE), "benchmarks.views:rates")
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder))
        runs = take_turns(config, sides, exchange=folder)
    results = {}
    for name in runs[OURS][0]["rates"]:
        for side in sides:
            results[f"{name}: {side}"] = [{**run, "rate": run["rates"][name]} for run in runs[side]]
    title = ["Input pipeline", f"{WIDTH} x {HEIGHT} JPEGs of {size / 1000:.0f} kB"]
    publish(config, "views", title, results, COLUMNS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
