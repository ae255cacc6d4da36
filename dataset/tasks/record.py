"""What one record holds, whatever file it came from: its captions, its image, its id."""

from collections.abc import Hashable, Iterable
from pathlib import Path

from torch import Tensor

from base.errors import BadSample, brief
from base.image_names import ImageKeys
from base.names import name_of
from base.text import as_list, clean_surrogates, is_blank, lenient_text, text_of
from dataset.images.decode import decode_image
from dataset.sources.json_entries import weights_fault
from dataset.sources.shard_columns import json_in

CAPTION_FIELDS = ("caption", "captions/text")  # the second in TFRecords as COYO-ALIGN's
LABEL_FIELDS = ("labels", "label", "cls")  # the last is WebDataset's


def captions_of(record: dict) -> str | list[str]:
    """A record's caption: one text, or a list of one or more; numbers are texts, null among texts is
    none. BadSample where there is no caption."""
    field = next((name for name in CAPTION_FIELDS if name in record), None)
    if field is None:
        other = "; ?caption=MEMBER behind the shards names another" if "key" in record else ""
        raise BadSample(f"{name_of(record)}: no caption (.txt){other}")
    given = record[field]
    if isinstance(given, str):
        if "\n" in given.strip() and _packed(record):
            return _packed_captions(record) or clean_surrogates(given)
        return clean_surrogates(given)
    items = [item for item in as_list(given) if item is not None and item == item]
    found = [lenient_text(item) if isinstance(item, bytes) else text_of(item) for item in items]
    texts = [clean_surrogates(text) for text in found if text is not None]
    if not texts or len(texts) < len(found):
        raise BadSample(f"{name_of(record)}: {field} is {brief(given)}, not one or more texts")
    return texts


def labels_of(record: dict) -> tuple[str | None, dict]:
    """The field that holds a record's labels, none where there are none, and the record with what
    its .json in a shard holds. BadSample where that is damaged."""
    values = record
    if isinstance(record.get("json"), bytes):
        values = record | json_in(record["json"], f"{name_of(record)}.json")
    given = ((name, values.get(name)) for name in LABEL_FIELDS)
    return next((name for name, value in given if not is_nothing(value)), None), values


def is_nothing(value: object) -> bool:
    """Whether a field holds nothing: null, a blank text, or a list of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(is_nothing, value))
    return value in (None, b"") or value != value or (isinstance(value, str) and is_blank(value))


def weights_of(record: dict, captions: str | list[str]) -> list[float] | None:
    """The weights in `caption_weights` that training samples the record's captions by, one a
    caption: of an annotation, or of the .json in a shard. None where there are none, or nothing to
    choose. BadSample."""
    if isinstance(captions, str) or len(captions) < 2:
        return None
    weights = record.get("caption_weights")
    if _packed(record) and b"caption_weights" in record["json"]:
        weights = json_in(record["json"], name_of(record)).get("caption_weights")
    if weights is None:
        return None
    if fault := weights_fault(weights, len(captions)):
        raise BadSample(f"{name_of(record)}: {fault}")
    return weights


def _packed(record: dict) -> bool:
    """Whether .json may tell more of the captions: not of those that the address of a shard names."""
    return "caption_weights" not in record and isinstance(record.get("json"), bytes)


def _packed_captions(record: dict) -> list[str]:
    """The captions that scripts/data/pack.py notes in .json where an image has several; the .txt
    has one a line, as retrieval reads them."""
    captions = json_in(record["json"], name_of(record)).get("captions")
    several = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    return captions if several else []


def image_of(record: dict, root: str | Path = "") -> Tensor:
    """uint8 [3,H,W] of a record: its `pixels`, the encoded bytes or the path below `root` in
    `image` or `url`. BadSample."""
    if "pixels" in record:
        return record["pixels"]
    image = record.get("image")
    image = record.get("url") if image is None or image == "" else image
    if isinstance(image, bytes):  # none at all, too, are an unreadable image
        return decode_image(image, name_of(record))
    if not isinstance(image, str | Path) or not str(image):
        raise BadSample(f"{name_of(record)}: neither image nor url")
    return decode_image(Path(root) / image)


def by_image(rows: Iterable[tuple[str, list[str]]], root: Path) -> dict[str, list[str]]:
    """Captions by image, each image once, in the order of appearance, of rows (image below `root`,
    captions)."""
    keys = ImageKeys(root)
    found: dict[Hashable, tuple[str, list[str]]] = {}
    for image, captions in rows:
        found.setdefault(keys(image), (image, []))[1].extend(captions)
    return dict(found.values())
