"""Images of the data sets of zero-shot evaluation, whatever they come in: `images[i]` is a dict of
one image.

`image` is uint8 [3,H,W]; `target`, for classification, the class, or int64 [C] where several may be
shown (1 shown, 0 not, -1 not to be counted). `classes`: the set's own class names in the order of
the labels, none where it has none.
Everything is opened and counted before the first image is asked for; unreadable images raise
BadSample.
"""

import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from base.caches import digest
from base.distributed import rank, rank_0_first, say
from base.errors import BadSample, MissingData, UserError, brief
from base.limits import SHARDS
from base.names import matching_files
from base.reading import read_lines
from base.text import as_list, lenient_text, lines_in, whole_number
from dataset.images.decode import decode_image
from dataset.sources.class_folder import ClassFolder, LabelledFiles
from dataset.sources.class_folder import class_folders as folders_in
from dataset.sources.flat_folder import flat_folder
from dataset.sources.remote import local_copy, read_text
from dataset.sources.shard_index import ERROR_BUDGET, ShardIndex
from dataset.sources.shard_list import list_shards
from dataset.tasks import record
from dataset.tasks.caption_lists import retrieval_list
from dataset.tasks.catalog import (
    CATALOG,
    LANGUAGES,
    PAIRS,
    Entry,
    Prompts,
    class_prompts,
    folder_names,
    in_order_of,
)
from dataset.tasks.classification import is_shards
from dataset.tasks.compositional import open_choices
from dataset.tasks.imagenet_folders import babel_imagenet, imagenet_folders, object_net
from dataset.tasks.multilingual import check_images, crossmodal, xtd
from dataset.tasks.torchvision_sets import class_names_of, sample_of, split_options, torchvision_set

Image = dict[str, torch.Tensor]
AGAIN = "fetch the shard again"
PLAIN_TEMPLATE = "a photo of a {}."
SPLITS = ("val", "validation", "train")  # of class folders without a split of the name asked for


TORCHVISION = {  # data set -> torchvision's class; EuroSAT and SUN397 come without splits, whole
    **{"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"},
    **{"food101": "Food101", "sun397": "SUN397", "cars": "StanfordCars", "dtd": "DTD"},
    **{"aircraft": "FGVCAircraft", "pets": "OxfordIIITPet", "flowers": "Flowers102"},
    **{"eurosat": "EuroSAT", "gtsrb": "GTSRB", "country211": "Country211"},
    **{"patch_camelyon": "PCAM", "rendered_sst2": "RenderedSST2"},
}


class Viewed:
    """What `EvalLoader` loads: the images as the network sees them."""

    def __init__(self, images, view: Callable[[torch.Tensor], torch.Tensor]):
        self.images = images
        self.view = view

    def load(self, index: int) -> Image:
        sample = self.images[index]
        return sample | {"image": self.view(sample["image"])}


@dataclass
class OpenSet:
    """A data set, open and checked. classes: a name or several each, in the order of the labels;
    none for retrieval and for choices among captions."""

    entry: Entry
    images: Any
    classes: list = field(default_factory=list)
    templates: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.prompts: list[list[str]] = []  # of each class
        if self.classes:
            self.prompts = class_prompts(self.classes, self.templates, self.entry.name)

    @property
    def same_images(self) -> str:
        """What two sets of captions of the same images, in the same order, share."""
        sources = getattr(self.images, "sources", None)
        return digest(*sources) if isinstance(sources, list) else self.entry.path


def open_sets(
    entries: Sequence[Entry],
    prompts: Prompts,
    cache: Path,
    read_plain: Callable,
    download: bool = False,
    explain: bool = True,
    error_budget: float = ERROR_BUDGET,
) -> tuple[list[OpenSet], dict[str, str]]:
    """The data sets that are on this machine, all checked, and why the others are left out.

    Collective; rank 0 says on stderr why, if `explain`. Raises UserError where none is here. See
    `open_set`.
    """
    sets = []
    skipped = {}
    for entry in entries:
        with rank_0_first():
            found = open_set(entry, prompts, cache, read_plain, download, error_budget)
        if isinstance(found, OpenSet):
            sets.append(found)
            continue
        skipped[entry.name] = str(found)
        if explain and rank() == 0:
            print(f"SKIPPED {found}", file=sys.stderr)
    if not sets:
        how = "see above how to get each" if explain else "name one with --datasets to see why"
        raise UserError(f"none of the data sets is on this machine: {', '.join(skipped)}; {how}")
    return sets, skipped


