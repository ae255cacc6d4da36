"""The catalogue of zero-shot evaluation: where every data set lies, its metric, its class names and
its templates.

Entries, labels and templates of the user's own come as clip-rocket's and SLIP's
`dataset_catalog.json`, `labels.json` and `templates.json`; they stand before those of the project,
which are OpenAI's (dataset/prompts).
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.files import did_you_mean, read_json
from base.knobs import knob

PROMPTS = Path(__file__).parents[1] / "prompts"
KINDS = ("imagefolder", "torchvision", "either", "filelist", "webdataset", "voc", "retrieval")
OTHER_NAMES = {"special": "torchvision", "wds": "webdataset"}  # clip-rocket's, CLIP_benchmark's
METRICS = {  # Radford et al. 2021, table 9; of everything else top-1 accuracy
    "aircraft": "mean_per_class",
    "pets": "mean_per_class",
    "caltech101": "mean_per_class",
    "flowers": "mean_per_class",
    "hateful_memes": "roc_auc",
    "kinetics700_frames": "acc1_acc5",
    "voc2007": "map11",
}
KNOWN_METRICS = ("acc1", *dict.fromkeys(METRICS.values()))


@dataclass(frozen=True)
class Entry:
    """One data set.

    kind: imagefolder (`path`/`split`/class folders), torchvision (its own files below `path`),
    either (class folders where they are, else torchvision's), filelist (`path`/`split`_images.npy
    and _labels.npy), webdataset (a folder or URL as CLIP_benchmark publishes them), voc (`path` of
    VOCdevkit), retrieval (`path` of Karpathy's JSON, images below `images`).
    """

    name: str
    kind: str
    path: str
    split: str = "test"
    metric: str = "acc1"
    images: str = ""

    def below(self, root: str | Path) -> "Entry":
        """The same entry with its paths taken relative to `root`."""
        return replace(
            self,
            path=str(Path(root) / self.path),
            images=self.images and str(Path(root) / self.images),
        )


def _entry(
    name: str, kind: str = "imagefolder", split: str = "test", path: str = "", images: str = ""
) -> Entry:
    return Entry(name, kind, path or name, split, METRICS.get(name, "acc1"), images)


CATALOG = {
    entry.name: entry
    for entry in (
        _entry("imagenet", split="val"),
        _entry("mnist", "either"),
        _entry("food101", "either"),
        _entry("cifar10", "either"),
        _entry("cifar100", "either"),
        _entry("cub200", split="val"),
        _entry("sun397", "either"),
        _entry("cars", "either"),
        _entry("aircraft", "either"),
        _entry("dtd", "either"),
        _entry("pets", "either"),
        _entry("caltech101"),
        _entry("flowers", "either"),
        _entry("stl10", "either"),
        _entry("eurosat", "either"),
        _entry("resisc45"),
        _entry("gtsrb", "either"),
        _entry("kitti_distance", split="val"),
        _entry("country211", "either"),
        _entry("patch_camelyon", "either"),
        _entry("ucf101_frames", split="val"),
        _entry("clevr_counts", "filelist", split="val"),
        _entry("hateful_memes", split="dev"),
        _entry("rendered_sst2", "either"),
        _entry("fer2013"),
        _entry("kinetics700_frames", split="val_images"),
        _entry("birdsnap"),
        _entry("voc2007", "voc"),
        _entry(
            "flickr30k",
            "retrieval",
            path="flickr30k/dataset_flickr30k.json",
            images="flickr30k/flickr30k-images",
        ),
        _entry("coco", "retrieval", path="coco/dataset_coco.json", images="coco"),
    )
}


def read_catalog(path: str | Path) -> dict[str, Entry]:
    """Entries of a `dataset_catalog.json`: name -> {path, type, test}, further keys `metric` and
    `images` (retrieval).

    Relative paths start from the file's folder where they exist there, else from the working
    directory.
    """
    entries = {}
    for name, values in read_json(path, dict).items():
        missing = [
            key for key in ("path", "type") if not isinstance(values, dict) or key not in values
        ]
        if missing:
            raise UserError(
                f"{path}: entry {name!r} lacks {' and '.join(missing)}; it needs path, type and test"
            )
        for key in ("path", "test", "images"):
            if not isinstance(values.get(key, ""), str):
                raise UserError(f"{path}: {key} of entry {name!r} must be a text")
        kind = OTHER_NAMES.get(str(values["type"]), values["type"])
        if kind not in KINDS:
            known = ", ".join((*KINDS, *OTHER_NAMES))
            raise UserError(
                f"{path}: entry {name!r} is of type {kind!r}{did_you_mean(str(kind), KINDS) or '.'} Known: {known}"
            )
        if "test" not in values and kind in ("imagefolder", "either", "filelist"):
            raise UserError(f"{path}: entry {name!r} lacks test, the name of its test split")
        metric = values.get("metric", METRICS.get(name, "acc1"))
        if metric not in KNOWN_METRICS:
            raise UserError(
                f"{path}: entry {name!r} has metric {metric!r}; use one of {', '.join(KNOWN_METRICS)}"
            )
        entry = Entry(
            name,
            kind,
            values["path"],
            values.get("test", "test"),
            metric,
            values.get("images", ""),
        )
        here = Path(path).parent
        entries[name] = (
            entry.below(here) if "://" not in entry.path and (here / entry.path).exists() else entry
        )
    return entries


@dataclass
class CatalogOptions:
    """The data sets."""

    datasets: list[str] = knob([], "names of the catalogue or KIND:PATH; [] = all of it")
    catalog: Path | None = knob(None, "JSON: data set -> {path, type, test}")
    labels: Path | None = knob(None, "JSON: data set -> class names; added to ours")
    templates: Path | None = knob(None, "JSON: data set -> templates with {}")
    root: Path = knob(Path("datasets"), "folder that holds the catalogue's data sets")
    download: bool = knob(False, "let torchvision fetch the named data sets")
    split: str | None = knob(None, "split to evaluate instead of each data set's own")


def wanted_entries(options: CatalogOptions) -> list[Entry]:
    """The data sets that are named (see `choose`), else all of the user's catalogue (see
    `read_catalog`), else all of the project's; nothing is opened."""
    catalog = {name: entry.below(options.root) for name, entry in CATALOG.items()}
    own = read_catalog(options.catalog) if options.catalog else {}
    entries = choose(options.datasets or list(own or catalog), catalog | own)
    return [replace(entry, split=options.split or entry.split) for entry in entries]


