"""Samples per second and core of the dual encoders' input pipeline, beside the published kind of
it.

    python -m benchmarks.views                     # 512 x 384 JPEGs of about 60 kB, as files and in zips of 1000
    python -m benchmarks.views --items 400 --text-augment --output output/bench_views.json

A sample is a decoded image, one weak and two strong views of it at 224 pixels, and three texts as
token ids. The reference does the same with Pillow and torchvision on Pillow's images, and parses a
zip file's directory for every member, as clip-rocket does. One thread; rates are samples per second
of processor time. Printed only, unless --report names a page.
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

from base.errors import UserError
from base.files import write_json
from base.pixels import IMAGENET
from benchmarks.runner import OURS, Options, Side, load_at_start, take_turns
from benchmarks.table import markdown, median, publish, ratio
from dataset.images.clip import ImageViews, ViewOptions
from dataset.images.decode import decode_image
from dataset.images.zip_member import image_source, read_member
from dataset.tasks.captions import ImageTextPair
from dataset.text.augment import TextOptions, TextViews
from dataset.text.bpe import ClipTokenizer
from runtime.config.cli import knob, run_script

REFERENCE = "reference"
WIDTH, HEIGHT, IMAGES, MEMBERS = 512, 384, 50, 1000
ZIP = "000.zip"
WARMUP = 3  # samples before the clock starts
CAPTIONS = (
    "a photo of a large dog running in the park with a red ball",
    "Sunset over the ocean with my friends, Canon EOS 5D",
    "the old house by the river (room 12), evening",
)


@dataclass
class Config(Options):
    """What to measure."""

    items: int = knob(200, "samples of each pipeline", low=10)
    text_augment: bool = knob(False, "the four operations on the words, with WordNet's synonyms")
    bpe_path: Path | None = knob(
        None, "BPE merges; none = CLIP's, from the package open_clip_torch"
    )
    output: Path | None = knob(None, "JSON file for the medians")
    threads: int = knob(1, "CPU threads of each side", low=1)
    report: str = knob("", "page to write the table to; empty = print only")


def file_name(number: int) -> str:
    return f"{number % IMAGES:03d}.jpg"


def member_name(number: int) -> str:
    """Members in an order that jumps about the zip file."""
    return f"{number * 37 % MEMBERS:03d}.jpg"


def caption(number: int) -> list[str]:
    return [CAPTIONS[number % len(CAPTIONS)]]


def write_images(folder: Path) -> int:
    """Smooth random images with some grain as JPEG files, and in one zip file of MEMBERS members.
    Returns the mean size of a file in bytes."""
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    sizes = []
    for number in range(IMAGES):
        coarse = torch.rand(1, 3, HEIGHT // 16, WIDTH // 16, generator=rng)
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        grain = 0.09 * torch.randn(3, HEIGHT, WIDTH, generator=rng)
        pixels = (smooth + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        path = folder / file_name(number)
        Image.fromarray(pixels).save(path, "JPEG", quality=80)
        sizes.append(path.stat().st_size)
    with zipfile.ZipFile(folder / ZIP, "w", zipfile.ZIP_STORED) as bundle:
        for number in range(MEMBERS):
            bundle.write(folder / file_name(number), f"{number:03d}.jpg")
    return sum(sizes) // len(sizes)


def published_views() -> Callable:
    """Weak and strong view of a Pillow image as normalised tensors, with torchvision's
    transforms."""
    from PIL import ImageFilter
    from torchvision import transforms as T

    bicubic, normalize = T.InterpolationMode.BICUBIC, T.Normalize(*IMAGENET)
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))
    weak = T.Compose(
        [T.RandomResizedCrop(224, (0.5, 1), interpolation=bicubic), T.ToTensor(), normalize]
    )
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    colours = [jitter, T.RandomGrayscale(0.2), T.RandomApply([blur], 0.5)]
    crop = T.RandomResizedCrop(224, (0.08, 1), interpolation=bicubic)
    strong = T.Compose([crop, *colours, T.RandomHorizontalFlip(), T.ToTensor(), normalize])
    return lambda image: (strong(image), strong(image), weak(image))


def ours(options: SimpleNamespace) -> dict:
    """Rates of our pipelines."""
    folder = Path(options.exchange)
    tokenizer, texts = text_pipeline(options)
    pair = ImageTextPair(ImageViews(224, ViewOptions()), texts, folder)

    def decode(number: int):
        return decode_image(image_source(folder, file_name(number)), file_name(number))

    def sample(image: str, number: int):
        made = pair({"image": image, "caption": caption(number)})
        return made, tokenizer(made["texts"])

    pipelines = {
        "decode": decode,
        "read a zip member": lambda n: read_member(folder / ZIP, member_name(n)),
        "decode, 3 views": lambda n: pair.image_views(decode(n)),
        "3 texts": lambda n: tokenizer(texts(caption(n))),
        "sample from files": lambda n: sample(file_name(n), n),
        "sample from zips": lambda n: sample(f"{ZIP}/{member_name(n)}", n),
    }
    return measure_rates(pipelines, options)


def reference(options: SimpleNamespace) -> dict:
    """Rates of the same with Pillow and torchvision; the texts are ours."""
    from PIL import Image

    folder = Path(options.exchange)
    tokenizer, texts = text_pipeline(options)
    views = published_views()

    def decode(number: int):
        return Image.open(folder / file_name(number)).convert("RGB")

    def read(number: int) -> bytes:
        return zipfile.ZipFile(folder / ZIP).read(member_name(number))

    def decode_member(number: int):
        return Image.open(io.BytesIO(read(number))).convert("RGB")

    def sample(image, number: int):
        return views(image), tokenizer(texts(caption(number)))

    pipelines = {
        "decode": decode,
        "read a zip member": read,
        "decode, 3 views": lambda n: views(decode(n)),
        "sample from files": lambda n: sample(decode(n), n),
        "sample from zips": lambda n: sample(decode_member(n), n),
    }
    return measure_rates(pipelines, options)


def text_pipeline(options: SimpleNamespace) -> tuple[ClipTokenizer, TextViews]:
    """Tokenizer, and the three texts of a caption."""
    texts = TextViews(TextOptions(text_augment=options.text_augment), local=2)
    return ClipTokenizer(options.bpe_path), texts


def measure_rates(pipelines: dict[str, Callable], options: SimpleNamespace) -> dict[str, float]:
    """Samples per second of processor time of each pipeline, a function of the sample's number."""
    torch.manual_seed(0)
    random.seed(0)
    rates = {}
    for name, make in pipelines.items():
        for number in range(WARMUP):
            make(number)
        begin = time.process_time()
        for number in range(options.items):
            make(number)
        rates[name] = options.items / (time.process_time() - begin)
    return rates


def main(config: Config) -> None:
    if config.tiny:
        raise UserError("--tiny: there is no network here; give --items")
    load = load_at_start(config)
    sides = [Side(OURS, "benchmarks.views:ours"), Side(REFERENCE, "benchmarks.views:reference")]
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder))
        results = take_turns(config, sides, exchange=folder)
    rows, medians = [], {}
    for name in results[OURS][0]:
        medians[name] = {OURS: median(results[OURS], name)}
        cells = [name, f"{medians[name][OURS]:.1f}"]
        if name in results[REFERENCE][0]:
            medians[name][REFERENCE] = median(results[REFERENCE], name)
            cells.append(f"{medians[name][REFERENCE]:.1f}")
            cells.append(f"{1 / ratio(results, REFERENCE, name):.2f} x")
        rows.append(cells)
    body = markdown(["samples per CPU second", OURS, REFERENCE, "ours is faster by"], rows)
    title = ["Input pipeline", f"{WIDTH} x {HEIGHT} JPEGs of {size / 1000:.0f} kB"]
    if config.text_augment:
        title.append("augmented texts")
    publish(config, "views", title, body, load)
    if config.output:
        write_json(config.output, medians, indent=2)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