def open_set(
    entry: Entry,
    prompts: Prompts,
    cache: Path,
    read_plain: Callable,
    download: bool = False,
    error_budget: float = ERROR_BUDGET,
) -> OpenSet | MissingData:
    """The data set with its class names and templates; or, not raised, why it cannot be had.

    cache: folder for shards fetched from URLs. read_plain: reads arrays of objects. download: let
    torchvision fetch. error_budget: see ShardIndex.
    """
    try:
        if entry.kind in PAIRS:
            _check_language(entry)
            return OpenSet(replace(entry, metric="text_acc"), open_choices(entry))
        if entry.kind in ("retrieval", *LANGUAGES):
            _check_language(entry)
            return OpenSet(
                replace(entry, metric="recall"), CaptionedImages(entry, cache, error_budget)
            )
        if entry.kind == "webdataset":
            return _open_shards(entry, prompts, cache, error_budget)
        return _open_classes(entry, prompts, read_plain, download)
    except MissingData as reason:
        return reason


def _check_language(entry: Entry) -> None:
    """MissingData where the catalogue knows captions in English alone."""
    if entry.language != "en" and entry.name in CATALOG and entry.kind not in LANGUAGES:
        raise MissingData(f"{entry.name}: its captions are English; add en to --language")


def _prompts(entry: Entry, prompts: Prompts, kind: str) -> list:
    """The labels or templates in the entry's language; MissingData where that is not English and
    has none."""
    if entry.language != "en" and not prompts.has(kind, entry.prompts, entry.language):
        raise MissingData(
            f"{entry.name}: no {kind} for {entry.prompts!r} in {entry.language!r}; give them with "
            f"--{kind}"
        )
    return prompts.find(kind, entry.prompts, entry.language)


def _templates(entry: Entry, prompts: Prompts) -> list[str]:
    """The entry's templates; the plainest, which is said, for somebody's own class folders."""
    own = entry.kind == "imagefolder" and entry.name not in CATALOG and entry.language == "en"
    if not own or prompts.has("templates", entry.prompts):
        return _prompts(entry, prompts, "templates")
    say(f"{entry.name}: {PLAIN_TEMPLATE!r} with the names of its classes; --templates gives others")
    return [PLAIN_TEMPLATE]


def _open_classes(entry: Entry, prompts: Prompts, read_plain: Callable, download: bool) -> OpenSet:
    if entry.kind == "babel":
        found, templates = babel_imagenet(entry)
        return OpenSet(entry, found, found.classes, templates)
    templates = _templates(entry, prompts)
    if entry.kind == "imagenet":
        found = imagenet_folders(entry, _prompts(entry, prompts, "labels"))
        return OpenSet(entry, found, found.classes, templates)
    if entry.kind == "objectnet":
        found = object_net(entry)
        return OpenSet(entry, found, found.classes, templates)
    listed = entry.language != "en" or prompts.has("labels", entry.prompts)
    classes = _prompts(entry, prompts, "labels") if listed else []
    images = open_images(entry, classes, read_plain, download)
    if not classes:
        classes = folder_names(images.classes) or prompts.find(
            "labels", entry.prompts
        )  # which says what is missing
    elif images.classes:
        classes = in_order_of(images.classes, classes, entry.name)
    elif isinstance(images, LabelledFiles) and int(images.labels.max()) >= len(classes):
        raise UserError(
            f"{entry.name}: class {int(images.labels.max())} occurs in {entry.path}, but the list of labels names "
            f"{len(classes)} classes, counted from 0; give the list of these classes with --labels"
        )
    return OpenSet(entry, images, classes, templates)


def _open_shards(
    entry: Entry, prompts: Prompts, cache: Path, error_budget: float = ERROR_BUDGET
) -> OpenSet:
    kind = (read_text(entry.path, "dataset_type.txt") or "").strip().lower()
    if kind == "retrieval":
        return OpenSet(replace(entry, metric="recall"), CaptionedImages(entry, cache, error_budget))
    images = ShardImages(entry, cache, kind == "multilabel", error_budget)
    english = entry.language == "en"
    classes = (images.classes if english else []) or _prompts(entry, prompts, "labels")
    templates = (images.templates if english else []) or _prompts(entry, prompts, "templates")
    return OpenSet(
        replace(entry, metric="map11") if kind == "multilabel" else entry,
        images,
        classes,
        templates,
    )


