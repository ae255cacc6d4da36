"""Which files are images: one list for class folders, shards, lists and scripts."""

import os
from collections.abc import Iterator
from pathlib import Path

# Endings without the dot. Of several images in one sample of a shard the first of this order is used.
IMAGE_TYPES = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe", "mpo", "avif", "jp2", "j2k", "gif", "bmp"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
)
# What Pillow may open, whatever a file is called. Others (EPS, PDF, WMF ...) start foreign programs.
PILLOW_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM"),
)


def is_image(name: str | Path) -> bool:
    """Whether a file is an image, by its ending."""
    return str(name).rpartition(".")[2].lower() in IMAGE_TYPES


def files_below(root: str | Path) -> Iterator[Path]:
    """All files below a folder, hidden ones left out, sub-folders that are symbolic links followed.

    A link to a folder that it lies in is not followed again.
    """
    yield from _files_below(str(root), ())


def _files_below(folder: str, ancestors: tuple) -> Iterator[Path]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if is_folder:
            yield from _files_below(path, (*ancestors, identity))
        else:
            yield Path(path)
