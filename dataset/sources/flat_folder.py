"""Images in one folder with a list of their classes, as ImageNet's validation set is published.

Beside the folder, or in it, lies one of
    val.txt (the folder's name)                     lines `name label` or `val/name label`, labels from 0
    imagenet_2012_validation_synset_labels.txt      a synset a line, in the order of the file names
    LOC_val_solution.csv                            Kaggle's: image id, synset and boxes
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from base.errors import UserError, brief
from base.image_names import existing
from base.names import did_you_mean, is_hidden
from base.reading import is_file, read_lines
from base.text import whole_number
from dataset.images.formats import is_image
from dataset.sources.class_folder import LabelledFiles, folder_of

SYNSETS = "imagenet_2012_validation_synset_labels.txt"
KAGGLE = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
TRIES = 20  # images that are looked for


def is_flat(root: Path) -> bool:
    """Whether a folder holds images and no visible sub-folder."""
    if not root.is_dir():
        return False
    with os.scandir(root) as entries:
        inside = [entry for entry in entries if not is_hidden(entry.name)]
    has_folders = any(entry.is_dir() for entry in inside)
    return not has_folders and any(is_image(entry.name) for entry in inside)


def flat_folder(root: Path, classes: Sequence[str] = ()) -> LabelledFiles:
    """The images of a folder without class folders. classes: names that synsets are looked up in;
    none = those of the list, in alphabetical order. UserError says what lacks."""
    readers: dict[str, Callable] = {
        f"{root.name}.txt": _numbered,
        SYNSETS: _synsets,
        KAGGLE: _kaggle,
    }
    for name, read in readers.items():
        for file in (root.parent / name, root / name):
            if file.is_file():
                return read(root, file, list(classes))
    found = next((at / DEVKIT for at in (root.parent, root) if (at / DEVKIT).is_file()), None)
    why = f" ({found} counts classes in an order of its own)" if found else ""
    raise UserError(
        f"{root}: holds no sub-folder for each class{why}; sort the images into class folders "
        f"(PyTorch's extract_ILSVRC.sh does so for ImageNet), or put {root.name}.txt with a "
        f"line `name label` for each image, {SYNSETS} or {KAGGLE} beside the folder"
    )


def _numbered(root: Path, file: Path, classes: list[str]) -> LabelledFiles:
    files = []
    labels = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        name, *label = line.rsplit(maxsplit=1)  # by blanks or a tab
        found = whole_number(label[0]) if label else None
        if found is None or found < 0:
            raise UserError(f"{file}, line {number}: expected `name label`, found {brief(line)}")
        if classes and found >= len(classes):
            raise UserError(
                f"{file}, line {number}: class {found}, but there are {len(classes)} from 0"
            )
        image = Path(name.strip())
        if image.is_relative_to(root.name):  # from the folder above
            image = image.relative_to(root.name)
        files.append(root / image)
        labels.append(found)
    return _checked(file, files, labels, [])


def _synsets(root: Path, file: Path, classes: list[str]) -> LabelledFiles:
    files = sorted(path for path in root.iterdir() if is_image(path))
    synsets = [line.strip() for line in read_lines(file) if line.strip()]
    if len(files) != len(synsets):
        raise UserError(
            f"{file}: {len(synsets)} synsets for the {len(files)} images of {root}; fetch what lacks"
        )
    return _named(file, files, synsets, classes)


def _kaggle(root: Path, file: Path, classes: list[str]) -> LabelledFiles:
    files = []
    synsets = []
    for number, line in enumerate(read_lines(file), 1):
        image, _, boxes = line.strip().replace('"', "").partition(",")
        if number == 1 or not image:
            continue
        if not boxes.split():
            raise UserError(
                f"{file}, line {number}: expected `image,synset …`, found {brief(line)}"
            )
        files.append(root / f"{image}.JPEG")
        synsets.append(boxes.split()[0])
    return _named(file, files, synsets, classes)


def _named(file: Path, files: list[Path], synsets: list[str], classes: list[str]) -> LabelledFiles:
    known = classes or sorted(set(synsets))
    place = {folder_of(name): number for number, name in enumerate(known)}
    for synset in synsets:
        if synset not in place:
            hint = did_you_mean(synset, place)
            raise UserError(f"{file}: {synset!r} is not among the {len(known)} classes{hint}")
    return _checked(file, files, [place[synset] for synset in synsets], known)


def _checked(file: Path, files: list[Path], labels: list[int], classes: list[str]) -> LabelledFiles:
    if not files:
        raise UserError(f"{file}: an empty list; give it a line for each image, or remove it")
    if not any(is_file(existing(image)) for image in files[:TRIES]):
        raise UserError(
            f"{file}: none of its first {len(files[:TRIES])} images is there, e.g. {files[0]}; name "
            "the folder of these images, or put the list of this one beside it"
        )
    return LabelledFiles(files, torch.tensor(labels), classes)
