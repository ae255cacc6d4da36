"""Images with class labels: class folders, COYO-Labeled lists, shards, torchvision's data sets.

What a data string names is recognised by its form:

    imagenet/train                       a folder with one sub-folder of images a class, labels by alphabet
    imagenet/val                         or a flat one with a list of labels (dataset.sources.flat_folder)
    hub/data                             a folder of Parquet files, a saved data set, or a table
    labels.jsonl                         COYO-Labeled-300M's {url or image, labels, label_probs}, or {image, label};
                                         each label a class's number, or its name where these are known
    shards/{00000..00099}.tar, s3://...  WebDataset or TFRecord; labels in .json, .cls, or features
    torchvision/CIFAR10:test             a data set of torchvision by its class name, and a split

Labels stay lists of class ids with weights. They are never expanded to the number of classes.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from base import distributed
from base.caches import digest, file_state, states_digest
from base.errors import BadSample, UserError, brief, no_such_class
from base.knobs import knob
from base.names import did_you_mean
from base.reading import read_json, read_lines
from base.text import as_list, composed, lenient_text, whole_number
from dataset.images.decode import check_image_root
from dataset.images.formats import files_below, is_image
from dataset.loading.filtered import Filtered
from dataset.loading.stream import ENOUGH, RecordSource
from dataset.sources.class_folder import (
    ClassFolder,
    class_folders,
    class_list,
    folder_of,
    refuse_splits,
)
from dataset.sources.flat_folder import flat_folder, is_flat
from dataset.sources.hub import is_hub
from dataset.sources.records import Records
from dataset.sources.shard_columns import plain_name, split_columns
from dataset.sources.shard_index import ERROR_BUDGET, ShardIndex
from dataset.sources.shard_list import is_shard, list_shards, names_shards, shared_shards
from dataset.sources.shards import ShardSource
from dataset.sources.tables import (
    SAVED,
    TABLES,
    address_state,
    is_table,
    parquet_files,
    parse_address,
    usual_column,
)
from dataset.tasks.record import LABEL_FIELDS, image_of, is_nothing, labels_of
from dataset.tasks.torchvision_sets import TorchvisionRecords

SAMPLED = 10_000  # entries of a list by which the fraction with labels is estimated


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Labels."""

    label_threshold: float = knob(
        0.0, "probability below which a label is left out; images without any are, too", low=0
    )
    label_top: int | None = knob(
        None, "most labels of an image, the likeliest first; none = all", rare=True, low=1
    )
    soft_labels: bool = knob(False, "a label's target is its probability instead of 1", rare=True)
    normalize_label: bool = knob(False, "divide the targets of an image by their sum", rare=True)


class Labels:
    """The labels of a record: ids below `classes` and their weights.

    Reads `labels` (ids, with `label_probs` beside), `label` (one id), WebDataset's `cls`, from the
    record itself, from the features of a TFRecord example or from the `json` member of a tar. names:
    of the classes, by which labels that are no numbers are found.
    """

    def __init__(self, classes: int, options: LabelOptions, source: str, names: Sequence[str] = ()):
        self.classes = classes
        self.options = options
        self.source = source
        self.places: dict[str, int | None] = {}  # None: the name of several classes
        for place, name in enumerate(map(_class_key, names)):
            self.places[name] = None if name in self.places else place

    def __call__(self, record: dict) -> tuple[list[int], list[float]]:
        """Ids without repetition and weights, both empty where the threshold left none out of
        several.

        Raises BadSample where the record has no label, UserError for a class that does not exist.
        """
        field, values = labels_of(record)
        if field is None:
            raise BadSample(
                f"{self._name(record)}: no label ({', '.join(LABEL_FIELDS)}, or .json with one of them)"
            )
        given = as_list(values[field])
        chances = self._chances(values.get("label_probs"), len(given), record)
        filled = [number for number, label in enumerate(given) if not is_nothing(label)]
        ids = self._ids([given[number] for number in filled], record)
        chances = [chances[number] for number in filled]  # null among labels is none
        options = self.options
        kept = {}
        for chance, label in sorted(zip(chances, ids, strict=True), key=lambda pair: -pair[0]):
            if chance >= options.label_threshold and len(kept) < (options.label_top or len(ids)):
                kept.setdefault(label, float(chance) if options.soft_labels else 1.0)
        weights = list(kept.values())
        if options.normalize_label and weights:
            weights = [weight / sum(weights) for weight in weights]
        return list(kept), weights

    def _chances(self, value: object, count: int, record: dict) -> list[float]:
        """The probability of each label; 1 where the record gives none."""
        if value is None:
            return [1.0] * count
        given = as_list(value)
        if not all(isinstance(p, int | float) and 0 <= p < math.inf for p in given):
            raise UserError(
                f"{self._name(record)}: label_probs {brief(value)} are no probabilities"
            )
        if len(given) != count:
            raise UserError(
                f"{self._name(record)}: {count} labels with {len(given)} label_probs; fix the entry"
            )
        return [float(p) for p in given]

    def _ids(self, given: Sequence[object], record: dict) -> list[int]:
        """The class numbers that labels are: whole numbers, such a number as text, or the names of
        classes."""
        ids = []
        for label in given:
            number = whole_number(label)
            ids.append(self._place(label, record) if number is None else number)
        for label in ids:
            if not 0 <= label < self.classes:
                raise no_such_class(self._name(record), label, self.classes)
        return ids

    def _place(self, label: object, record: dict) -> int:
        """The number of the class that a label names."""
        name = _class_key(lenient_text(label) if isinstance(label, bytes) else str(label))
        place = self.places.get(name)
        if place is not None:
            return place
        wrong = f"{self._name(record)}: label {brief(label)} is no class number"
        if name in self.places:
            raise UserError(f"{wrong}, and the name of several classes; give the number")
        if self.places:
            hint = did_you_mean(name, self.places) or "; give the right --classes, or fix the label"
            raise UserError(f"{wrong}, and no name of a class{hint}")
        raise UserError(f"{wrong}; name the classes by --classes FILE, one a line")

    def _name(self, record: dict) -> str:
        return str(record.get("key") or f"{self.source}, entry {record.get('index', '?')}")


