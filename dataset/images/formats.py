"""Which files are images: one list for class folders, shards, lists and scripts."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from base.limits import FOLDER_LEVELS, FOLDER_VISITS, check_limit
from base.names import is_hidden

# Endings without the dot. Of several images in one sample of a shard the first of this order is used.
IMAGE_TYPES = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe", "mpo", "avif", "jp2", "j2k", "gif", "bmp"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "apng", "avifs", "dib", "j2c", "jpc", "jpf"),
    "jpx",
)


def is_image(name: str | Path) -> bool:
    """Whether a file is an image, by its ending; hidden files are none."""
    ending = str(name).rpartition(".")[2]
    return ending.lower() in IMAGE_TYPES and not is_hidden(name)


def files_below(root: str | Path) -> Iterator[Path]:
    """All files below a folder, hidden ones left out, sub-folders that are symbolic links followed.

    A link to a folder that it lies in is not followed again. Raises UserError, also for a link that
    leads nowhere and has no ending: a folder may be missing.
    """
    yield from _files_below(str(root), (), Counter())


def _files_below(folder: str, ancestors: tuple, visits: Counter) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; allow reading it, or remove it") from None
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    visits[identity] += 1
    check_limit(folder, len(ancestors), FOLDER_LEVELS, "folders in one another", "flatten them")
    check_limit(folder, visits[identity], FOLDER_VISITS, "links to this folder", "remove some")
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_hidden(name):
            continue
        if is_folder:
            yield from _files_below(path, (*ancestors, identity), visits)
        elif "." not in name and leads_nowhere(path):
            raise UserError(f"{path}: a link that leads nowhere; fix or remove it")
        else:
            yield Path(path)


def leads_nowhere(path: str | Path) -> bool:
    """Whether a path is a symbolic link to what is not there; one to itself leads in circles."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.islink(path)
    except OSError:
        pass
    return False


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
