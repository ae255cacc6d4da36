"""DigitScenes, the built-in data set, is made where it is needed and not there yet."""

import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from base.caches import one_builder
from base.errors import UserError
from base.text import as_list

FOLDER = Path("data/digitscenes")
MANIFEST = "manifest.json"  # written last by the builder
# folders of images, and what of a recipe for DigitScenes is of its images alone
ROOTS = ("image_root", "vqa_root", "data_root", "train_data")
OF_IMAGES = (
    *("train_file", "val_file", "test_file", "test_answers", "answer_list"),
    *("refcoco_data", "det_file", "train_list", "val", "test", "val_data", "classes"),
)
BUILDER = Path(__file__).resolve().parents[1] / "scripts/data/make_digitscenes.py"


def make_digitscenes_if_named(config: Any, *options: str) -> bool:
    """Make data/digitscenes if the dataclass `config` names a path in it, see `make_digitscenes`."""
    return names_digitscenes(config) and make_digitscenes(FOLDER, *options)


def make_digitscenes(folder: Path, *options: str) -> bool:
    """Build DigitScenes in `folder` if it is not there yet; returns whether this process built it.

    options: of scripts/data/make_digitscenes.py. Processes that start together wait for the one
    that builds. UserError where the builder fails.
    """
    if (folder / MANIFEST).is_file():
        return False
    with one_builder(folder):
        if (folder / MANIFEST).is_file():  # another process was first
            return False
        print(f"{folder} is not there yet: making it (half a minute)", flush=True)
        done = subprocess.run([sys.executable, str(BUILDER), str(folder), *options])
    if done.returncode:
        raise UserError(f"{folder} could not be made; try: python {BUILDER} {folder}")
    return True


def names_digitscenes(value: Any) -> bool:
    """Whether a text, a path, or any in a list or a dataclass of options lies in data/digitscenes."""
    return any(path.is_relative_to(FOLDER) for path in paths_of(value))


def of_its_images_alone(options: Mapping[str, Any], asked: Collection[str]) -> dict[str, str]:
    """The options of a recipe for DigitScenes that say something of its images, where those that the
    command line sets (`asked`) name a folder of others -> why they are not read."""
    why: dict[str, str] = {}
    for root in ROOTS:
        folders = as_list(options[root] or []) if root in asked else []
        if folders and all(holds_others(Path(each)) for each in folders):
            built = [name for name in OF_IMAGES if names_digitscenes(options.get(name))]
            why |= dict.fromkeys(built, f"it is of DigitScenes, not of --{root}")
    return why


def holds_others(folder: Path) -> bool:
    """Whether a folder is there and neither DigitScenes nor in a copy of it."""
    folder = folder.resolve()
    return folder.is_dir() and not any(
        (up / MANIFEST).is_file() for up in (folder, *folder.parents)
    )


def paths_of(value: Any) -> Iterator[Path]:
    """Every text or path in a dataclass, its sections and lists."""
    if is_dataclass(value):
        for field in fields(value):
            yield from paths_of(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from paths_of(item)
    elif isinstance(value, (str, Path)):
        yield Path(value)
