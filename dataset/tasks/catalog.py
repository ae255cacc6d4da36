"""The catalogue of zero-shot evaluation: where every data set lies, its metric, its class names and
its templates.

Entries, labels and templates of the user's own come as clip-rocket's and SLIP's
`dataset_catalog.json`, `labels.json` and `templates.json`; they stand before those of the project,
which are OpenAI's (dataset/prompts).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base.distributed import say
from base.errors import UserError
from base.knobs import knob
from base.names import SHARD_ENDING, did_you_mean
from base.reading import read_json
from base.text import as_list, composed, is_blank
from dataset.tasks.published import (
    CLIP_BENCHMARK,
    COLLECTIONS,
    SUGAR_CREPE,
    benchmark_name,
    of_shard_folder,
    shard_folder,
)

PROMPTS = Path(__file__).parents[1] / "prompts"
PAIRS = ("sugarcrepe", "winoground")  # choices among captions and images of one example
LANGUAGES = ("xtd", "crossmodal")  # captions in several languages
KINDS = (
    *("imagefolder", "torchvision", "either", "filelist", "webdataset", "voc", "imagenet"),
    *("objectnet", "babel", "retrieval", *LANGUAGES, *PAIRS),
)
IMAGENET_PARTS = ("imagenet-a", "imagenet-r", "imagenet-o")  # each with 200 of its classes
HUB = "https://huggingface.co/datasets/clip-benchmark"
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
    VOCdevkit), imagenet (class folders called by WordNet id or by number, below `path`/`split` or
    `path`), objectnet (its archive), retrieval (`path` of Karpathy's JSON or of any list that
    trains, images below `images`), xtd and crossmodal (captions in several languages, see
    `dataset.tasks.multilingual`), babel (Babel-ImageNet's two files below `path`, ImageNet below
    `images`), sugarcrepe and winoground (see `dataset.tasks.compositional`).

    language: of its captions, and of the class names and templates to use.
    """

    name: str
    kind: str
    path: str
    split: str = "test"
    metric: str = "acc1"
    images: str = ""
    language: str = "en"

    @property
    def prompts(self) -> str:
        """The data set whose labels and templates count."""
        if self.kind in ("imagenet", "objectnet"):
            return "imagenet"
        own = self.name.removesuffix(f"/{self.language}").removeprefix("wds/")
        return CLIP_BENCHMARK.get(own) or own

    @property
    def published(self) -> str:
        """What CLIP_benchmark calls the data set."""
        return benchmark_name(self.name.removesuffix(f"/{self.language}"))

    def with_images(self, folder: str) -> "Entry":
        """The same entry with its images below `folder`, if it is a list that names no other."""
        return (
            replace(self, images=folder) if self.kind == "retrieval" and not self.images else self
        )

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
        *(_entry(name, "either") for name in ("mnist", "food101", "cifar10", "cifar100")),
        _entry("cub200", split="val"),
        *(_entry(name, "either") for name in ("sun397", "cars", "aircraft", "dtd", "pets")),
        _entry("caltech101"),
        *(_entry(name, "either") for name in ("flowers", "stl10", "eurosat")),
        _entry("resisc45"),
        _entry("gtsrb", "either"),
        _entry("kitti_distance", split="val"),
        *(_entry(name, "either") for name in ("country211", "patch_camelyon")),
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
        *(_entry(name, "imagenet") for name in ("imagenetv2", *IMAGENET_PARTS, "imagenet_sketch")),
        _entry("objectnet", "objectnet"),
        _entry("xtd10", "xtd"),
        _entry("multilingual_mscoco_captions", "xtd", path="multilingual_mscoco"),
        _entry("xtd200", "xtd"),
        _entry("flickr30k-200", "xtd"),
        _entry("crossmodal3600", "crossmodal", path="xm3600"),
        _entry("babel_imagenet", "babel", split="val", images="imagenet"),
        _entry("winoground", "winoground"),
        *(_entry(name, "sugarcrepe", path=f"{name}.json") for name in SUGAR_CREPE),
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

    datasets: list[str] = knob([], "names, CLIP_benchmark's too, or KIND:PATH; [] = all in root")
    catalog: Path | None = knob(None, "JSON: data set -> {path, type, test}")
    labels: Path | None = knob(None, "JSON: data set -> class names; added to ours")
    templates: Path | None = knob(None, "JSON: data set -> templates with {}")
    language: list[str] = knob(["en"], "of captions and class names, one or several")
    root: Path = knob(Path("datasets"), "folder that holds the catalogue's data sets")
    image_root: str = knob("", "folder of the images of retrieval:FILE [the folder of FILE]")
    download: bool = knob(False, "let torchvision fetch the named data sets")
    split: str | None = knob(None, "split to evaluate instead of each data set's own; . = none")


