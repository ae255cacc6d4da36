"""ImageNet-v2, -A, -R, -O, -Sketch, Babel-ImageNet and ObjectNet: class folders with their own
subset of classes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from base.errors import MissingData, UserError
from base.names import did_you_mean
from base.reading import read_json
from base.text import as_list
from dataset.sources.class_folder import ClassFolder, LabelledFiles
from dataset.sources.class_folder import class_folders as folders_of
from dataset.tasks.catalog import PROMPTS, Entry

CLASSES = 1000  # of ImageNet


@cache
def imagenet_classes() -> dict[str, list]:
    """`wnids`: the WordNet id of every class; `imagenet-a` and others: the numbers of theirs."""
    return read_json(PROMPTS / "imagenet_classes.json", dict)


def imagenet_folders(entry: Entry, names: Sequence) -> LabelledFiles:
    """Images of class folders that are called by WordNet id, or 0 ... 999 as those of ImageNet-v2.

    names: of all 1000 classes. A published set has exactly its classes; any other those whose
    folders are there. Labels count among them, in ImageNet's order.
    """
    root = class_root(entry)
    data = ClassFolder(root, lambda image: image)
    numbers = [_number(folder, root) for folder in data.folders]
    wanted = _wanted(entry.name, numbers)
    missing = sorted(set(wanted) - set(numbers))
    extra = sorted(set(numbers) - set(wanted))
    if missing or extra:
        raise UserError(
            f"{root}: {entry.name} has {len(wanted)} classes; {_named('no folder for', missing, names)}"
            f"{_named('not one of them:', extra, names)}unpack the archive again"
        )
    place = {number: label for label, number in enumerate(wanted)}
    relabel = torch.tensor([place[number] for number in numbers])
    return LabelledFiles(data.files, relabel[data.labels], [names[number] for number in wanted])


def babel_imagenet(entry: Entry) -> tuple[LabelledFiles, list[str]]:
    """Babel-ImageNet (Geigle et al. 2023): ImageNet's validation images of the classes that have a
    name in the language, and the templates of that language.

    Below `path` babel_imagenet.json, {LANGUAGE: [numbers of classes, their names]}, and
    nllb_dist13b_prompts.json, {LANGUAGE: templates}, as CLIP_benchmark publishes them; below
    `images` ImageNet's class folders.
    """
    numbers, names = _babel(entry, "babel_imagenet.json")
    templates = _babel(entry, "nllb_dist13b_prompts.json")
    if len(numbers) != len(names) or not set(numbers) <= set(range(CLASSES)):
        raise UserError(
            f"{entry.path}/babel_imagenet.json: {len(numbers)} classes and {len(names)} names in "
            f"{entry.language!r}; fetch the file again"
        )
    every = imagenet_folders(replace(entry, path=entry.images), range(CLASSES))
    missing = sorted(set(numbers) - set(every.classes))
    if missing:
        wanted = _named("no folder for", missing, dict(zip(numbers, names, strict=True)))
        raise UserError(f"{entry.images}: {wanted}add ImageNet's validation images of them")
    place = {number: label for label, number in enumerate(numbers)}
    label_of = torch.tensor([place.get(number, -1) for number in every.classes])
    found = _labelled(every.files, label_of[every.labels], names)
    return found, [text.replace("{c}", "{}") for text in templates]


def _labelled(files: Sequence[Path], labels: torch.Tensor, classes: list) -> LabelledFiles:
    """The files that have a label; -1 marks the others."""
    kept = labels.ge(0).nonzero().flatten().tolist()
    return LabelledFiles([files[index] for index in kept], labels[kept], classes)


def _babel(entry: Entry, name: str) -> list:
    """What a file of Babel-ImageNet has in the entry's language."""
    file = Path(entry.path) / name
    if not file.is_file():
        raise MissingData(
            f"{entry.name}: no file {file}; put clip_benchmark/datasets/{name} of "
            "github.com/LAION-AI/CLIP_benchmark there"
        )
    content = read_json(file, dict)
    found = content.get(entry.language.upper())
    if not isinstance(found, list):
        known = sorted(language.lower() for language in content)
        raise UserError(
            f"{file}: no language {entry.language!r}{did_you_mean(entry.language, known)}; it has "
            f"{', '.join(known)}"
        )
    return found


def _wanted(name: str, numbers: list[int]) -> list[int]:
    """The classes a set has by its name; those found, where the name is not a published one."""
    name = name.partition("/")[0]
    if name in ("imagenetv2", "imagenet_sketch"):
        return list(range(CLASSES))
    return imagenet_classes().get(name) or sorted(numbers)


def _named(what: str, numbers: list[int], names: Sequence | Mapping) -> str:
    if not numbers:
        return ""
    wnids = imagenet_classes()["wnids"]
    shown = [f"{wnids[number]} ({as_list(names[number])[0]})" for number in numbers[:4]]
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"{what} {', '.join(shown)}{more}; "


def _number(folder: str, root: Path) -> int:
    wnids = imagenet_classes()["wnids"]
    if folder in wnids:
        return wnids.index(folder)
    if folder.isascii() and folder.isdigit() and int(folder) < CLASSES:
        return int(folder)
    raise UserError(
        f"{root / folder}: no class of ImageNet; folders are called by WordNet id (n01440764) or by "
        "number (0 ... 999)"
    )


def class_root(entry: Entry) -> Path:
    """The folder of class folders: `path`/`split`, the only folder in `path`, or `path` itself."""
    path = Path(entry.path)
    if (path / entry.split).is_dir():
        return path / entry.split
    if not path.is_dir():
        raise MissingData(
            f"{entry.name}: no folder {path}; unpack the set's archive there, a folder a class, or "
            "name another place with --root or --catalog"
        )
    inner = folders_of(path)
    return path / inner[0] if len(inner) == 1 and folders_of(path / inner[0]) else path


def object_net(entry: Entry) -> LabelledFiles:
    """ObjectNet's 113 classes that overlap with ImageNet, called as ObjectNet calls them, as
    CLIP_benchmark counts them (Barbu et al. 2019); images of its other classes are left out.

    A class may be several of ImageNet's; `mappings/` of the archive says which.
    """
    places = [Path(entry.path), *sorted(Path(entry.path).glob("objectnet*"))]
    root = next((place for place in places if (place / "images").is_dir()), None)
    if root is None:
        raise MissingData(
            f"{entry.name}: no folder {entry.path}/images; unpack objectnet-1.0.zip there, with its "
            "mappings/, or name another place with --root or --catalog"
        )
    called = read_json(root / "mappings/folder_to_objectnet_label.json", dict)
    overlap = read_json(root / "mappings/objectnet_to_imagenet_1k.json", dict)
    if not all(isinstance(name, str) for name in called.values()):
        raise UserError(f"{root}/mappings: the names of folders must be texts; unpack them again")
    wanted = {folder: name for folder, name in sorted(called.items()) if name in overlap}
    absent = sorted(set(overlap) - set(called.values()))
    absent += [folder for folder in wanted if not (root / "images" / folder).is_dir()]
    if absent or not wanted:
        raise UserError(
            f"{root}: no folder of images for {', '.join(absent[:4]) or 'any class'}; unpack the "
            "archive again"
        )
    data = ClassFolder(root / "images", lambda image: image)
    order = list(wanted)
    place = [order.index(folder) if folder in wanted else -1 for folder in data.folders]
    classes = [name.lower() for name in wanted.values()]
    return _labelled(data.files, torch.tensor(place)[data.labels], classes)