def open_images(entry: Entry, classes: Sequence, read_plain: Callable, download: bool = False):
    """The images of a data set for classification. MissingData where they are not on this machine.

    classes: the list of labels, by which faults of class folders are explained. read_plain: reads
    arrays of objects.
    """
    if entry.kind == "imagefolder":
        return class_folders(entry, classes)
    if entry.kind == "filelist":
        return file_list(entry, read_plain)
    if entry.kind == "voc":
        return voc(entry)
    root = Path(entry.path) / entry.split
    if entry.kind == "either" and root.is_dir() and folders_in(root):
        return class_folders(entry, classes)
    return TorchvisionImages(entry, download)


def class_folders(entry: Entry, classes: Sequence = ()) -> LabelledFiles:
    root = Path(entry.path) / entry.split
    if not root.is_dir():
        inside = [name for name in SPLITS if (root.parent / name).is_dir()]
        split = f"name its split {inside[0]} with --split, or " if inside else ""
        path = Path(entry.path)
        if not inside and path.is_dir() and any(inner.is_dir() for inner in path.iterdir()):
            split = f"add --split . if {path} itself holds the class folders, or "
        raise MissingData(
            f"{entry.name}: no folder {root}; {split}put one there with a sub-folder of images per class, or name "
            "another place with --root or --catalog"
        )
    if not folders_in(root):
        return flat_folder(root)
    data = ClassFolder(root, lambda image: image, classes)
    return LabelledFiles(data.files, data.labels, data.folders)


def file_list(entry: Entry, read_plain: Callable) -> LabelledFiles:
    """SLIP's lists: paths and labels in two .npy files. Labels of text count in alphabetical
    order."""
    folder = Path(entry.path)
    found = {}
    for kind in ("images", "labels"):
        file = folder / f"{entry.split}_{kind}.npy"
        if not file.is_file():
            raise MissingData(
                f"{entry.name}: no file {file}; make it (an array of {kind}), or name another --root"
            )
        found[kind] = _listed(read_plain(file), file)
    images, labels = found.values()
    if not images or len(images) != len(labels):
        raise UserError(
            f"{folder}/{entry.split}_*.npy: {len(images)} images and {len(labels)} labels; make them again"
        )
    numbers = all(type(label) is int and 0 <= label < 2**31 for label in labels)
    if not all(isinstance(image, str) for image in images) or not (
        numbers or all(isinstance(label, str) for label in labels)
    ):
        raise UserError(
            f"{folder}/{entry.split}_*.npy: images must be texts, labels numbers or texts; make "
            "them again"
        )
    classes = []
    if not numbers:
        classes = sorted(set(labels))
        labels = [classes.index(label) for label in labels]
    return LabelledFiles([folder / image for image in images], torch.tensor(labels), classes)


def _listed(array: object, file: Path) -> list:
    """Values of a one-dimensional array, bytes as text."""
    if getattr(array, "ndim", None) != 1:
        raise UserError(f"{file}: expected an array of one dimension, found {brief(array)}")
    try:
        return [each.decode() if isinstance(each, bytes) else each for each in array.tolist()]
    except (UnicodeDecodeError, SystemError, ValueError):  # NumPy raises all of these
        raise UserError(f"{file}: its texts are no Unicode; make it again") from None


def voc(entry: Entry) -> LabelledFiles:
    """PASCAL VOC 2007: ImageSets/Main/<class>_<split>.txt lists images with 1, -1 or, for difficult
    ones, 0."""
    places = [Path(entry.path) / inner for inner in ("VOCdevkit/VOC2007", "VOC2007", "")]
    root = next((place for place in places if (place / "ImageSets/Main").is_dir()), None)
    if root is None:
        raise MissingData(
            f"{entry.name}: no VOCdevkit/VOC2007/ImageSets/Main in {entry.path}; unpack VOCtest_06-Nov-2007.tar there, "
            "or name another --root"
        )
    lists = matching_files(root / "ImageSets/Main", f"*_{entry.split}.txt")
    if not lists:
        raise MissingData(
            f"{entry.name}: no *_{entry.split}.txt in {root}/ImageSets/Main; unpack the {entry.split} set"
        )
    columns = [_voc_list(file) for file in lists]
    if any(column.keys() != columns[0].keys() for column in columns):
        raise UserError(
            f"{root}/ImageSets/Main: the lists *_{entry.split}.txt name different images; unpack them again"
        )
    targets = torch.tensor([[column[name] for column in columns] for name in columns[0]])
    files = [root / "JPEGImages" / f"{name}.jpg" for name in columns[0]]
    return LabelledFiles(
        files, targets, [file.name.removesuffix(f"_{entry.split}.txt") for file in lists]
    )


