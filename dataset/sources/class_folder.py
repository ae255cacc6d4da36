"""Class folders: a folder a class with its images, for classification."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from base.distributed import rank
from base.errors import UserError
from base.names import is_hidden
from base.text import as_list, composed, is_blank
from dataset.images.decode import decode_image
from dataset.images.formats import files_below, is_image, leads_nowhere

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass
class LabelledFiles:
    """Image files, their labels int64 [N] (or [N,C]: 1 shown, 0 not, -1 not to be counted), and the
    names of the classes in the order of the labels, [] where none are known."""

    files: list[Path]
    labels: torch.Tensor
    classes: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`image` uint8 [3,H,W] and `target`. Raises BadSample."""
        return {"image": decode_image(self.files[index]), "target": self.labels[index]}


def class_folders(root: Path) -> list[str]:
    """Names of the sub-folders in alphabetical order, the same whether accents are one letter or
    two (NFD); links count, hidden ones do not. UserError for a link that leads nowhere: without its
    class all later ones would have other numbers."""
    visible = [path for path in root.iterdir() if not is_hidden(path)]
    for path in visible:
        if leads_nowhere(path) and not is_image(path):
            raise UserError(f"{path}: a link that leads nowhere; fix or remove it")
    names = (path.name for path in visible if path.is_dir())
    return sorted(names, key=lambda name: (composed(name), name))


def refuse_splits(root: Path, folders: Sequence[str], classes: Sequence = ()) -> None:
    """UserError where the sub-folders are splits; see `are_splits`."""
    if are_splits(folders, classes):
        raise UserError(
            f"{root}: holds splits ({', '.join(folders)}), not classes; name one: {root / folders[0]}; "
            "or, where these are classes, list their names (--classes FILE; zero-shot: --labels)"
        )


def are_splits(folders: Sequence[str], classes: Sequence = ()) -> bool:
    """Whether sub-folders are splits: all are called so (train, val), and `classes`, the names that
    were given (of a class one or several), do not name them."""
    named = {str(name).lower() for names in classes for name in as_list(names)}
    found = {folder.lower() for folder in folders}
    return len(found) > 1 and found <= {*SPLITS} and not found <= named


def _report(root: Path, left_out: Counter) -> None:
    """Names what is no image by its ending: nothing is left out silently."""
    if left_out and rank() == 0:
        kinds = ", ".join(
            f"{count} {ending or 'without one'}" for ending, count in left_out.items()
        )
        print(f"{root}: left out files whose ending is no image's: {kinds}", file=sys.stderr)


class ClassFolder:
    """All images below `root`; the label is the place of the image's folder in alphabetical order.
    Hidden files and folders are ignored, symbolic links followed.

    classes: names of the classes in that order, where known: as many as there are folders. known:
    names of classes, some of which may have no folder. gaps: folders may have no images. UserError.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[torch.Tensor], torch.Tensor],
        classes: Sequence = (),
        known: Sequence[str] = (),
        gaps: bool = False,
    ):
        self.root = Path(root)
        self.transform = transform
        if not self.root.is_dir():
            raise UserError(
                f"{root}: no such folder; name a folder with one sub-folder of images per class"
            )
        self.folders = class_folders(self.root)
        refuse_splits(self.root, self.folders, classes or known)
        if classes and len(classes) != len(self.folders):
            raise UserError(
                f"{root} has {len(self.folders)} class folders, but the list of labels names "
                f"{len(classes)} classes; {_odd_one_out(self.folders, classes)}"
            )
        self.files = []
        labels = []
        left_out: Counter[str] = Counter()
        for label, folder in enumerate(self.folders):
            everything = list(files_below(self.root / folder))
            found = sorted(path for path in everything if is_image(path))
            left_out.update(path.suffix for path in everything if not is_image(path))
            if not found and not gaps:
                raise UserError(
                    f"{self.root / folder}: no images of this class; add them or remove folder and "
                    "label"
                )
            self.files += found
            labels += [label] * len(found)
        if not self.files:
            raise UserError(f"{root}: no sub-folders with images, one per class")
        self.labels = torch.tensor(labels)
        _report(self.root, left_out)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """`image`, as the transform makes it, and `label` of image `index`. Raises BadSample."""
        return {
            "image": self.transform(decode_image(self.files[index])),
            "label": self.labels[index],
        }


def _odd_one_out(folders: Sequence[str], classes: Sequence) -> str:
    """Which class lacks a folder, where folders are named after their classes."""
    names = {str(name).lower() for name in classes}
    present = {folder.lower() for folder in folders}
    if len(names & present) < 0.5 * min(len(folders), len(names)):
        return "give the labels in alphabetical order of the folders"
    missing = sorted(names - present)
    extra = sorted(folder for folder in folders if folder.lower() not in names)
    faults = []
    if missing:
        faults.append(f"no folder for {', '.join(missing)}")
    if extra:
        faults.append(f"no label for {', '.join(extra)}")
    return "; ".join(faults)


def class_list(lines: Sequence[str], name: str) -> list[str]:
    """Names of the classes, one a line, without blanks around them; a class's number is that of its
    line. Blank lines at the end do not count, between classes UserError names them in the file
    `name`. A name may occur again, as ImageNet's `crane` does."""
    names = ["" if is_blank(line) else line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        line = names.index("") + 1
        raise UserError(f"{name}, line {line}: is blank; every line is a class, in order")
    return names


def folder_of(name: str) -> str:
    """The folder that a line of a list of classes is for: the WordNet id of `n01440764 tench, Tinca
    tinca`, as Kaggle's LOC_synset_mapping.txt and Caffe's synset_words.txt have it, else the name."""
    found = re.match(r"(n\d{8})\s", name)
    return found[1] if found else name