def wanted_entries(options: CatalogOptions) -> list[Entry]:
    """The data sets that are named (see `choose`), else all of the user's catalogue (see
    `read_catalog`), else all of the project's and every folder `wds_...` in the root; in every
    language asked for. Nothing is opened."""
    catalog = {name: entry.below(options.root) for name, entry in CATALOG.items()}
    own = read_catalog(options.catalog) if options.catalog else {}
    named = options.datasets or list(own or [*catalog, *shards_below(options.root)])
    entries = choose(named, catalog | own, options.root, options.download)
    entries = in_languages(entries, options.language)
    if options.image_root:
        entries = [entry.with_images(options.image_root) for entry in entries]
    if options.split is not None:  # an empty one is the folder itself
        entries = [replace(entry, split=options.split) for entry in entries]
    return entries


def shards_below(root: Path) -> list[str]:
    """`wds/NAME` of every folder of CLIP_benchmark's shards in the root."""
    folders = sorted(path.name for path in root.glob("wds_*") if path.is_dir())
    return [f"wds/{of_shard_folder(folder)}" for folder in folders]


def in_languages(entries: Sequence[Entry], languages: Sequence[str]) -> list[Entry]:
    """The entries in every language, called NAME/LANGUAGE where there are several languages.

    `{language}` in the path of a retrieval file is replaced. Captions in one language alone are
    listed once.
    """
    if len(set(languages)) < max(1, len(languages)):
        raise UserError("--language names a language twice, or none; name each one once")
    found = []
    for entry in entries:
        once = entry.kind in ("retrieval", *PAIRS) and "{language}" not in entry.path
        for language in languages[:1] if once else languages:
            name = entry.name if once or len(languages) == 1 else f"{entry.name}/{language}"
            path = entry.path.replace("{language}", language)
            found.append(replace(entry, name=name, path=path, language=language))
    return found


def of_benchmark(
    name: str, catalog: Mapping[str, Entry], root: str | Path, download: bool
) -> Entry | None:
    """A data set by CLIP_benchmark's name: its shards below the root, else the catalogue's entry of
    the same images, else its shards on the hub, if `download`. None for other names.

    `wds/NAME` always means the shards.
    """
    known = name.removeprefix("wds/")
    folder = Path(root) / shard_folder(known)
    if known not in CLIP_BENCHMARK and not (name.startswith("wds/") and folder.is_dir()):
        return None
    own = CLIP_BENCHMARK.get(known, "")
    if own in catalog and not folder.is_dir() and not name.startswith("wds/"):
        return catalog[own]
    path = f"{HUB}/{folder.name}" if download and not folder.is_dir() else str(folder)
    return Entry(f"wds/{known}", "webdataset", path, metric=METRICS.get(own, "acc1"))


