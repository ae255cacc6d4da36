"""Class folders: a folder a class with its images, for classification."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from base.errors import UserError
from base.files import read_json
from dataset.images.decode import decode_image

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


class ClassFolder:
    """All images below `root`; the label is the place of the image's folder in alphabetical order.

    classes: names of the classes in that order, where known: as many as there are folders.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[torch.Tensor], torch.Tensor],
        classes: Sequence = (),
    ):
        self.root, self.transform = Path(root), transform
        if not self.root.is_dir():
            raise UserError(
                f"{root}: no such folder; name a folder with one sub-folder of images per class"
            )
        self.folders = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        if classes and len(classes) != len(self.folders):
            raise UserError(
                f"{root} has {len(self.folders)} class folders, but the list of labels names {len(classes)} classes; "
                f"{_odd_one_out(self.folders, classes)}"
            )
        self.files, labels = [], []
        for label, folder in enumerate(self.folders):
            found = sorted(
                path for path in (self.root / folder).rglob("*") if path.suffix.lower() in IMAGES
            )
            if not found:
                raise UserError(
                    f"{self.root / folder}: no images of this class; add them or remove folder and label"
                )
            self.files += found
            labels += [label] * len(found)
        if not self.files:
            raise UserError(f"{root}: no sub-folders with images, one per class")
        self.labels = torch.tensor(labels)

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
    if len(names & {folder.lower() for folder in folders}) < 0.5 * min(len(folders), len(names)):
        return "give the labels in alphabetical order of the folders"
    missing = sorted(names - {folder.lower() for folder in folders})
    extra = sorted(folder for folder in folders if folder.lower() not in names)
    lacks = f"no folder for {', '.join(missing)}" if missing else ""
    return "; ".join(filter(None, [lacks, f"no label for {', '.join(extra)}" if extra else ""]))


def named_list(path: str | Path, name: str) -> list:
    """The list under `name` in a JSON file such as labels.json or templates.json."""
    content = read_json(path, dict)
    if not isinstance(content.get(name), list):
        raise UserError(f"{path}: no list named {name!r}; it has {', '.join(content)}")
    return content[name]