def choose(names: Sequence[str], catalog: Mapping[str, Entry]) -> list[Entry]:
    """The entries named, in this order; `kind:path` names a data set outside the catalogue, such as
    `webdataset:https://...`, `retrieval:dataset_coco.json` or `imagefolder:photos` (its split
    `test`).
    """
    chosen = []
    for name in names:
        kind, colon, path = name.partition(":")
        kind = OTHER_NAMES.get(kind, kind)
        if name in catalog:
            chosen.append(catalog[name])
        elif colon and kind in KINDS and path:
            title = re.sub(r"(/tree/\w+|/resolve/\w+)?/*$", "", path).rpartition("/")[2]
            title = re.sub(r"\.(jsonl?|csv|tsv|parquet)(\?.*)?$", "", title)
            title = title.removeprefix("wds_").removeprefix("vtab-")
            chosen.append(Entry(title, kind, path, metric=METRICS.get(title, "acc1")))
        else:
            known = ", ".join(catalog)
            raise UserError(
                f"data set {name!r} is unknown{did_you_mean(name, catalog) or '.'} Known: {known}; or KIND:PATH"
            )
    double = {
        entry.name for entry in chosen if sum(entry.name == other.name for other in chosen) > 1
    }
    if double:
        raise UserError(
            f"data set {', '.join(sorted(double))} is named more than once; name each one once"
        )
    return chosen


