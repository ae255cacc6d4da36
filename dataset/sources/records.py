"""Annotations of any size: JSON list or JSON lines files read through the page cache, never held in
memory."""

import bisect
import hashlib
import math
import mmap
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from base.caches import cached_path, digest, one_builder, states_digest
from base.errors import UserError, brief
from base.image_names import FETCH
from base.names import some
from base.reading import parse_entry, parse_first_entry
from base.text import as_list, text_of
from base.writing import atomic_write
from dataset.images.formats import is_image
from dataset.sources.cached_tables import json_lines_of
from dataset.sources.json_entries import (
    EXPECTED,
    SBU,
    RepeatedKey,
    locate,
    parse_entries,
    weights_fault,
)
from dataset.sources.left_out import LeftOut, has_left_out, refuse_left_out, report_left_out
from dataset.sources.tables import usual_column

# Fields of the public annotation formats and the types each may have; a list must hold texts, at
# least one.
FIELD_TYPES = {
    "image": (str,),
    "images": (list,),
    "caption": (str, list),
    "answer": (str, list),
    "question": (str,),
    "sentence": (str,),
    "text": (str,),
    "label": (str, bool, int),
    "image_id": (str, int),
    "question_id": (str, int),
    "ref_id": (str, int),
}
UNWRITABLE = "set QUINTET_CACHE to a writable folder"
COCO_HINT = (
    "these are COCO's own annotations: make a list of images and captions of captions_*.json with "
    "scripts/data/convert_metadata.py --dataset coco"
)
EXPRESSIONS = (
    "these are expressions as MDETR or UNINEXT publish them: make lists of them with "
    "scripts/data/convert_expressions.py"
)
BY_IMAGE = (
    'this is an object {image: captions}: write {"image": "%s", "caption": [...]} for each of its '
    "images, in a JSON list or one a line"
)
# Annotations as they are published: (list in the file, field of its first entry) -> what to do.
PUBLISHED = {
    ("images", "caption"): EXPRESSIONS,
    ("images", "expressions"): EXPRESSIONS,
    ("annotations", "phrases"): EXPRESSIONS,
    ("annotations", "phrase"): EXPRESSIONS,
    ("annotations", "caption"): COCO_HINT,
    ("annotations", "bbox"): "these are COCO's boxes; its captions are in captions_*.json, and "
    "expressions that mean the boxes in REFER's refs(unc).p (scripts/data/convert_expressions.py)",
    (
        "annotations",
        "answers",
    ): "these are VQA's own answers: name the file of their questions (v2_OpenEnded_mscoco_…), "
    "beside which they lie, or this file as test_answers",
    ("qas", "question"): "these are Visual Genome's own questions: name ALBEF's list (vg_qa.json)",
    ("regions", "phrase"): "these are Visual Genome's own regions: name ALBEF's list (vg.json)",
    ("questions", "question"): "these are VQA's own questions, without images: name ALBEF's lists "
    "(vqa_train.json, vqa_test.json)",
    ("images", "sentences"): "this is Karpathy's file of all splits: pack one with "
    "scripts/data/pack_karpathy.py, or name ALBEF's lists (coco_train.json, flickr30k_test.json)",
}
PICKLES = (".p", ".pkl", ".pickle")
PROGRESS_EVERY = 200_000  # entries; files with fewer are indexed without a progress bar


class Records(Sequence):
    """Read-only sequence of the annotations (dicts) in one or several JSON list or JSON lines
    files, or in tables and folders (see `dataset.sources.tables`).

    The first use of a file checks every entry and stores where each usable one begins, 8 bytes each,
    in the cache ($QUINTET_CACHE, else ~/.cache/quintet), keyed by path, size, time of change
    and required fields. File and index are memory-mapped: all processes of a machine share one
    copy, and pickling sends only the paths.

    required: fields every entry must have; none: entries are taken as they are, with texts where
    texts belong. Raises UserError naming file, entry, line, field and remedy.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        required: Sequence[str] = ("image", "caption"),
    ):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise UserError("no annotation file given; name at least one")
        self._arguments = (paths, tuple(required))
        self._files = []
        for path in paths:
            lines = json_lines_of(path, required).absolute()
            self._files.append(_IndexedFile(lines, required, str(path)))
        self._ends = list(accumulate(map(len, self._files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._files[number][index - (self._ends[number - 1] if number else 0)]

    def __reduce__(self):
        return Records, self._arguments

    def complete(self) -> "Records":
        """Itself, for an evaluation, whose scores are those of the whole list. UserError where
        unusable entries were left out."""
        for file in self._files:
            file.check_complete()
        return self

    def content(self) -> str:
        """A digest of the files' bytes and order: the same for copies elsewhere."""
        return digest(*(file.content() for file in self._files))


def state_of_entries(records: Sequence[dict], numbers: range, root: Path) -> str:
    """Changes with some entries and with the images that they name below `root`."""
    rows = [records[number] for number in numbers]
    files = [root / name for row in rows for name in image_names(row)]
    return digest(rows, [str(file) for file in files], states_digest(files))