def _voc_list(file: Path) -> dict[str, int]:
    """Target by image: 1, 0, and -1 for difficult ones, which the file writes 1, -1 and 0."""
    meaning = {"1": 1, "-1": 0, "0": -1}
    column = {}
    for number, line in enumerate(read_lines(file), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in meaning:
            raise UserError(f"{file}, line {number}: expected an image and 1, -1 or 0")
        column[fields[0]] = meaning[fields[1]]
    return column


class TorchvisionImages:
    """A data set in torchvision's own files below `entry.path`."""

    def __init__(self, entry: Entry, download: bool):
        self.name = entry.name
        if entry.name not in TORCHVISION:
            raise UserError(
                f"{entry.name}: torchvision is not asked for a data set of this name; it is for "
                f"{', '.join(TORCHVISION)}"
            )
        try:
            name = TORCHVISION[entry.name]
            self.data = torchvision_set(name, entry.path, split_options(name, "test"), download)
        except (RuntimeError, OSError, ModuleNotFoundError) as error:
            raise MissingData(
                f"{entry.name}: neither class folders nor torchvision's files in {entry.path} ({error}); put them "
                f"there, name another --root, or let torchvision fetch them: --datasets {entry.name} --download"
            ) from None
        self.classes = class_names_of(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Image:
        pixels, label = sample_of(self.data, index, self.name)
        return {"image": pixels, "target": torch.tensor(label)}


class ShardImages:
    """A classification set as CLIP_benchmark publishes it: classnames.txt, templates, <split>/N.tar
    of images with .cls (the class) or, where dataset_type.txt says multilabel, .npy (1 for every
    class shown).
    """

    def __init__(
        self, entry: Entry, cache: Path, multilabel: bool, error_budget: float = ERROR_BUDGET
    ):
        self.index = ShardIndex(*shard_files(entry, cache), error_budget).nonempty()
        self.width = 0  # classes of the .npy members
        self.classes = names_in(read_text(entry.path, "classnames.txt") or "")
        found = lines_of(read_text(entry.path, "zeroshot_classification_templates.txt"))
        self.templates = [template.replace("{c}", "{}") for template in found]
        target = self._shown if multilabel else self._class
        self.targets = torch.tensor([target(place) for place in range(len(self.index))])
        last = int(self.targets.max())
        lines = len(self.classes)
        if lines and not multilabel and last >= lines:
            name = self.index.name(int(self.targets.argmax()))
            raise UserError(f"{name}: class {last} occurs, but classnames.txt has {lines} lines")

    def _class(self, place: int) -> int:
        """The number in a sample's .cls. UserError."""
        label = whole_number(self._read(place, "cls"))
        if label is None or label < 0:
            raise UserError(f"{self.index.name(place)}: no readable .cls, a class number; {AGAIN}")
        return label

    def _shown(self, place: int) -> list[int]:
        """1 for every class shown, else 0: a sample's .npy. UserError."""
        import numpy as np

        name = self.index.name(place)
        file = io.BytesIO(self._read(place, "npy"))
        try:
            shown = np.load(file, allow_pickle=False)
            usable = shown.ndim == 1 and np.isin(shown, (-1, 0, 1)).all()
        except Exception as error:  # NumPy lets out the errors of its parser
            raise UserError(f"{name}: no readable .npy ({brief(str(error))}); {AGAIN}") from None
        self.width = self.width or len(self.classes) or np.size(shown)
        if not usable or len(shown) != self.width:
            given = brief(shown.tolist())
            raise UserError(
                f"{name}: its .npy is {given}, not 0 or 1 for each of {self.width} classes"
            )
        return shown.astype(int).tolist()

    def _read(self, place: int, ending: str) -> bytes:
        try:
            return self.index.read(place, ending)
        except KeyError:
            raise UserError(f"{self.index.name(place)}: no .{ending}; {AGAIN}") from None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> Image:
        image = decode_image(self.index.image(place), self.index.name(place))
        return {"image": image, "target": self.targets[place]}


def names_in(text: str) -> list[str]:
    """Class names, one a line. A blank line between them is a class without a name, as one of
    clevr_closest_object_distance is; at the end it does not count."""
    return [line.strip() for line in lines_in(text.rstrip())]


def shard_files(entry: Entry, cache: Path) -> tuple[list[Path], str]:
    """The shards of a split, on this machine; those behind a URL are fetched into `cache` once."""
    counted = read_text(entry.path, f"{entry.split}/nshards.txt")
    if counted is None:
        raise MissingData(
            f"{entry.name}: no {entry.split}/nshards.txt in {entry.path}; name a folder or URL of CLIP_benchmark's "
            "layout, such as webdataset:https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10"
        )
    place = f"{entry.path}/{entry.split}/nshards.txt"
    shards = whole_number(counted)
    if shards is None:
        raise UserError(f"{place}: {counted[:20]!r} is no number")
    if not 0 < shards <= SHARDS:
        raise UserError(f"{place}: {counted[:20]!r} shards; fetch the file again")
    names = [f"{entry.split}/{number}.tar" for number in range(shards)]
    local_copy(entry.path, names[-1], cache)  # a wrong number shows before a million are asked for
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: local_copy(entry.path, name, cache), names)), entry.name