def _class_key(name: str) -> str:
    """What a class is known by: its WordNet id, or its name as Unicode composes it."""
    return composed(folder_of(name.strip()))


# ---- collections


class FolderRecords(Sequence):
    """The images of class folders, or of a flat folder with its list, as records {image, label}, in a few bytes each.

    gaps: classes may have no images."""

    def __init__(self, root: str | Path, classes: Sequence[str] = (), gaps: bool = False):
        root = Path(root)
        if is_flat(root):  # ImageNet's validation set as published: one folder and a list
            found = flat_folder(root, classes)
            self.classes, self.labels = found.classes, found.labels
        else:
            found = ClassFolder(root, None, known=classes, gaps=gaps)
            self.classes = found.folders
            self.labels = _labels_of(root, found.folders, classes)[found.labels]
        self.root = root.absolute()
        # bytes: names of files need not be UTF-8
        self.files = np.array([os.fsencode(path.relative_to(root)) for path in found.files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.file(index), "label": int(self.labels[index])}

    def file(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.root / os.fsdecode(self.files[index])


def _labels_of(root: Path, folders: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The class of each folder, int64: its place among `classes`, where these are named."""
    names = [_class_key(name) for name in classes or folders]
    place = {name: number for number, name in enumerate(names)}
    folders = [composed(name) for name in folders]
    counts = Counter(names)
    if twice := [name for name in folders if counts[name] > 1]:
        raise UserError(f"{root}: {twice[0]!r} is the name of several classes; name each once")
    if unknown := [name for name in folders if name not in place]:
        hint = did_you_mean(unknown[0], place)
        hint += "; --classes FILE names others, --classes none takes those of the folders"
        raise UserError(f"{root / unknown[0]}: not among the {len(place)} classes{hint}")
    return torch.tensor([place[name] for name in folders])


def is_shards(data: str) -> bool:
    """Whether a data string names WebDataset or TFRecord shards. A folder does where it holds some,
    or where in its sub-folders a shard comes before an image."""
    data = plain_name(data)
    if not Path(data).is_dir():
        if is_hub(data):
            return False
        return "://" in data or names_shards(data)
    if any(is_shard(path.name) for path in Path(data).iterdir()):
        return True
    telling = (path for path in files_below(data) if is_shard(path.name) or is_image(path))
    first = next(telling, None)  # no more of the tree is looked through
    return first is not None and is_shard(first.name)


def is_list(data: str) -> bool:
    """Whether a data string names a list of images with labels: JSON, a table, a folder of Parquet
    files or a saved data set. UserError."""
    path = parse_address(data).path
    is_file = path.suffix.lower() in (".json", ".jsonl", *TABLES)
    return is_file or (path / SAVED).is_file() or bool(path.is_dir() and parquet_files(path))


def open_records(
    data: str, root: Path, split: str, classes: Sequence[str] = (), download: bool = False
) -> Sequence:
    """The records that a data string names, shards excepted. split: of torchvision's sets without
    one in their name."""
    if data.startswith("torchvision/"):
        name, _, named = data.removeprefix("torchvision/").partition(":")
        return TorchvisionRecords(name, root, split, download, named)
    if is_list(data):
        records = Records(data, _fields_of(data))
        check_image_root(
            root, (str(record.get("image") or record.get("url")) for record in records)
        )
        return records
    if Path(data).is_dir():
        return FolderRecords(data, classes)
    raise UserError(
        f"{data}: neither a folder of class folders, nor a .json, .jsonl, .csv, .tsv or .parquet file, shards (.tar, .tfrecord) or "
        "torchvision/NAME; check the path"
    )


def _fields_of(data: str) -> Sequence[str]:
    """The fields that a list of labelled images must have; COYO-Labeled's images are in `url`."""
    names = list(Records(data, ())[0])
    if "label" in names:
        return "image", "label"
    has_image = is_table(data) and usual_column("image", names)
    return ("image", "labels") if has_image else ("labels",)


# ---- samples, batches


class LabelledImage:
    """Makes a sample of a record: `image` as the view makes it, `labels` and `label_weights`.
    Raises BadSample."""

    def __init__(self, view, labels: Labels, root: Path):
        self.view = view
        self.labels = labels
        self.root = root

    def __call__(self, record: dict) -> dict:
        labels, weights = self.labels(record)
        return {
            "image": self.view(image_of(record, self.root)),
            "labels": labels,
            "label_weights": weights,
        }


class LabelCollate:
    """image [B,3,S,S] as the samples have it · labels int64 and label_weights float32 [B,K], padded
    with weight 0.

    K is 1 where every sample has one label, otherwise a multiple of 4, so that a compiled network
    sees few lengths.
    """

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        most = max(len(sample["labels"]) for sample in samples)
        length = 1 if most <= 1 else 4 * math.ceil(most / 4)
        labels = torch.zeros(len(samples), length, dtype=torch.int64)
        weights = torch.zeros(len(samples), length)
        for row, sample in enumerate(samples):
            labels[row, : len(sample["labels"])] = torch.tensor(sample["labels"], dtype=torch.int64)
            weights[row, : len(sample["labels"])] = torch.tensor(sample["label_weights"])
        image = default_collate([sample["image"] for sample in samples])
        return {"image": image, "labels": labels, "label_weights": weights}


class Labelled(Filtered):
    """A source of the stream without the records that a threshold leaves no label: they are not
    bad samples, and an epoch of a list does not count them (of a long list by SAMPLED entries)."""

    def __init__(self, source: RecordSource | ShardSource, labels: Labels):
        self.labels = labels
        threshold = labels.options.label_threshold
        complaint = f"no image has a label of probability {threshold} or more; lower it"
        super().__init__(source, self.has_label, complaint)
        if isinstance(source, RecordSource):
            step = max(1, len(source) // SAMPLED)
            some = [source.records[index] for index in range(0, len(source), step)]
            kept = sum(map(self.has_label, some))
            if not kept and step == 1:
                raise UserError(f"{self.name}: {complaint}")
            self.kept = max(kept, 1) / len(some)

    def has_label(self, record: dict) -> bool:
        """Whether a label is left; a record that has none is for the stream to count."""
        try:
            return bool(self.labels(record)[0])
        except BadSample:
            return True


def training_source(
    data: str, view, labels: Labels, classes: Sequence[str], knobs, samples: int | None = None
) -> RecordSource | ShardSource | Labelled:
    """The endless stream's source of what a data string names (see dataset.loading.stream). A
    collective: the first process looks through shards and class folders for all.

    knobs: has data_root, download, shuffle_buffer. samples: of shards, where they are known.
    """
    build = LabelledImage(view, labels, knobs.data_root)
    if is_shards(data):
        shards = shared_shards(data, samples)
        source = ShardSource(shards, build, shuffle_buffer=knobs.shuffle_buffer)
    else:
        records = shared_records(data, knobs.data_root, "train", classes, knobs.download)
        _check_first(records, labels)
        source = RecordSource(records, build, data)
    return Labelled(source, labels) if labels.options.label_threshold > 0 else source


def _check_first(records: Sequence, labels: Labels) -> None:
    """UserError where the labels of a list's first entries are none of the classes: a fault of the
    whole list shows before the training."""
    if isinstance(records, Records):
        for index in range(min(ENOUGH, len(records))):
            with suppress(BadSample):  # of this entry alone: its reader counts it
                labels(records[index] | {"index": index})


def shared_records(
    data: str,
    root: Path,
    split: str,
    classes: Sequence[str] = (),
    download: bool = False,
    error_budget: float = ERROR_BUDGET,
) -> Sequence:
    """What a data string names, for all processes: a collective. The first process walks class
    folders for the others, and makes the caches that they read. error_budget: see ShardIndex."""
    if is_shards(data):
        with distributed.rank_0_first():
            return ShardIndex(list_shards(data), data, error_budget).nonempty()
    opened = partial(open_records, data, root, split, classes, download)
    if Path(data).is_dir() and not data.startswith("torchvision/"):
        return distributed.on_main(opened, patient=True)
    with distributed.rank_0_first():
        return opened()


def shared_split(
    data: str, view, labels: Labels, classes: Sequence[str], knobs, split: str = "test"
) -> "Split":
    """`Split` for all processes: a collective. knobs: has data_root, download, error_budget."""
    root, download = knobs.data_root, knobs.download
    records = shared_records(data, root, split, classes, download, knobs.error_budget)
    return Split(data, root, view, labels, classes, download, split, records)


class Split:
    """All records that a data string names, for evaluation: `load(i)` for i below the length.

    split: of torchvision's data sets, where their string names none. records: what it names, where
    it is open already.
    """

    def __init__(
        self,
        data,
        root: Path,
        view,
        labels: Labels,
        classes=(),
        download=False,
        split: str = "test",
        records: Sequence | None = None,
    ):
        self.data = data
        if records is None and is_shards(data):
            records = ShardIndex(list_shards(data), data).nonempty()
        elif records is None:
            records = open_records(data, root, split, classes, download)
        if isinstance(records, Records):
            records.complete()
        _check_first(records, labels)
        self.records = records
        self.classes = classes
        self.build = LabelledImage(view, labels, root)

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> dict:
        """Sample `index`. Raises BadSample."""
        return self.build({**self.records[index], "index": index})

    def image(self, index: int) -> Tensor:
        """uint8 [3,H,W] of image `index` as it is stored. Raises BadSample."""
        return image_of(self.records[index], self.build.root)

    @property
    def file_names(self) -> list[str]:
        """Names of the image files, in order. Raises UserError where the images are no files."""
        if not isinstance(self.records, FolderRecords | Records):
            raise UserError(
                f"{self.data}: its images have no file names, by which --real knows them; use class folders"
            )
        return [str(record.get("image") or record.get("url")) for record in self.records]


def identity(
    records: Sequence, data: str, root: str | Path = ".", classes: Sequence[str] = ()
) -> str:
    """A digest that changes with the images and labels of a data string, without reading images:
    names, labels, sizes and times of change of all files, and the members of shards that `data`
    names. root: folder that a list's paths start from; classes: names that its labels may have."""
    if isinstance(records, FolderRecords):
        names = records.files.tobytes(), records.labels.numpy().tobytes()
        return digest(
            str(records.root), names, states_digest(map(records.file, range(len(records))))
        )
    if isinstance(records, TorchvisionRecords):
        return digest(repr(records.data), len(records), records.content())
    if isinstance(records, Records):
        images = (record.get("image") or record.get("url") for record in records)
        paths = (Path(root) / image for image in images if isinstance(image, str))
        return digest(data, address_state(data), len(records), states_digest(paths), *classes)
    named = {columns for _, columns in map(split_columns, records.names) if columns}
    shards = [file_state(file) for file in records.files]
    return digest(shards, len(records), *sorted(named), *classes)


def class_names(
    data: Sequence[str], file: Path | None, root: Path, download: bool = False
) -> list[str]:
    """Names of the classes: the lines of `file`, else those of the first class folders or
    torchvision set; [] where none tells. Raises UserError for a missing file. Data that are not on
    this machine tell nothing: an evaluation does without the training data of its recipe.
    """
    if file is not None:
        return read_class_names(file)
    for each in data:
        if Path(each).is_dir() and not (is_shards(each) or is_list(each)):
            if is_flat(Path(each)):
                return flat_folder(Path(each)).classes
            folders = class_folders(Path(each))
            refuse_splits(Path(each), folders)
            return folders
        if each.startswith("torchvision/"):
            with suppress(UserError):
                return list(open_records(each, root, "train", download=download).classes)
    return []


def read_class_names(file: Path) -> list[str]:
    """Names of the classes, one a line (see `class_list`), or of a JSON list. UserError where there
    are none."""
    remedy = "name a text file with the name of one class a line, or a JSON list of names"
    if file.suffix.lower() == ".json":
        lines = [str(name) for name in read_json(file, list, remedy)]
    else:
        lines = read_lines(file, remedy)
    names = class_list(lines, f"--classes {file}")
    if not names:
        raise UserError(f"--classes {file}: holds no names; {remedy}")
    return names