def image_names(row: dict) -> list[str]:
    """Paths of images that an entry names."""
    given = row.get("image") or row.get("images") or row.get("url") or []
    return [str(name) for name in as_list(given) if isinstance(name, str | Path)]


class _IndexedFile:
    """One annotation file and its index, both memory-mapped."""

    def __init__(self, path: Path, required: Sequence[str], name: str):
        if not path.is_file():
            raise UserError(f"{path}: no such annotation file; check the name in the configuration")
        if path.suffix in PICKLES:
            raise UserError(
                f"{path}: a pickle is no list of annotations; make JSON of REFER's refs(unc).p with "
                "scripts/data/convert_expressions.py, of metadata with convert_metadata.py"
            )
        self._index = _index_of(path, required, name)
        self._required = required
        self._path, self._has_gaps = path, has_left_out(self._index)
        self._data = _map(path)
        self._starts = _starts_in(self._index, self._data)
        if self._starts is None:  # damaged: made again
            self._index.unlink()
            self._starts = _starts_in(_index_of(path, required, name), self._data)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        if self._data.size() != len(self._data):  # beyond its end the system kills who reads on
            raise UserError(
                f"{self._path}: was written to while it is read; start the same command again, and "
                "replace lists as a whole, by a file that is moved to their name"
            )
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._data)
        end = self._data.rfind(b"}", start, end) + 1  # leaves out the comma or bracket that follows
        # behind an entry there may be others that were left out
        parse = parse_first_entry if self._has_gaps else parse_entry
        try:
            return with_texts(parse(self._data[start:end]), self._required or FIELD_TYPES)
        except ValueError:
            raise UserError(f"{self._index}: damaged; delete it, it is made again") from None

    def check_complete(self) -> None:
        """UserError where entries were left out, or rows of the table that the file was made of."""
        refuse_left_out(self._index)
        refuse_left_out(self._path)

    def content(self) -> bytes:
        """sha256 of the file."""
        return hashlib.sha256(self._data).digest()


def _starts_in(index: Path, data: mmap.mmap) -> memoryview | None:
    """The starts of entries that an index holds; None where it is not one of this file."""
    size = index.stat().st_size
    if not size or size % 8:
        return None
    starts = memoryview(_map(index)).cast("Q")
    numbers = np.frombuffer(starts, np.uint64)
    ascending = (numbers[1:] > numbers[:-1]).all()
    if not ascending or numbers[-1] >= len(data):
        return None
    if data[starts[0]] != ord("{") or data[starts[-1]] != ord("{"):
        return None
    return starts


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index_of(path: Path, required: Sequence[str], name: str) -> Path:
    """The file of entry starts (native uint64), made if it is not there yet."""
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file; {EXPECTED}")
    index = cached_path(path, ".index", sorted(required))
    if not index.exists():
        try:
            with one_builder(index):
                if not index.exists():
                    _write_index(path, required, index, name)
        except OSError as error:
            raise UserError(f"cannot index {path} ({error}); {UNWRITABLE}") from None
    report_left_out(index)
    return index


def _write_index(path: Path, required: Sequence[str], index: Path, name: str) -> None:
    """Writes the start of every entry; no process ever sees half an index."""
    left_out = LeftOut(name)
    with atomic_write(index, UNWRITABLE) as temporary, temporary.open("wb") as file:
        for starts in _batched(_checked_starts(path, required, name, left_out), 1 << 16):
            starts.tofile(file)
        left_out.keep(index)


def _batched(numbers: Iterator[int], size: int) -> Iterator[array]:
    batch = array("Q")
    for number in numbers:
        batch.append(number)
        if len(batch) == size:
            yield batch
            batch = array("Q")
    yield batch


def _checked_starts(
    path: Path, required: Sequence[str], name: str, left_out: LeftOut
) -> Iterator[int]:
    """Byte offset of every usable entry, with a progress bar for long files; the others go to
    `left_out`.

    Entries without any text in `caption` or `answer` are counted and said: training skips them.
    name: what the user calls the file.
    """
    count = 0
    empty = 0
    mixed = 0
    bar = None
    lists = [field for field in required if field in ("caption", "answer")]
    for start, entry in parse_entries(path):
        odd = odd_items(entry, required)
        entry = with_texts(entry, required)
        left_out.total += 1
        if fault := _fault(entry, required) or _nothing_left(entry, odd):
            where = _place(path, name, left_out.total - 1, start) if left_out.names_more else name
            left_out.add(f"{where}: {fault}")
            continue
        yield start
        count += 1
        mixed += len(odd)
        empty += any(not entry[field] for field in lists)
        if count % PROGRESS_EVERY == 0:
            bar = bar or _progress_bar(path)
            bar.update(start - bar.n)
    if bar:
        bar.close()
    left_out.check()
    if not count:
        raise UserError(f"{name}: no entries; {EXPECTED}")
    if empty == count:
        raise UserError(f"{name}: every entry's {lists[0]} is empty; {EXPECTED}")
    if empty:
        message = f"{name}: {empty:,} of {count:,} entries have no {lists[0]}; training skips them"
        warnings.warn(message, stacklevel=2)
    if mixed:
        message = f"{name}: {mixed:,} of {count:,} entries have items among their texts that are none; they are left out"
        warnings.warn(message, stacklevel=2)


