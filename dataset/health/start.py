"""A few samples of the training data, looked at before the training starts: what scripts/doctor.py
would find first, in two seconds at most.

Images are opened, not decoded; shards in a bucket are left alone.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from base.errors import BadSample, UserError
from base.image_names import ImageKeys
from base.names import name_of
from dataset.health.samples import ID_FIELDS, TINY, texts_of
from dataset.images.decode import size_of
from dataset.sources.json_entries import objects_of
from dataset.sources.records import image_names
from dataset.sources.shards import read_shard
from dataset.sources.tables import JSON, parse_address, rows_of
from dataset.text.wordpiece import Tokenizer, pre_caption

SECONDS = 2.0  # for everything
SAMPLED = 64  # samples of a source that are looked at
LETTERS = 100  # of a text that are looked at, for each token that is kept
SCANNED = 20_000  # entries whose ids and image names are compared
HELD_OUT = 5_000  # entries of a validation or test file
OFTEN = 0.1  # fraction of cut captions from which on they are reported
NOTICED = 0.05  # the same of images that are tiny or cannot be opened
MORE = "scripts/doctor.py looks at all samples; --check_data no starts without this look"


@dataclass
class Look:
    """What the samples of a source that were looked at have."""

    images: int = 0
    texts: int = 0
    cut: int = 0  # texts
    tiny: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # images that cannot be opened

    def findings(self, most: int | None) -> list[str]:
        """Each in a few words. most: tokens of a text that are kept."""
        found = []
        if self.texts and self.cut >= OFTEN * self.texts:
            found.append(
                f"{self.cut / self.texts:.0%} of captions exceed {most} tokens and are cut"
            )
        for names, what in ((self.closed, "cannot be opened"), (self.tiny, f"are under {TINY} px")):
            if names and len(names) >= NOTICED * self.images:
                found.append(f"{len(names)} of {self.images} images {what}, such as {names[0]}")
        return found


def look_over(
    sources: Sequence, collate: object, held_out: Mapping[str, Sequence[str]]
) -> list[str]:
    """What is noticed in the sources of a stream, a line each, and where to find out more.

    held_out: validation and test files by option; images of theirs that training has, too, are
    reported by name. A file that cannot be read is left to its own reader.
    """
    end = time.monotonic() + SECONDS
    lines = []
    for number, source in enumerate(sources):
        share = (end - time.monotonic()) / (len(sources) - number + bool(held_out))
        found = _look_at(source, collate, time.monotonic() + share)
        if found:
            lines.append(f"warning: {source.name}: {'; '.join(found)}")
    lines += shared_images(sources, held_out, end)
    return [*lines, MORE] if lines else []


def _look_at(source, collate: object, end: float) -> list[str]:
    lengths, most = text_length(collate)
    look = Look()
    for record in sampled(source):
        if time.monotonic() > end:
            break
        if isinstance(record, BadSample):
            continue
        _count_image(record, source.build, look)
        for text in _texts(record)[:SAMPLED]:  # one image may have a million
            look.texts += 1
            look.cut += most is not None and lengths(text[: LETTERS * most]) > most
    found = look.findings(most)
    records = records_of(source)
    if records is not None and (repeated := repeated_id(records, end)):
        found.append(f"{repeated} comes more than once")
    return found


def records_of(source) -> Sequence[dict] | None:
    """The annotations of a source, of a filtered one, too; None of shards."""
    source = getattr(source, "source", source)
    return getattr(source, "records", None)


def sampled(source) -> Iterator[dict | BadSample]:
    """SAMPLED records spread over the annotations, or the first of the first shard on this machine."""
    records = records_of(source)
    if records is not None:
        step = max(1, len(records) // SAMPLED)
        for number in range(0, len(records), step)[:SAMPLED]:
            yield records[number]
        return
    shards = getattr(getattr(source, "source", source), "shards", [])
    local = next((shard for shard in shards if "://" not in shard), None)
    if local is not None:
        yield from islice(read_shard(local), SAMPLED)


def text_length(collate: object):
    """(number of tokens of a text, how many of them the network takes), as a collate function says;
    (None, None) where it does not."""
    tokenizer = getattr(collate, "tokenizer", None)
    encode = getattr(tokenizer, "encode", None)
    if isinstance(tokenizer, Tokenizer):
        return (lambda text: len(encode(pre_caption(text, 1 << 20)))), collate.max_tokens
    if encode is None or not hasattr(tokenizer, "context_length"):
        return None, None
    return (lambda text: len(encode(text)) + 2), tokenizer.context_length  # start and end


def _texts(record: dict) -> list[str]:
    try:
        return texts_of(record)
    except BadSample:
        return []  # counted where it is drawn


def _count_image(record: dict, build: object, look: Look) -> None:
    name = name_of(record)
    for image in _images_of(record, build):
        look.images += 1
        try:
            sides = size_of(image)
        except BadSample:
            look.closed.append(name)
            continue
        if min(sides) < TINY:
            look.tiny.append(name)


def _images_of(record: dict, build: object) -> Sequence[Path | bytes]:
    """A record's images: encoded, or where they lie as the source's own reader finds them."""
    files = getattr(build, "files", None)
    if files is not None:  # SNLI-VE names images by their stems, NLVR2 two of them
        return files(record)
    image = record.get("image") or record.get("url")
    if isinstance(image, bytes):
        return [image]
    root = root_of(build, record)
    return [root / image] if root is not None and isinstance(image, str | Path) else []


def root_of(build: object, record: dict) -> Path | None:
    """The folder that the paths of a source's images start from."""
    roots = getattr(build, "roots", None)
    if isinstance(roots, Mapping):
        root = roots.get(record.get("dataset", "vqa"))
    else:
        root = getattr(build, "image_root", getattr(build, "root", None))
    return None if root is None else Path(root)


def repeated_id(records: Sequence[dict], end: float) -> str | None:
    """An id that two of the first entries share."""
    fields = [name for name in ID_FIELDS if name in records[0]]
    seen = set()
    for record in islice(records, SCANNED) if fields else ():
        for name in fields:
            key = (name, str(record.get(name)))
            if key in seen:
                return f"{name} {record[name]}"
            seen.add(key)
        if time.monotonic() > end:
            break
    return None


# ---- splits
def shared_images(
    sources: Sequence, held_out: Mapping[str, Sequence[str]], end: float
) -> list[str]:
    """A line for each held-out file whose images training has, too, by their names."""
    listed = [source for source in sources if records_of(source) is not None]
    if not (listed and held_out):
        return []
    known = set()
    for source in listed:
        records = records_of(source)
        keys = ImageKeys(root_of(source.build, records[0]) or "")
        step = max(1, len(records) // SCANNED)
        for number in range(0, len(records), step):
            known.update(map(keys, image_names(records[number])))
            if time.monotonic() > end:
                return []  # half a list of names would find half of them
    lines = []
    for option, files in held_out.items():
        for file in files:
            names = list(dict.fromkeys(map(keys, _held_out_names(file))))
            shared = [name for name in names if name in known]
            if shared:
                count = f"{len(shared):,} of {len(names):,} images"
                lines.append(f"warning: {option} {file}: training has {count}, too: {shared[0]}")
            if time.monotonic() > end:
                return lines
    return lines


def _held_out_names(file: str) -> Iterator[str]:
    path, columns = parse_address(file)
    try:
        rows: Iterable[dict]
        if path.suffix.lower() in JSON and not columns:
            rows = objects_of(path)
        else:
            rows = rows_of(path, ("image",), columns)
        for row in islice(rows, HELD_OUT):
            yield from image_names(row)
    except (UserError, OSError):
        return
