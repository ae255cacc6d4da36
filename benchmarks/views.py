"""Samples per second and core of the dual encoders' input pipeline, beside the published kind of
it, in one run.

    python -m benchmarks.views                     # 512 x 384 JPEGs of about 60 kB, as files and in zips of 1000
    python -m benchmarks.views --items 400 --text-augment --output output/bench_views.json

A sample is a decoded image, one weak and two strong views of it at 224 pixels, and three texts as
token ids. The reference does the same with Pillow and torchvision on Pillow's images, and parses a
zip file's directory for every member, as clip-rocket does. One process, one thread; the two take
turns, and the best round of each counts.
"""

import io
import json
import random
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from base.pixels import IMAGENET
from dataset.images.clip import ImageViews, ViewOptions
from dataset.images.decode import decode_image
from dataset.images.zip_member import image_source, read_member
from dataset.tasks.captions import ImageTextPair
from dataset.text.augment import TextOptions, TextViews
from dataset.text.bpe import ClipTokenizer
from runtime.config.cli import knob, run_script

WIDTH, HEIGHT, IMAGES, MEMBERS = 512, 384, 50, 1000
CAPTIONS = (
    "a photo of a large dog running in the park with a red ball",
    "Sunset over the ocean with my friends, Canon EOS 5D",
    "the old house by the river (room 12), evening",
)


@dataclass
class Config:
    """Measurement."""

    items: int = knob(200, "samples a round", low=10)
    rounds: int = knob(3, "rounds of each pipeline", low=1)
    text_augment: bool = knob(False, "the four operations on the words, with WordNet's synonyms")
    bpe_path: Path | None = knob(
        None, "BPE merges; none = CLIP's, from the package open_clip_torch"
    )
    output: Path | None = knob(None, "JSON file for the figures")


def write_images(folder: Path) -> list[str]:
    """Smooth random images with some grain as JPEG files and, IMAGES of MEMBERS members, in one zip
    file."""
    from PIL import Image

    generator, names = torch.Generator().manual_seed(0), []
    with zipfile.ZipFile(folder / "000.zip", "w", zipfile.ZIP_STORED) as bundle:
        for number in range(IMAGES):
            coarse = torch.rand(1, 3, HEIGHT // 16, WIDTH // 16, generator=generator)
            smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
            grain = 0.09 * torch.randn(3, HEIGHT, WIDTH, generator=generator)
            pixels = (smooth + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
            (folder / f"{number:03d}.jpg").write_bytes(buffer.getvalue())
            names.append(f"{number:03d}.jpg")
        data = [(folder / name).read_bytes() for name in names]
        for number in range(MEMBERS):
            bundle.writestr(f"{number:03d}.jpg", data[number % IMAGES])
    return names


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
    colours = [jitter, T.RandomGrayscale(0.2), T.RandomApply([blur], 0.5), T.RandomHorizontalFlip()]
    crop = T.RandomResizedCrop(224, (0.08, 1), interpolation=bicubic)
    strong = T.Compose([crop, *colours, T.ToTensor(), normalize])
    return lambda image: (strong(image), strong(image), weak(image))


def pipelines(
    folder: Path, names: list[str], config: Config
) -> dict[str, dict[str, Callable[[int], object]]]:
    """Measurement -> {ours, reference} -> function of a sample's number."""
    from PIL import Image

    tokenizer = ClipTokenizer(config.bpe_path)
    texts = TextViews(TextOptions(text_augment=config.text_augment), local=2)
    build, views = ImageTextPair(ImageViews(224, ViewOptions()), texts, folder), published_views()

    def pillow(number: int):
        return Image.open(folder / names[number % IMAGES]).convert("RGB")

    def pillow_from_zip(number: int):
        data = zipfile.ZipFile(folder / "000.zip").read(f"{number * 37 % MEMBERS:03d}.jpg")
        return Image.open(io.BytesIO(data)).convert("RGB")

    def sample(image: str, number: int):
        made = build({"image": image, "caption": [CAPTIONS[number % len(CAPTIONS)]]})
        return made, tokenizer(made["texts"])

    def reference(image, number: int):
        return views(image), tokenizer(texts([CAPTIONS[number % len(CAPTIONS)]]))

    def file(number: int) -> str:
        return names[number % IMAGES]

    def member(number: int) -> str:
        return f"000.zip/{number * 37 % MEMBERS:03d}.jpg"

    return {
        "decode": {
            "ours": lambda n: decode_image(image_source(folder, file(n)), file(n)),
            "reference": pillow,
        },
        "read a zip member": {
            "ours": lambda n: read_member(folder / "000.zip", f"{n * 37 % MEMBERS:03d}.jpg"),
            "reference": lambda n: zipfile.ZipFile(folder / "000.zip").read(
                f"{n * 37 % MEMBERS:03d}.jpg"
            ),
        },
        "decode, 3 views": {
            "ours": lambda n: build.image_views(decode_image(folder / file(n))),
            "reference": lambda n: views(pillow(n)),
        },
        "3 texts": {
            "ours": lambda n: tokenizer(texts([CAPTIONS[n % len(CAPTIONS)]])),
        },
        "sample from files": {
            "ours": lambda n: sample(file(n), n),
            "reference": lambda n: reference(pillow(n), n),
        },
        "sample from zips": {
            "ours": lambda n: sample(member(n), n),
            "reference": lambda n: reference(pillow_from_zip(n), n),
        },
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_images(folder)
        size = sum((folder / name).stat().st_size for name in names) / len(names)
        print(
            f"{WIDTH} x {HEIGHT} JPEGs of {size / 1000:.0f} kB; samples per second of processor time, one thread"
        )
        for what, both in pipelines(folder, names, config).items():
            results[what] = dict.fromkeys(both, 0.0)
            for _ in range(config.rounds):
                for name, make in both.items():
                    begin = time.process_time()
                    for number in range(config.items):
                        make(number)
                    rate = config.items / (time.process_time() - begin)
                    results[what][name] = max(results[what][name], rate)
            line = "  ".join(f"{name} {rate:8.1f}" for name, rate in results[what].items())
            ours, other = results[what]["ours"], results[what].get("reference")
            print(
                f"{what:<20} {line}" + (f"  ratio {ours / other:.2f}" if other else ""), flush=True
            )
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
