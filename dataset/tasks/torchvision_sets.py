"""Data sets of torchvision: images with a class each, in its own files."""

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.caches import digest, states_digest
from base.distributed import say
from base.errors import BadSample, UserError, brief
from base.names import did_you_mean
from dataset.images.formats import files_below

SPLIT_WORDS = ("split", "image_set", "version")  # of options; the last is iNaturalist's
CLASS_NAMES = ("classes", "categories", "all_categories")  # attributes of torchvision's sets


class TorchvisionRecords(Sequence):
    """A data set of torchvision as records {pixels, label}.

    split: train or test; named: the split that the user names, "" for none. UserError says what is
    near, or the remedy: a name that no split has must not mean another one's images.
    """

    def __init__(self, name: str, root: Path, split: str, download: bool = False, named: str = ""):
        from torchvision import datasets

        if name not in datasets.__all__ or not inspect.isclass(getattr(datasets, name)):
            hint = did_you_mean(name, datasets.__all__, 0.3)
            raise UserError(f"torchvision has no data set {name!r}{hint}")
        self.name = f"torchvision/{name}" + (f":{named}" if named else "")
        options = split_options(name, split, named)
        try:
            self.data = torchvision_set(name, root, options, download)
            count = len(self.data)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.name}: {reason} (looked in {root}); name its folder with --data-root, or "
                "fetch it with --download"
            ) from None
        if not options:
            say(f"{self.name}: has no splits; all of its {count:,} images are taken")
        self.classes = class_names_of(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        """Raises BadSample."""
        pixels, label = sample_of(self.data, index, self.name)
        return {"pixels": pixels, "label": label}

    def content(self) -> str:
        """A digest of its images: of their values where it holds them, else of their files."""
        held = getattr(self.data, "data", None)
        if isinstance(held, np.ndarray | Tensor):
            labels = getattr(self.data, "targets", getattr(self.data, "labels", None))
            return digest(np.asarray(held).tobytes(), np.asarray(labels).tobytes())
        return states_digest(own_files(self.data))


def own_files(data) -> Iterator[Path]:
    """The files of torchvision's data set: of class folders its images, else all below the folders
    that it names inside its root, where other sets may lie beside; where it names none, all there."""
    from torchvision.datasets import DatasetFolder

    if isinstance(data, DatasetFolder):
        yield from (Path(path) for path, _ in data.samples)
        return
    root = Path(str(getattr(data, "root", "") or "."))
    named = [value for value in vars(data).values() if isinstance(value, Path | str)]
    named = [Path(value) for value in named if isinstance(value, Path) or os.sep in value]
    named.append(root / str(getattr(data, "base_folder", "")))  # CelebA's
    inside = [path.relative_to(root).parts[:1] for path in named if path.is_relative_to(root)]
    folders = {root.joinpath(*first) for first in inside if first and (root / first[0]).is_dir()}
    for folder in sorted(folders) or [root]:
        yield from files_below(folder)


def split_options(name: str, split: str, named: str = "") -> dict[str, object]:
    """The options of torchvision's class that choose a split, train or test, or the one that the user
    names; {} for a set without splits. UserError, also for a set that needs more than a folder."""
    takes = _options_of(name)
    options: dict[str, object] = {}
    word = next((word for word in SPLIT_WORDS if word in takes), None)
    if word and (named or word != "version"):
        options[word] = named or split
    if "train" in takes:
        part = split if options else named or split  # EMNIST's splits have both parts
        if part not in ("train", "test"):
            raise UserError(f"torchvision/{name}: its splits are train and test, not {part}")
        options["train"] = part == "train"
    if named and not options:
        raise UserError(f"torchvision/{name}: this set has no splits; leave out :{named}")
    for option, about in takes.items():
        if about.default is about.empty and option not in ("root", *options):
            raise UserError(f"torchvision/{name}: needs {option}, which no option here gives")
    return options


def torchvision_set(name: str, root: str | Path, options: dict[str, object], download: bool):
    """torchvision's data set of a class name. options: see `split_options`."""
    from torchvision import datasets

    place = {"root": root, "download": download}
    takes = _options_of(name)
    given = {option: value for option, value in place.items() if option in takes}
    return getattr(datasets, name)(**given, **options)


def _options_of(name: str) -> dict[str, inspect.Parameter]:
    """Options of torchvision's class, with those that it hands on to the class it is made of."""
    from torchvision import datasets

    takes: dict[str, inspect.Parameter] = {}
    for kind in inspect.getmro(getattr(datasets, name)):
        own = inspect.signature(kind).parameters
        takes = {**own, **takes}
        if not any(about.kind is about.VAR_KEYWORD for about in own.values()):
            break
    return {option: about for option, about in takes.items() if about.kind is not about.VAR_KEYWORD}


def class_names_of(data) -> list[str]:
    """Names of the classes of torchvision's data set; [] where it tells none."""
    found = (getattr(data, name, None) for name in CLASS_NAMES)
    return [str(name) for name in next((names for names in found if names), ())]


def sample_of(data, index: int, name: str) -> tuple[Tensor, int]:
    """uint8 [3,H,W] and class of an image of torchvision's data set. Raises BadSample where it
    cannot be read, UserError where its target is no class."""
    from PIL import Image

    try:
        image, label = data[index]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}, image {index}: {error}") from None
    try:
        return pixels_of(image), int(label)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(
            f"{name}: no images with a class each: a target is {brief(label)}"
        ) from None


def pixels_of(image) -> Tensor:
    """uint8 [3,H,W] of Pillow's image."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
