"""Statements to judge: SNLI-VE about one image, NLVR2 about two."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Subset

from base.distributed import say
from base.errors import BadSample, UserError
from base.text import is_blank
from dataset.images.decode import check_image_root, decode_image
from dataset.images.formats import is_image
from dataset.loading.stream import RecordSource
from dataset.sources.left_out import LeftOut
from dataset.sources.records import Records
from dataset.tasks.record import captions_of, image_of, weights_of
from dataset.text.wordpiece import choose_caption, pre_caption


class Format(NamedTuple):
    """One annotation format: which images and which label an entry names, and the classes in
    order."""

    field: str  # that names the images
    images: Callable[[dict], list[str]]
    label: Callable[[dict], int]
    classes: tuple[str, ...]
    undecided: str | None = None  # label of what the annotators do not agree on


def entailment_image(record: dict) -> list[str]:
    """SNLI-VE names an image by its stem."""
    name = record["image"]
    return [name if is_image(name) else f"{name}.jpg"]


def entailment_label(record: dict) -> int:
    """Contradiction, neutral or entailment, in any case."""
    return ENTAILMENT_CLASSES.index(str(record["label"]).strip().lower())


def image_pair(record: dict) -> list[str]:
    if len(record["images"]) != 2:
        raise ValueError(f"images lists {len(record['images'])}, but a pair has two")
    return record["images"]


def truth_label(record: dict) -> int:
    """True or False as text in any case, as JSON's value, or as 1 or 0."""
    return {"true": 1, "false": 0, "1": 1, "0": 0}[str(record["label"]).strip().lower()]


def exact_truth_label(record: dict) -> int:
    """As the originals read it: anything but the text "True" is false."""
    return int(record["label"] == "True")


ENTAILMENT_CLASSES = ("contradiction", "neutral", "entailment")
SNLI_VE = Format("image", entailment_image, entailment_label, ENTAILMENT_CLASSES, "-")
NLVR2 = Format("images", image_pair, truth_label, ("False", "True"))
ORIGINAL_NLVR2 = NLVR2._replace(label=exact_truth_label)


class Statements:
    """Samples of entries with `sentence`, `label` and images as `format` says, for training and for
    evaluation.

    Called with a record, or `load`ed by number: `image` uint8 [3,H,W] (two images: [2,3,H,W]),
    `text` str, `label` int. labels int64 [R]. Labels, numbers of images and image_root are checked
    at once: raises UserError. Entries without a label of the annotators (SNLI's "-") do not count,
    in training and evaluation.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        format: Format,
        image_root: str | Path,
        transform: Callable,
        max_words: int = 30,
    ):
        self.listed = listed = Records(paths, (format.field, "sentence", "label"))
        self.format = format
        self.image_root = Path(image_root)
        name = ", ".join(map(str, [paths] if isinstance(paths, str | Path) else paths))
        self.transform = transform
        self.max_words = max_words
        self.left_out = left_out = LeftOut(name)
        labels: list[int] = []
        kept: list[int] = []
        for number, record in enumerate(listed):
            left_out.total += 1
            if record["label"] == format.undecided:
                continue
            try:
                labels.append(_checked_label(format, record, name, number))
                kept.append(number)
            except BadSample as error:
                left_out.add(str(error))
        left_out.check()
        undecided = len(listed) - len(kept) - left_out.count
        if not kept:
            raise UserError(f"{name}: the label of every entry is {format.undecided!r}")
        if undecided:
            say(f"{name}: {undecided:,} of {len(listed):,} entries have no label and do not count")
        if left_out.count:
            say(f"{name}: {left_out.count:,} entries left out, such as {left_out.first[0]}")
        self.labels = torch.tensor(labels)
        self.records = records = listed if len(kept) == len(listed) else Subset(listed, kept)
        named = (image for record in records for image in format.images(record))
        check_image_root(image_root, named)

    def __len__(self) -> int:
        return len(self.records)

    def __call__(self, record: dict) -> dict:
        text = pre_caption(record["sentence"], self.max_words)
        if is_blank(text):
            raise BadSample(f"sentence {record['sentence'][:60]!r} is empty after cleaning")
        return self._sample(record, text)

    def source(self) -> RecordSource:
        """The statements as training data."""
        return RecordSource(self.records, self, "train_file")

    def complete(self) -> "Statements":
        """Itself, for an evaluation; UserError where unusable entries were left out."""
        self.listed.complete()
        if self.left_out.count:
            fault = self.left_out.first[0]
            raise UserError(f"{fault}; an evaluation needs every entry of its list")
        return self

    def load(self, index: int) -> dict:
        """Sample `index`, whose sentence may be empty after cleaning: evaluation leaves nothing
        out."""
        record = self.records[index]
        return self._sample(record, pre_caption(record["sentence"], self.max_words))

    def _sample(self, record: dict, text: str) -> dict:
        images = [self.transform(decode_image(file)) for file in self.files(record)]
        image = images[0] if len(images) == 1 else torch.stack(images)
        return {"image": image, "text": text, "label": self.format.label(record)}

    def files(self, record: dict) -> list[Path]:
        """Where the images lie."""
        return [self.image_root / name for name in self.format.images(record)]


def _checked_label(format: Format, record: dict, name: str, number: int) -> int:
    try:
        format.images(record)
        return format.label(record)
    except (KeyError, ValueError) as error:
        known = f"label {record['label']!r} is none of {', '.join(format.classes)}"
        fault = str(error) if "pair" in str(error) else known
        raise BadSample(
            f"{name}, entry {number} (the first is 0): {fault}; fix or remove the entry"
        ) from None


class CaptionPair:
    """Makes a sample of a record with `image` and `caption` (text or texts): `image` uint8
    [3,H,W], `text` str."""

    def __init__(self, transform: Callable, image_root: str | Path, max_words: int = 30):
        self.transform = transform
        self.image_root = Path(image_root)
        self.max_words = max_words

    def __call__(self, record: dict) -> dict:
        captions = captions_of(record)
        text = choose_caption(captions, self.max_words, weights_of(record, captions))
        return {
            "image": self.transform(image_of(record, self.image_root)),
            "text": text,
        }