def lines_of(text: str | None) -> list[str]:
    """The lines of a text that are not blank, without blanks around them."""
    return [line.strip() for line in lines_in(text or "") if line.strip()]


class CaptionedImages:
    """Images and all their captions, for retrieval.

    captions: all texts. text_image: the image of every one, int64 [T].
    """

    def __init__(self, entry: Entry, cache: Path, error_budget: float = ERROR_BUDGET):
        sources, captions = captions_of(entry, cache, error_budget)
        if not sources:
            raise UserError(
                f"{entry.path}: no images with captions of split {entry.split!r}; name another split"
            )
        self.sources = sources
        self.captions = [text for texts in captions for text in texts]
        self.text_image = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Image:
        if isinstance(self.sources, ShardIndex):
            return {"image": decode_image(self.sources.image(index), self.sources.name(index))}
        return {"image": decode_image(self.sources[index])}


def captions_of(entry: Entry, cache: Path, error_budget: float):
    """Where the images are, and the captions of each."""
    if entry.kind == "webdataset":
        return retrieval_shards(entry, cache, error_budget)
    if entry.kind == "retrieval" and is_shards(entry.path):
        return training_shards(entry, error_budget)
    if entry.kind not in LANGUAGES:
        return retrieval_list(entry)
    images, captions = xtd(entry) if entry.kind == "xtd" else crossmodal(entry)
    check_images(entry, images)
    return images, captions


def training_shards(entry: Entry, error_budget: float) -> tuple[ShardIndex, list[list[str]]]:
    """Shards that train, as img2dataset and scripts/data/pack.py write them, and the captions that
    training reads of each sample. A sample without one is a UserError."""
    index = ShardIndex(list_shards(entry.path), entry.path, error_budget).nonempty()
    try:
        return index, [as_list(record.captions_of(index[place])) for place in range(len(index))]
    except BadSample as error:
        raise UserError(f"{error}; evaluation needs every caption: leave this sample out") from None


def retrieval_shards(
    entry: Entry, cache: Path, error_budget: float
) -> tuple[ShardIndex, list[list[str]]]:
    """CLIP_benchmark's shards of images with .txt, a caption a line. Images without captions are
    among those to choose from; they are counted and said."""
    index = ShardIndex(*shard_files(entry, cache), error_budget).nonempty()
    captions = []
    for place in range(len(index)):
        has_text = "txt" in index.endings(place)
        captions.append(lines_of(lenient_text(index.read(place, "txt"))) if has_text else [])
    lacking = [place for place, texts in enumerate(captions) if not texts]
    if len(lacking) == len(captions):
        raise UserError(f"{entry.path}: no image has captions, a .txt with one a line; {AGAIN}")
    if lacking and rank() == 0:
        print(
            f"{entry.path}: {len(lacking)} of {len(captions)} images have no captions, such as "
            f"{index.name(lacking[0])}",
            file=sys.stderr,
        )
    return index, captions