def _place(path: Path, name: str, number: int, start: int) -> str:
    """Where an entry stands in the file that was named: the lines of a table are in another."""
    if Path(name).absolute() == path:
        return locate(path, number, start)
    return f"{name}, entry {number} (the first is 0)"


def with_texts(entry: object, required: Iterable[str]) -> object:
    """An entry whose required fields are texts where texts belong.

    A number becomes its text (an image called 4705552913); of a list of texts null and whatever
    else is no text is left out; null in place of a list is an empty one. NaN is null.
    """
    if type(entry) is not dict:
        return entry
    for field in required:
        types = FIELD_TYPES.get(field, ())
        value = entry.get(field)
        if type(value) is float and not math.isfinite(value):
            value = entry[field] = None  # pandas writes a missing text so
        if type(value) is list and list in types:
            if not all(type(item) is str for item in value):
                _keep_texts(entry, field, list(map(text_of, value)))
        elif int in types and type(value) is float and value.is_integer():
            entry[field] = int(value)  # of pandas, beside missing ones
        elif str in types and int not in types and type(value) in (int, float):
            entry[field] = text_of(value)
        elif value is None and list in types and field in entry:
            entry[field] = []
    return entry


def _keep_texts(entry: dict, field: str, texts: list[str | None]) -> None:
    """Leave what is none out of an entry's texts, and its weight in their sampling."""
    weights = entry.get(f"{field}_weights")
    if isinstance(weights, list) and len(weights) == len(texts):
        kept = [weight for weight, text in zip(weights, texts, strict=True) if text is not None]
        entry[f"{field}_weights"] = kept
    entry[field] = [text for text in texts if text is not None]


def odd_items(entry: object, required: Sequence[str]) -> dict[str, object]:
    """Of required lists of texts the first item that is neither a text nor null, by field."""
    odd: dict[str, object] = {}
    for field in required if type(entry) is dict else ():
        value = entry.get(field)
        if type(value) is list and list in FIELD_TYPES.get(field, ()):
            for item in value:
                if item is not None and item == item and text_of(item) is None:
                    odd.setdefault(field, item)
    return odd


def _nothing_left(entry: dict, odd: dict[str, object]) -> str | None:
    """What is wrong where a list holds items, and none of them is a text."""
    for field, item in odd.items():
        if not entry[field]:
            return f"field {field!r} must be texts, not {type(item).__name__} ({brief(item)}); fix the entry"
    return None


def _fault(entry: object, required: Sequence[str]) -> str | None:
    """What is wrong with an entry and what to do about it; None for a good one."""
    if isinstance(entry, RepeatedKey):
        return entry.fault
    if type(entry) is not dict:
        fields = f" with {', '.join(required)}" if required else ""
        return f"expected an object{fields}, found {brief(entry)}"
    for field in required:
        if field not in entry:
            remedy = published_remedy(entry) or named_otherwise(entry, field, required)
            if field == "image" and "url" in entry:
                remedy = FETCH
            remedy = remedy or "add the field or remove the entry"
            names = some([name[:40] for name in entry]) or "none"
            return f"no field {field!r} (it has {names}); {remedy}"
        types = FIELD_TYPES.get(field, (object,))
        value = entry[field]
        is_odd_bool = isinstance(value, bool) and types != (object,) and bool not in types
        if not isinstance(value, types) or is_odd_bool:  # True would be the number 1
            names = " or ".join(kind.__name__ for kind in types)
            return f"field {field!r} must be {names}, not {type(value).__name__} ({brief(value)}); fix the entry"
        if field == "images" and not value:
            return "field 'images' lists none; fix the entry"
    if "caption_weights" in entry and "caption" in required:
        texts = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        return weights_fault(entry["caption_weights"], len(texts))
    return None


def published_remedy(entry: dict) -> str | None:
    """What to do about an entry that is a whole published file; None for others."""
    for (name, field), remedy in PUBLISHED.items():
        listed = entry.get(name)
        first = listed[0] if isinstance(listed, list) and listed else None
        if isinstance(first, dict) and field in first:
            return remedy
    if entry.keys() >= {"image_urls", "captions"}:
        return SBU
    wrapped = (name for name, value in entry.items() if _lists_images(value))
    if name := next(wrapped, None):
        return f"the entries are in its list {name!r:.60}: write that list alone"
    if entry and all(map(is_image, entry)):
        return BY_IMAGE % brief(next(iter(entry)))[1:-1]
    return COCO_HINT if "annotations" in entry else None


def _lists_images(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "image" in first


def named_otherwise(entry: dict, field: str, required: Sequence[str] = ()) -> str | None:
    """How to say that an entry holds a field under one of its usual names; None where it does not."""
    usual = usual_column(field, list(entry), required)
    return f"write FILE?{field}={usual}" if usual else None


def _progress_bar(path: Path):
    from tqdm import tqdm

    return tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=f"indexing {path.name}",
        disable=None,
    )
