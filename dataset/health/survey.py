"""A data set looked at as a whole: counts of problems, duplicates, leaks between splits, balance."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from base.errors import UserError
from base.names import is_hidden
from base.pixels import pixels_digest
from base.processes import in_processes
from base.reading import first_letter
from dataset.health.classes import Finding
from dataset.health.duplicates import near_duplicates, same_bytes
from dataset.health.samples import Examiner, Facts, Image
from dataset.health.stored import is_stored, read_facts, write_facts
from dataset.images.formats import files_below
from dataset.sources.class_folder import SPLITS, are_splits, class_folders
from dataset.sources.records import (
    Records,
    image_names,
    named_otherwise,
    published_remedy,
    state_of_entries,
)
from dataset.sources.remote import state_of
from dataset.sources.shard_columns import split_columns
from dataset.sources.shard_list import list_shards, stated_samples
from dataset.sources.shards import read_shard
from dataset.sources.tables import METADATA, SAVED, is_table, parquet_files, usual_column
from dataset.tasks.classification import FolderRecords, is_shards
from dataset.tasks.recognition import label_records

BLOCK = 256  # entries a process takes at a time
OFTEN = 10  # images that share a text from which on it is called repeated
FORMAT = 5  # of kept facts: raise it when samples are looked at otherwise
MOST_GROUPS = 1000  # groups of duplicates that are kept


@dataclass
class Surveyed:
    """One of the data sets that were named: its facts in order, and groups of equal images."""

    data: str
    facts: list[Facts] = field(default_factory=list)
    same: list[list[Image]] = field(default_factory=list)
    near: list[list[Image]] = field(default_factory=list)
    dropped: dict[int, str] = field(
        default_factory=dict
    )  # index in facts -> why not to train on it
    seconds: float = 0.0  # of all processes
    classes: Counter = field(default_factory=Counter)  # images by the name of their class
    findings: list[Finding] = field(default_factory=list)  # about the classes
    unknown_labels: set[str] = field(default_factory=set)  # of classes that are not in the list

    def samples(self) -> int:
        """How many there are, those that damage took included."""
        return sum(facts.lost for facts in self.facts)

    def images(self) -> list[Image]:
        """Each image once."""
        return list({image.name: image for facts in self.facts for image in facts.images}.values())

    def counts(self) -> Counter:
        """Samples by problem."""
        found: Counter = Counter()
        for facts in self.facts:
            for problem in facts.problems:
                found[problem] += facts.lost
        return found

    def repeated_texts(self) -> list[tuple[str, int]]:
        """Texts that OFTEN or more samples have, the most frequent first."""
        found = Counter(text for facts in self.facts for text in set(facts.texts) if text.strip())
        return [(text, count) for text, count in found.most_common(20) if count >= OFTEN]

    def repeated_ids(self) -> list[str]:
        """Ids that several samples have."""
        found = Counter(each for facts in self.facts for each in facts.ids)
        return [each for each, count in found.items() if count > 1]

    def balance(self) -> Counter:
        """Samples by label."""
        return Counter(label for facts in self.facts for label in facts.labels)


# ---- reading
def open_list(data: str) -> Sequence[dict]:
    """The entries of an annotation file, table or folder. UserError."""
    path = Path(data)
    if is_class_folder(path):
        return FolderRecords(data, class_folders(path), gaps=True)
    if path.suffix.lower() in (".list", ".txt") and first_letter(path) not in b"[{":
        return label_records(path)
    if not is_table(data):
        records = Records(data, ())
        first = records[0]
        remedy = published_remedy(first) or named_otherwise(first, "image")
        if remedy and not image_names(first):
            raise UserError(f"{data}: no images in it; {remedy}")
        return records
    try:
        return Records(data, ("image", "caption"))
    except UserError as error:
        if "no column for caption" not in str(error):
            raise
    records = Records(data, ("image",))
    names = list(records[0])
    if "label" in names or not usual_column("labels", names):
        return records
    return Records(data, ("image", "labels"))


def is_class_folder(path: Path) -> bool:
    """Whether a path is a folder that holds a sub-folder a class and no texts or tables."""
    if not path.is_dir() or parquet_files(path):
        return False
    if any((path / name).exists() for name in (*METADATA, SAVED, "dataset_dict.json")):
        return False
    return any(path.iterdir()) and not any(
        file.suffix.lower() == ".txt" for file in files_below(path)
    )


@cache
def _opened(data: str) -> Sequence[dict]:
    return open_list(data)


class Work(NamedTuple):
    """What is looked at at a time: a shard (stop None), or entries `start` to `stop` of a list.

    number: in the plan; part: number of the data set among those that were named."""

    number: int
    part: int
    data: str
    start: int = 0
    stop: int | None = None


def split_folders(data: Sequence[str], classes: Sequence[str] = ()) -> list[str]:
    """The data sets, with the splits of a folder that holds nothing else (train/, val/) one by
    one, the training set first. classes: names that are no splits."""
    found = []
    for name in data:
        below = [path for path in Path(name).glob("*/") if not is_hidden(path.name)]
        if are_splits([path.name for path in below], classes):
            below.sort(key=lambda path: SPLITS.index(path.name.lower()))
            found += map(str, below)
        else:
            found.append(name)
    return found


def plan(data: Sequence[str]) -> list[Work]:
    """All there is to look at, in order."""
    found: list[Work] = []
    for part, name in enumerate(data):
        if is_shards(name):
            for shard in list_shards(name):
                found.append(Work(len(found), part, shard))
            continue
        entries = len(_opened(name))
        for start in range(0, entries, BLOCK):
            found.append(Work(len(found), part, name, start, min(start + BLOCK, entries)))
    return found


@dataclass(frozen=True)
class Looking:
    """How to look: an examiner, and a folder that keeps what is found. root: where paths of images
    start; settings: changes with what the examiner does."""

    make_examiner: Callable[[], Examiner]
    folder: Path | None = None
    root: Path = Path()
    settings: str = ""

    def at(self, work: Work) -> tuple[list[Facts], float]:
        """The facts of some samples, kept or found now, and the CPU seconds they took."""
        if self.folder is None:
            return self._examine(work)
        made_of = self._state(work)
        found = read_facts(self._file(work), made_of)
        if found is None:
            found = self._examine(work)
            write_facts(self._file(work), made_of, *found)
        return found

    def keep(self, work: Work) -> int:
        """Keep the facts of some samples; returns 0 where they were kept already, else 1."""
        if self.is_kept(work):
            return 0
        self.at(work)
        return 1

    def is_kept(self, work: Work) -> bool:
        """Whether the facts of these very samples are kept."""
        return is_stored(self._file(work), self._state(work))

    def _file(self, work: Work) -> Path:
        return self.folder / f"{work.number:06d}.jsonl"

    def _state(self, work: Work) -> str:
        """Changes with the samples and the settings."""
        if work.stop is None:
            name, query = split_columns(work.data)
            state = (state_of(name), stated_samples(name))
            return pixels_digest(FORMAT, self.settings, *state, *([query] if query else []))
        entries = range(work.start, work.stop)
        state = state_of_entries(_opened(work.data), entries, self.root)
        return pixels_digest(FORMAT, self.settings, work.start, work.stop, state)

    def _examine(self, work: Work) -> tuple[list[Facts], float]:
        examiner = _examiner(self.make_examiner)
        start = time.process_time()
        if work.stop is None:
            stated = stated_samples(split_columns(work.data)[0])
            records = enumerate(read_shard(work.data, stated))
        else:
            entries = _opened(work.data)
            records = ((number, entries[number]) for number in range(work.start, work.stop))
        found = [examiner(number, record) for number, record in records]
        return found, time.process_time() - start


@cache
def _examiner(make_examiner: Callable[[], Examiner]) -> Examiner:
    return make_examiner()  # a process has one: tokenizers take seconds to make


def survey(
    data: Sequence[str], works: list[Work], looking: Looking, workers: int
) -> list[Surveyed]:
    """Look at every sample of all data sets, then compare them with each other."""
    from tqdm import tqdm

    parts = [Surveyed(name) for name in data]
    results = tqdm(in_processes(looking.at, works, workers), total=len(works), disable=None)
    for work, (facts, seconds) in zip(works, results, strict=True):
        parts[work.part].facts += facts
        parts[work.part].seconds += seconds
    for part in parts:
        if not part.facts:
            raise UserError(f"{part.data}: no samples in it")
        compare_images(part)
    find_leaks(parts)
    return parts


# ---- comparing
def compare_images(part: Surveyed) -> None:
    """Note images of other names with the same bytes or the same look; of samples that repeat image
    and text all but the first are dropped."""
    images = part.images()
    groups = same_bytes(image.digest for image in images)
    part.same = [[images[place] for place in group] for group in groups[:MOST_GROUPS]]
    groups = near_duplicates([image.signature for image in images])
    part.near = []
    for group in groups[:MOST_GROUPS]:
        alike = [images[place] for place in group]
        if len({image.digest for image in alike}) > 1:
            part.near.append(alike)
    seen: set[tuple] = set()
    for place, facts in enumerate(part.facts):
        if not facts.usable:
            part.dropped[place] = next(iter(facts.problems))
            continue
        key = (*(image.digest for image in facts.images), *facts.texts, *facts.ids, *facts.labels)
        if key in seen:
            facts.problems["repeated sample"] = facts.name
            part.dropped[place] = "repeated sample"
        seen.add(key)


def find_leaks(parts: list[Surveyed]) -> None:
    """Mark samples of a part whose image is in a later one, too, by bytes or by look: to train on
    the first and to test on the last of them is to test on what was trained on."""
    images = [(number, image) for number, part in enumerate(parts) for image in part.images()]
    groups = same_bytes(image.digest for _, image in images)
    groups += near_duplicates([image.signature for _, image in images])
    leaking: list[dict[str, str]] = [{} for _ in parts]
    for group in groups:
        last = max(images[place][0] for place in group)
        twin = next(images[place][1].name for place in group if images[place][0] == last)
        for number, image in (images[place] for place in group):
            if number < last:
                leaking[number][image.name] = f"{image.name} is {twin} of {parts[last].data}"
    for part, found in zip(parts, leaking, strict=True):
        for place, facts in enumerate(part.facts):
            names = [image.name for image in facts.images if image.name in found]
            if names:
                facts.problems["in a later split"] = found[names[0]]
                part.dropped.setdefault(place, "in a later split")
