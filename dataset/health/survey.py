"""A data set looked at as a whole: counts of problems, duplicates, leaks between splits, balance."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from base.errors import UserError
from dataset.health.duplicates import near_duplicates, same_bytes
from dataset.health.samples import Examiner, Facts, Image
from dataset.sources.records import Records
from dataset.sources.shard_list import list_shards
from dataset.sources.shards import read_shard
from dataset.sources.tables import METADATA, is_table
from dataset.tasks.classification import FolderRecords, is_shards

BLOCK = 256  # entries a process takes at a time
OFTEN = 10  # images that share a text from which on it is called repeated
MOST_GROUPS = 1000  # groups of duplicates that are kept


@dataclass
class Part:
    """One of the data sets that were named: its facts in order, and groups of equal images."""

    data: str
    facts: list[Facts] = field(default_factory=list)
    same: list[list[Image]] = field(default_factory=list)
    near: list[list[Image]] = field(default_factory=list)
    dropped: dict[int, str] = field(
        default_factory=dict
    )  # index in facts -> why not to train on it
    seconds: float = 0.0  # of all processes

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
    if path.is_dir() and _is_class_folder(path):
        return FolderRecords(data, ())
    if not is_table(data):
        return Records(data, ())
    try:
        return Records(data, ("image", "caption"))
    except UserError as error:
        if "no column for caption" not in str(error):
            raise
        return Records(data, ("image",))


def _is_class_folder(path: Path) -> bool:
    """Whether a folder holds a sub-folder a class and no texts."""
    if any(
        (path / name).exists() for name in (*METADATA, "dataset_info.json", "dataset_dict.json")
    ):
        return False
    return any(path.iterdir()) and not any(path.rglob("*.txt"))


@cache
def _opened(data: str) -> Sequence[dict]:
    return open_list(data)


def _work(data: str) -> list[tuple]:
    """What processes take: (data, start, stop) of a list, or (shard,)."""
    if is_shards(data):
        return [(shard,) for shard in list_shards(data)]
    entries = len(_opened(data))
    return [(data, start, min(start + BLOCK, entries)) for start in range(0, entries, BLOCK)]


def _examine(work: tuple, make_examiner: Callable[[], Examiner]) -> tuple[list[Facts], float]:
    """The facts of some samples, and the CPU seconds they took."""
    examiner = _examiner(make_examiner)
    start = time.process_time()
    if len(work) == 1:
        found = [examiner(number, record) for number, record in enumerate(read_shard(work[0]))]
    else:
        data, first, stop = work
        found = [examiner(number, _opened(data)[number]) for number in range(first, stop)]
    return found, time.process_time() - start


@cache
def _examiner(make_examiner: Callable[[], Examiner]) -> Examiner:
    return make_examiner()  # a process has one: tokenizers take seconds to make


def survey(data: Sequence[str], make_examiner: Callable[[], Examiner], workers: int) -> list[Part]:
    """Look at every sample of all data sets, then compare them with each other."""
    if workers == 1:
        parts = [_part(name, make_examiner, map) for name in data]
    else:
        with ProcessPoolExecutor(workers) as pool:
            parts = [_part(name, make_examiner, pool.map) for name in data]
    for part in parts:
        compare_images(part)
    find_leaks(parts)
    return parts


def _part(name: str, make_examiner: Callable[[], Examiner], mapped: Callable) -> Part:
    """The facts of one data set; mapped: `map`, or that of a pool of processes."""
    from tqdm import tqdm

    part, work = Part(name), _work(name)
    results = mapped(partial(_examine, make_examiner=make_examiner), work)
    for facts, seconds in tqdm(results, total=len(work), desc=Path(name).name[:30], disable=None):
        part.facts += facts
        part.seconds += seconds
    if not part.facts:
        raise UserError(f"{name}: no samples in it")
    return part


# ---- comparing
def compare_images(part: Part) -> None:
    """Note images of other names with the same bytes or the same look; of samples that repeat image
    and text all but the first are dropped."""
    images = part.images()
    groups = same_bytes(image.digest for image in images)
    part.same = [[images[place] for place in group] for group in groups[:MOST_GROUPS]]
    groups = near_duplicates([image.signature for image in images])
    part.near = [
        [images[place] for place in group]
        for group in groups[:MOST_GROUPS]
        if len({images[place].digest for place in group}) > 1
    ]
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


def find_leaks(parts: list[Part]) -> None:
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
