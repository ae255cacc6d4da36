"""The bytes of small files of images."""

import io

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of_colour(colour, size=(8, 8), kind: str = "PNG", **options) -> bytes:
    """An RGB image of one colour, `size` = (width, height)."""
    return encoded(Image.new("RGB", size, colour), kind, **options)
