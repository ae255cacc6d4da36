"""Pixels: a scene drawn as a JPEG file, and the contact sheet to look at."""

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np

from dataset.digitscenes.scenes import COLOURS, GROUNDS, Digit, Handwriting, Scene

JPEG_QUALITY = 90


def stroke(digit: Digit, handwriting: Handwriting) -> np.ndarray:
    """Opacity float32 [h, w] in [0, 1] of a digit at its size: bicubic up-sampling, then a firmer
    edge."""
    from PIL import Image

    crop = handwriting.crops[digit.sample]
    rows, columns = crop.shape
    window = (0.5, 0.5, columns - 0.5, rows - 0.5)
    ink = Image.fromarray(crop).resize(digit.box[2:], Image.Resampling.BICUBIC, box=window)
    return np.clip((np.asarray(ink) - 0.34) / 0.36, 0, 1)


def draw(scene: Scene, handwriting: Handwriting, seed: int):
    """The scene as a PIL image: a softly lit ground, each digit in its colour give or take a
    little, and grain."""
    from PIL import Image

    rng = np.random.default_rng([seed, 2, scene.image_id])
    slope = rng.uniform(-0.12, 0.12, 2)
    across = slope[0] * np.linspace(-1, 1, scene.width)[None, :]
    down = slope[1] * np.linspace(-1, 1, scene.height)[:, None]
    light = 1 + across + down
    ground = np.add(GROUNDS[scene.ground], rng.uniform(-8, 8, 3))
    canvas = (light[..., None] * ground).astype(np.float32)
    for digit in scene.digits:
        x, y, w, h = digit.box
        opacity = stroke(digit, handwriting)[..., None]
        colour = np.add(COLOURS[digit.colour], rng.uniform(-10, 10, 3))
        patch = canvas[y : y + h, x : x + w]
        patch += opacity * (colour - patch)
    canvas += 4 * rng.standard_normal((scene.height, scene.width, 1), np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def jpeg(scene: Scene, handwriting: Handwriting, seed: int) -> bytes:
    """The scene as the bytes of a JPEG file with full-resolution colour (strokes are only a few
    pixels wide)."""
    stream = io.BytesIO()
    draw(scene, handwriting, seed).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def contact_sheet(images: Sequence, texts: Sequence[str], columns: int = 6, cell: int = 200):
    """A PIL image of `images` in a grid, each enlarged to at most `cell` pixels, with its text
    below."""
    from PIL import Image, ImageDraw, ImageFont

    margin = 12
    line = 17  # height of a line of text
    lines = 4
    step_x = cell + 2 * margin
    step_y = step_x + line * lines
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * step_x, rows * step_y), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(number, columns)
        left = column * step_x + margin
        top = row * step_y + margin
        scale = cell / max(image.size)
        size = [round(side * scale) for side in image.size]
        enlarged = image.resize(size, Image.Resampling.LANCZOS)
        centred = left + (cell - enlarged.width) // 2
        sheet.paste(enlarged, (centred, top + cell - enlarged.height))
        for below, words in enumerate(textwrap.wrap(text, 30)[:lines]):
            pen.text((left, top + cell + 6 + below * line), words, fill="black", font=font)
    return sheet
