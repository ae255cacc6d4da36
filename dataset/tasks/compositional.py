"""Examples of which every caption has to go to its image: SugarCrepe and Winoground.

SugarCrepe (Hsieh et al. 2023): an image, its caption and a hard negative one. Winoground (Thrush et
al. 2022): two images and two captions of the same words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from base.errors import MissingData, UserError
from base.image_names import ImageKeys, existing
from base.reading import is_file, read_json, read_json_lines
from dataset.images.decode import decode_image
from dataset.images.formats import IMAGE_TYPES
from dataset.tasks.catalog import Entry
from dataset.tasks.multilingual import check_images


@dataclass
class CaptionChoices:
    """Examples of I images and C captions each; image i belongs to caption i.

    sources: all different image files. captions: all texts. example_images int64 [N,I] and
    example_captions int64 [N,C]: which of them an example has.
    """

    sources: list[Path]
    captions: list[str]
    example_images: torch.Tensor
    example_captions: torch.Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": decode_image(self.sources[index])}


class ViewedChoices:
    """What `EvalLoader` loads: the images as the network sees them, uint8 [3,H,W]."""

    def __init__(self, data: CaptionChoices, view: Callable[[torch.Tensor], torch.Tensor]):
        self.data = data
        self.view = view

    def load(self, index: int) -> torch.Tensor:
        return self.view(self.data[index]["image"])


def choices_of_file(path: Path, images: Path) -> CaptionChoices:
    """The examples of a file: Winoground's examples.jsonl (or its folder), else SugarCrepe's JSON.
    images: folder of the images; "." = the one that lies beside the file. UserError."""
    kind = "sugarcrepe" if path.suffix == ".json" else "winoground"
    root = "" if images == Path(".") else str(images)
    return open_choices(Entry(path.stem, kind, str(path), images=root))


def open_choices(entry: Entry) -> CaptionChoices:
    """The examples of a data set; UserError where images are missing."""
    read = winoground if entry.kind == "winoground" else sugar_crepe
    examples = read(entry)
    keys = ImageKeys()
    named = {keys(str(image)): image for images, _ in examples for image in images}
    numbers = {key: number for number, key in enumerate(named)}
    check_images(entry, list(named.values()))
    captions = [text for _, texts in examples for text in texts]
    shown = [[numbers[keys(str(image))] for image in images] for images, _ in examples]
    said = torch.arange(len(captions)).view(len(examples), -1)
    return CaptionChoices(list(named.values()), captions, torch.tensor(shown), said)


Examples = list[tuple[list[Path], list[str]]]


def sugar_crepe(entry: Entry) -> Examples:
    """{number: {filename, caption, negative_caption}}; images of COCO's val2017."""
    file = Path(entry.path)
    if not file.is_file():
        raise MissingData(
            f"{entry.name}: no file {file}; put SugarCrepe's JSON files there, or name one with "
            "--datasets sugarcrepe:FILE"
        )
    root = _image_root(entry, [file.parent / "val2017", file.parent.parent / "coco/val2017"])
    examples = []
    for number, row in read_json(file, dict).items():
        image, *texts = _texts(row, ("filename", "caption", "negative_caption"), file, number)
        examples.append(([root / image], texts))
    return _some(examples, file)


def winoground(entry: Entry) -> Examples:
    """examples.jsonl: {image_0, image_1, caption_0, caption_1}, images by name with or without
    ending; `path` is the file, or its folder."""
    path = Path(entry.path)
    places = (
        [path]
        if path.suffix == ".jsonl"
        else [path / "examples.jsonl", path / "data/examples.jsonl"]
    )
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise MissingData(
            f"{entry.name}: no file {places[0]}; put examples.jsonl of facebook/winoground there and "
            "unpack images.zip beside it"
        )
    root = _image_root(entry, [file.parent / "images"])
    fields = ("image_0", "image_1", "caption_0", "caption_1")
    examples = []
    for number, row in enumerate(read_json_lines(file)):
        first, second, *texts = _texts(row, fields, file, number)
        examples.append(([_with_ending(root / first), _with_ending(root / second)], texts))
    return _some(examples, file)


def _image_root(entry: Entry, places: Sequence[Path]) -> Path:
    if entry.images:
        return Path(entry.images)
    return next((place for place in places if place.is_dir()), places[0].parent)


def _with_ending(path: Path) -> Path:
    """The file itself, or the one of this name with an image's ending."""
    if is_file(existing(path)):
        return path
    endings = [*IMAGE_TYPES, *map(str.upper, IMAGE_TYPES)]
    found = (path.with_name(f"{path.name}.{ending}") for ending in endings)
    return next((file for file in found if is_file(existing(file))), path)


def _texts(row: object, fields: Sequence[str], file: Path, number: object) -> list[str]:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
        raise UserError(f"{file}: example {number} needs the texts {', '.join(fields)}; fix it")
    return [row[name] for name in fields]


def _some(examples: Examples, file: Path) -> Examples:
    if not examples:
        raise UserError(f"{file}: no examples; fetch the file again")
    return examples