def choose(
    names: Sequence[str],
    catalog: Mapping[str, Entry],
    root: str | Path = ".",
    download: bool = False,
) -> list[Entry]:
    """The entries named, in this order; `kind:path` names a data set outside the catalogue, such as
    `webdataset:https://...`, `retrieval:dataset_coco.json` or `imagefolder:photos` (its split
    `test`). Names and collections (`vtab+`) of CLIP_benchmark are known, see `of_benchmark`.
    """
    chosen: list[Entry] = []
    for name in names:
        kind, colon, path = name.partition(":")
        kind = OTHER_NAMES.get(kind, kind)
        if name in COLLECTIONS and name not in catalog:
            for part in COLLECTIONS[name]:
                entry = of_benchmark(part, catalog, root, download) or catalog[part]
                chosen.append(entry)
        elif name in catalog:
            chosen.append(catalog[name])
        elif colon and kind in KINDS and path:
            title = re.split(r"\?\w+=", path)[0]  # columns may have slashes: captions/text
            title = re.sub(r"(/tree/\w+|/resolve/\w+)?/*$", "", title).rpartition("/")[2]
            title = re.sub(r"\.(jsonl?|csv|tsv|parquet|txt)(\?.*)?$", "", title)
            title = re.sub(rf"([{{*].*)?{SHARD_ENDING}\b.*$", "", title, flags=re.IGNORECASE)
            title = title.removeprefix("wds_").removeprefix("vtab-")
            title = re.sub(r"[-_.]?\{language\}[-_.]?", "", title) or "captions"
            chosen.append(Entry(title, kind, path, metric=METRICS.get(title, "acc1")))
        elif entry := of_benchmark(name, catalog, root, download):
            chosen.append(entry)
        else:
            published = [f"wds/{known}" for known in CLIP_BENCHMARK] + [*CLIP_BENCHMARK]
            hint = did_you_mean(name, [*catalog, *COLLECTIONS, *published])
            known = ", ".join([*catalog, *COLLECTIONS])
            raise UserError(
                f"data set {name!r} is unknown{hint or '.'} Known: {known}, and CLIP_benchmark's "
                "names; or KIND:PATH"
            )
    named = Counter(entry.name for entry in chosen)
    double = [name for name, count in named.items() if count > 1]
    if double:
        raise UserError(
            f"data set {', '.join(sorted(double))} is named more than once; name each one once"
        )
    return chosen


class Prompts:
    """Class names (labels) and templates by data set: the user's own files before the project's,
    which are English.

    A file holds {data set: list}, or {language: {data set: list}}; `{language}` in its name stands
    for the language. CLIP_benchmark's files serve: `{c}` in templates is `{}`, imagenet1k imagenet.
    """

    def __init__(
        self,
        labels: str | Path | None = None,
        templates: str | Path | None = None,
        languages: Sequence[str] = ("en",),
    ):
        self.files = {"labels": labels, "templates": templates}
        self.tables = {}
        for kind, file in self.files.items():
            for language in languages:
                several = len(languages) > 1
                self.tables[kind, language] = self._read(kind, file, language, several)

    def _read(
        self, kind: str, file: str | Path | None, language: str, several: bool
    ) -> dict[str, list]:
        tables = read_json(PROMPTS / f"{kind}.json", dict) if language == "en" else {}
        for name, values in _of_language(file, language, several).items():
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
            own = "imagenet" if name == "imagenet1k" else name
            tables[own] = values if nested else [text.replace("{c}", "{}") for text in values]
        return tables

    def find(self, kind: str, name: str, language: str = "en") -> list:
        """The labels or templates of a data set; UserError where no file has them."""
        table = self.tables[kind, language]
        if name not in table:
            place = self.files[kind] or "dataset/prompts"
            of_language = "" if language == "en" else f" in {language!r}"
            raise UserError(
                f"{place} has no {kind} for {name!r}{of_language}{did_you_mean(name, table) or '.'} Add the entry {name!r} to a "
                f"file given with --{kind}, or leave the data set out of --datasets"
            )
        return table[name]

    def has(self, kind: str, name: str, language: str = "en") -> bool:
        return name in self.tables[kind, language]


