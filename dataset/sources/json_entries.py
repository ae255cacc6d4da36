"""Walking through the entries of a JSON list or JSON lines file of any size in bounded memory."""

import codecs
import json
import math
import mmap
import re
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

from base.errors import UserError
from base.limits import ENTRY_BYTES, NESTED_LEVELS
from base.reading import parse_entry, repeated_key, too_deep
from base.text import looks_like

CHUNK = 4 << 20  # bytes read at a time
EXPECTED = "expected a JSON list of objects, or one object per line"
TOKEN_LINE = re.compile(rb"[^\t\n]+#\d+\t")
TOKENS = (
    "these are Flickr30k's lines IMAGE#NUMBER<tab>CAPTION: save them as .tsv with a first line "
    "image<tab>caption and without the #NUMBER"
)
TABLE_LINE = re.compile(rb'"?(?:image|file|path|url)\w*"?[,\t]', re.IGNORECASE)
TABLE = "this is a table by its first line: give it the ending .csv, or with tabs .tsv"
SBU_START = re.compile(rb'\s*\{\s*"(?:captions|image_urls|user_ids)"\s*:\s*\[')
SBU = (
    "these are SBU's own lists: fetch the images with img2dataset, whose shards train, or write a "
    ".tsv with a first line image<tab>caption"
)


class RepeatedKey(str):
    """In place of an entry in which an object has this key twice: no one knows which value is meant."""

    @property
    def fault(self) -> str:
        return f"the key {str(self)!r:.60} stands twice; leave one of them out"


def parse_entries(path: Path) -> Iterator[tuple[int, object]]:
    """`(byte offset, parsed entry)` for every entry, in order; a RepeatedKey in place of one that
    has a key twice. Raises UserError naming entry and line on bad syntax.

    The bytes are parsed as Latin-1, which makes one character of each: JSON's structure is ASCII,
    so that places in the text are places in the file. Texts in the parsed entries are therefore
    garbled where they are not ASCII.
    """
    with path.open("rb") as file:
        window = _Window(path, file)
        opening = window.skip(" \t\r\n\xef\xbb\xbf")  # the last three are UTF-8's byte order mark
        if opening not in ("[", "{"):
            known = {TOKENS: TOKEN_LINE, TABLE: TABLE_LINE}
            fitting = (what for what, line in known.items() if line.match(window.start))
            expected = next(fitting, EXPECTED)
            seen = looks_like(window.start)
            raise UserError(f"{path}: begins with {opening!r}{seen}; {expected}")
        if opening == "[":
            yield from _list_entries(window)
        else:
            while window.skip():
                yield window.next_entry()
        if window.skip():
            raise window.error("text after the end of the list")


def weights_fault(weights: object, texts: int) -> str | None:
    """What is wrong with an entry's `caption_weights`, of which there must be one a text."""
    if not isinstance(weights, list) or len(weights) != texts:
        return f"caption_weights must be a list of {texts} numbers, one a caption"
    for weight in weights:
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            return f"caption_weights: {weight!r} is no number above 0; fix it or leave it out"
    return None


def objects_of(path: Path) -> Iterator[dict]:
    """Every entry of a file, in order, with its texts as they are. UserError, also where one is no
    object."""
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file; {EXPECTED}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        checked = chain(parse_entries(path), [(len(data), None)])
        for number, ((start, seen), (after, _)) in enumerate(pairwise(checked)):
            if isinstance(seen, RepeatedKey):
                raise UserError(f"{locate(path, number, start)}: {seen.fault}")
            end = data.rfind(b"}", start, after) + 1  # leaves out the comma or bracket behind it
            try:
                entry = parse_entry(data[start:end])
            except ValueError:
                entry = None
            if type(entry) is not dict:
                raise UserError(f"{locate(path, number, start)}: no object; {EXPECTED}")
            yield entry


def _list_entries(window: "_Window") -> Iterator[tuple[int, object]]:
    window.place += 1
    separator = window.skip()
    while separator != "]":
        yield window.next_entry()
        separator = window.skip()
        if separator not in (",", "]"):
            raise window.error(f"expected ',' or ']', found {separator or 'the end of the file'!r}")
        window.place += separator == ","
    window.place += 1


class _Window:
    """The part of a file around the place being parsed."""

    def __init__(self, path: Path, file):
        self.path = path
        self.file = file
        self.text, self.place, self.offset = "", 0, 0  # offset: where the text begins in the file
        self.number = 0  # of the entry being parsed
        self.start = b""  # how the file begins
        self.repeated: RepeatedKey | None = None  # in the entry being parsed
        self.decode_entry = json.JSONDecoder(object_pairs_hook=self._object).raw_decode
        self.check_utf8 = codecs.getincrementaldecoder("utf-8")().decode

    def next_entry(self) -> tuple[int, object]:
        """Parses one entry and moves behind it, reading on as long as it may be incomplete."""
        self.skip()
        while True:
            self.repeated = None
            try:
                entry, end = self.decode_entry(self.text, self.place)
                deep = too_deep(self.text[self.place : end].encode("latin-1"))
                break
            except RecursionError:
                deep = True
                break
            except ValueError as error:
                if len(self.text) - self.place > ENTRY_BYTES or not self._extend():
                    reason = f"{error.args[0].split(':')[0]}){looks_like(self.start)}"
                    reason += f"; {SBU}" if SBU_START.match(self.start) else ""
                    raise self.error(f"not valid JSON ({reason}") from None
        if deep:  # for whoever walks through it
            raise self.error(f"nested deeper than {NESTED_LEVELS} levels")
        start, self.place = self.offset + self.place, end
        self.number += 1
        return start, entry if self.repeated is None else self.repeated

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        if (name := repeated_key(pairs)) is not None:
            self.repeated = RepeatedKey(name)
        return dict(pairs)

    def skip(self, blanks: str = " \t\r\n") -> str:
        """Moves over blanks; the character found there, "" at the end of the file."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in blanks:
                    return self.text[self.place]
                self.place += 1
            if not self._extend():
                return ""

    def error(self, what: str) -> UserError:
        at = locate(self.path, self.number, self.offset + self.place)
        return UserError(f"{at}: {what}; fix it there, or write the file again if it is cut off")

    def _extend(self) -> bool:
        """Forgets what is parsed and reads on; False at the end of the file."""
        data = self.file.read(CHUNK)
        self.start = self.start or data[:64]
        try:
            self.check_utf8(data, final=not data)
        except UnicodeDecodeError as error:
            near = self.offset + len(self.text) + error.start
            raise UserError(
                f"{self.path}: not UTF-8 near byte {near}{looks_like(self.start)}; save the file "
                "as UTF-8"
            ) from None
        self.text = self.text[self.place :] + data.decode("latin-1")
        self.offset += self.place
        self.place = 0
        return bool(data)


def locate(path: Path, number: int, offset: int) -> str:
    """For messages: the file, the entry's number and its line."""
    line = 1
    with path.open("rb") as file:
        while offset > 0 and (data := file.read(min(CHUNK, offset))):
            line += data.count(b"\n")
            offset -= len(data)
    return f"{path}, entry {number} (the first is 0), line {line}"