class Prompts:
    """Class names (labels) and templates by data set: the user's own files before the project's."""

    def __init__(self, labels: str | Path | None = None, templates: str | Path | None = None):
        self.files = {"labels": labels, "templates": templates}
        self.tables = {kind: self._read(kind, file) for kind, file in self.files.items()}

    def _read(self, kind: str, file: str | Path | None) -> dict[str, list]:
        tables = read_json(PROMPTS / f"{kind}.json", dict)
        own = read_json(file, dict) if file else {}
        for name, values in own.items():
            nested = kind == "labels"
            fine = (
                isinstance(values, list)
                and values
                and all(_is_text(value, nested) for value in values)
            )
            if not fine:
                what = (
                    "class names (a class of several names: a list)" if nested else "texts with {}"
                )
                raise UserError(f"{file}: {name!r} must be a list of {what}, none of them blank")
        return tables | own

    def find(self, kind: str, name: str) -> list:
        """The labels or templates of a data set; UserError where no file has them."""
        if name not in self.tables[kind]:
            place = self.files[kind] or "dataset/prompts"
            raise UserError(
                f"{place} has no {kind} for {name!r}{did_you_mean(name, self.tables[kind]) or '.'} Add the entry {name!r} to a "
                f"file given with --{kind}, or leave the data set out of --datasets"
            )
        return self.tables[kind][name]

    def has(self, kind: str, name: str) -> bool:
        return name in self.tables[kind]


def _is_text(value: Any, nested: bool) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        nested
        and isinstance(value, list)
        and bool(value)
        and all(_is_text(v, False) for v in value)
    )


def in_order_of(own: Sequence[str], classes: Sequence, name: str) -> list:
    """The class names in the order of a data set's own ones (folders, files), by which its labels
    count.

    Where both are the same names, each goes to its own: exactly (NFC), else but for case, blanks
    and punctuation (`apple_pie`, `Apple pie`). Otherwise the list must be in order already, as the
    published ones are. UserError where it is seen not to be, where names that differ only in what
    is ignored leave the order open, and where the numbers differ.
    """
    if len(classes) != len(own):
        raise UserError(
            f"{name}: the data have {len(own)} classes ({', '.join(own[:6])} ...), but the list of labels names "
            f"{len(classes)}; give the list of these classes with --labels"
        )
    first = [str(each if isinstance(each, str) else each[0]) for each in classes]
    for form in (_exact, _plain):
        listed, wanted = [form(each) for each in first], [form(each) for each in own]
        if len(set(listed)) == len(listed) and set(listed) == set(wanted):
            places = {each: place for place, each in enumerate(listed)}
            return [classes[places[each]] for each in wanted]
    order = f"give the labels with --labels in the order {', '.join(own[:6])} ..."
    for place, each in enumerate(wanted):
        if each not in listed:
            continue
        if listed.count(each) > 1 or wanted.count(each) > 1:
            raise UserError(f"{name}: several classes are called like {own[place]!r}; {order}")
        if listed[place] != each:
            raise UserError(
                f"{name}: class {place} of the data is {own[place]!r}, but of the list of labels "
                f"{first[place]!r}; {order}"
            )
    return list(classes)


def _exact(name: str) -> str:
    """A name as Unicode composes it: macOS stores file names decomposed."""
    return unicodedata.normalize("NFC", str(name))


def _plain(name: str) -> str:
    """A name of any script without case, blanks and punctuation; signs that tell classes apart,
    such as those of C++ and C#, stay."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", str(name)).casefold())
    return "".join(
        char for char in folded if char in "#%&@*!?" or unicodedata.category(char)[0] in "LMNS"
    )


def folder_names(folders: Sequence[str]) -> list[str]:
    """Class names out of folder names: `001.Black_footed_Albatross` -> `Black footed Albatross`."""
    return [re.sub(r"^\d+\.", "", folder).replace("_", " ") for folder in folders]