def _of_language(file: str | Path | None, language: str, several: bool) -> dict:
    """The content of a file of class names or templates in one language."""
    if not file:
        return {}
    path = str(file).replace("{language}", language)
    if path != str(file) and not Path(path).is_file():
        raise UserError(f"{path}: no such file, so there is nothing in {language!r}; leave it out")
    content = read_json(path, dict)
    if content and all(isinstance(values, dict) for values in content.values()):
        if language not in content:
            raise UserError(
                f"{path}: no language {language!r}{did_you_mean(language, content)}; it has "
                f"{', '.join(content)}"
            )
        return content[language]
    if several and path == str(file):
        raise UserError(
            f"{path}: one list of names, but --language asks for several languages; give "
            "{language: {data set: list}}, or a file each, called {language}_classnames.json"
        )
    return content


def _is_text(value: Any, nested: bool) -> bool:
    if isinstance(value, str):
        return not is_blank(value)
    return (
        nested
        and isinstance(value, list)
        and bool(value)
        and all(_is_text(v, False) for v in value)
    )


def class_prompts(
    classes: Sequence[str | Sequence[str]], templates: Sequence[str], name: str = ""
) -> list[list[str]]:
    """For every class all templates filled with its name; a class of several names gets every
    template with each."""
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"template {template!r} of {name or 'the templates'} has no {{}} for the class name; add it"
            )
    if not templates or not classes:
        raise UserError(
            f"{name or 'zero-shot classification'}: needs class names and at least one template"
        )
    names = [as_list(each) for each in classes]
    return [
        [template.replace("{}", one) for template in templates for one in each] for each in names
    ]


def in_order_of(own: Sequence[str], classes: Sequence, name: str) -> list:
    """The class names in the order of a data set's own ones (folders, files), by which its labels
    count.

    Where both are the same names, each goes to its own: exactly (NFC), else but for case, blanks
    and punctuation (`apple_pie`, `Apple pie`); of a class with several names the first counts, else
    any. Otherwise the list must be in order already, as the published ones are. UserError where it
    is seen not to be, where names that differ only in what is ignored leave the order open, and
    where the numbers differ.
    """
    if len(classes) != len(own):
        raise UserError(
            f"{name}: the data have {len(own)} classes ({', '.join(own[:6])} ...), but the list of labels names "
            f"{len(classes)}; give the list of these classes with --labels"
        )
    names = [[str(one) for one in as_list(each)] for each in classes]
    # name -> numbers of classes: by the first name exactly, or all but exactly; by any name likewise
    tables: list[dict[str, list[int]]] = [{}, {}, {}, {}]
    for number, given in enumerate(names):
        exact = [composed(each) for each in given]
        plain = [_plain(each) for each in given]
        for table, keys in zip(tables, (exact[:1], plain[:1], exact, plain), strict=True):
            for key in dict.fromkeys(keys):
                table.setdefault(key, []).append(number)
    exact = [composed(each) for each in own]
    plain = [_plain(each) for each in own]
    for table, wanted in zip(tables, (exact, plain, exact, plain), strict=True):
        places = [table[each][0] for each in wanted if len(table.get(each, ())) == 1]
        if sorted(places) == list(range(len(own))):
            return [classes[place] for place in places]
    first, owners = tables[1], tables[3]
    counts = Counter(plain)
    order = f"give the labels with --labels in the order {', '.join(own[:6])} ..."
    for place, each in enumerate(plain):
        if each not in owners:
            continue
        if len(first.get(each, ())) > 1 or counts[each] > 1:
            raise UserError(f"{name}: several classes are called like {own[place]!r}; {order}")
        if place not in owners[each]:
            raise UserError(
                f"{name}: class {place} of the data is {own[place]!r}, but of the list of labels "
                f"{names[place][0]!r}; {order}"
            )
    return list(classes)


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


def named_list(path: str | Path, name: str) -> list:
    """The list under `name` in a JSON file such as labels.json or templates.json; OpenAI's file of
    that name serves where the working directory has none."""
    ours = PROMPTS / path
    if not Path(path).exists() and ours.exists():
        say(f"note: {path} is not here: {name!r} of OpenAI's, dataset/prompts/{path}")
        path = ours
    content = read_json(path, dict)
    if not isinstance(content.get(name), list):
        raise UserError(f"{path}: no list named {name!r}; it has {', '.join(content)}")
    return content[name]
