"""Members of shards by name, where they are not img2dataset's: what stands behind the question mark
of `shards/{00000..00099}.tar?caption=json.text,alt&image=webp`.

    image=webp,png                     endings (features) of the image, the first that a sample has
    caption=json.text                  a key of a JSON member, at any depth: json.meta.text
    caption=json                       a JSON member that is a text or a list of texts
    caption=json.alt,syn.txt           several members make several captions, of which one is drawn
    caption=json.alt:0.3,json.syn:0.7  with the weights that training samples them by
    labels=json.tags  label_probs=…    of Classification.py and Recognition.py

The names stay at each shard's own name, so that whoever reads a shard finds them there.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

from base.errors import BadSample, UserError, brief
from base.reading import parse_json
from base.text import as_list, lenient_text
from dataset.images.formats import IMAGE_TYPES
from dataset.sources.tables import Columns, given_columns

NO_COLUMNS: Mapping[str, Columns] = MappingProxyType({})
FIELDS = ("image", "caption", "labels", "label_probs")
ADDRESS = re.compile(rf"(.+)\?((?:{'|'.join(FIELDS)})=.*)", re.DOTALL)


def split_columns(shard: str) -> tuple[str, str]:
    """(path or URL, what its question mark says of columns, or nothing)."""
    found = ADDRESS.fullmatch(shard) if "?" in shard else None  # shards may be very many
    return (found[1], found[2]) if found else (shard, "")


def plain_name(shard: str) -> str:
    """The path or URL alone."""
    return split_columns(shard)[0]


@lru_cache(256)
def parse_columns(query: str) -> Mapping[str, Columns]:
    """Field -> the members that hold it. UserError."""
    columns = {}
    for field, names in parse_qsl(query, keep_blank_values=True):
        if field not in FIELDS:
            raise UserError(f"?{query}: {field} is none of {', '.join(FIELDS)}")
        given = [name.strip().removeprefix(".") for name in names.split(",") if name.strip()]
        if not given:
            raise UserError(f"?{query}: no member given for {field}; write {field}=MEMBER")
        columns[field] = given_columns(f"?{query}", field, given)
    return columns


def columns_of(shard: str) -> Mapping[str, Columns]:
    """Field -> the members that a shard's name gives. UserError."""
    return parse_columns(split_columns(shard)[1])


def image_kinds(columns: Mapping[str, Columns]) -> tuple[str, ...]:
    """Endings of the image, in the order in which they are looked for."""
    return tuple(columns["image"].names) if "image" in columns else IMAGE_TYPES


def with_columns(record: dict, columns: Mapping[str, Columns]) -> dict | BadSample:
    """The record with its fields taken from the named members."""
    try:
        for field, given in columns.items():
            if field != "image":
                record = record | _field(record, field, given)
    except BadSample as error:
        return error
    if "labels" in columns:
        record.pop("json", None)  # other labels in it do not count
    return record


def _field(record: dict, field: str, given: Columns) -> dict:
    """The field, and the weights of its texts. BadSample where no member holds it."""
    value, weights = given.read({name: _value(record, name) for name in given.names})
    if value is None or value in ("", []):
        wanted = " or ".join(given.names)
        raise BadSample(f"{record['key']}: no {wanted} for {field}; it has {_members(record)}")
    # none, too, are said: those of other captions in .json do not count
    return {field: value} | ({"caption_weights": weights} if field == "caption" else {})


def _value(record: dict, name: str) -> object:
    """A member or feature, a JSON one as what it holds, or a key of a JSON member; None where there
    is none. BadSample."""
    parts = name.split(".")
    ends = range(len(parts), 0, -1)
    end = next((end for end in ends if ".".join(parts[:end]) in record), None)
    if end is None:
        return None
    member, keys = ".".join(parts[:end]), parts[end:]
    value = _plain(record[member])
    if not isinstance(value, str):
        return None if keys else value
    if not keys and parts[-1] != "json":
        return value
    found = json_in(value, f"{record['key']}.{member}", dict if keys else None)
    if not keys and isinstance(found, dict):
        some = f"{member}.{brief(next(iter(found), 'KEY'))[1:-1]}"
        raise BadSample(f"{record['key']}.{member}: an object; name one of its keys, as in {some}")
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def json_in(member: bytes | str, name: object, kind: type | None = dict) -> Any:
    """What a JSON member of a sample holds; name: of it in a message. NaN, as which img2dataset
    writes numbers that are missing, is null. BadSample."""
    try:
        return parse_json(member, name, kind, nan_is_null=True)
    except UserError as error:
        raise BadSample(str(error)) from None


def _plain(value: object) -> object:
    """Bytes as text, and a list of one as that one."""
    texts = [lenient_text(each) if isinstance(each, bytes) else each for each in as_list(value)]
    return texts[0] if len(texts) == 1 else texts


def _members(record: dict) -> str:
    names = [name for name in record if name not in ("key", "image")]
    if isinstance(record.get("json"), bytes):
        with suppress(BadSample):  # damaged
            keys = ", ".join(json_in(record["json"], record["key"]))
            names[names.index("json")] = f"json ({brief(keys)})"
    return ", ".join(names) or "nothing else"
