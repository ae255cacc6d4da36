"""Text and whole numbers as files of others write them."""

import codecs
import math
import re
import unicodedata
from typing import Any

WHOLE_NUMBER = re.compile(r"([+-]?\d{1,18})(\.0{1,6})?")  # fits into 64 bits; may be a float's text


POINTER = b"version https://git-lfs.github.com"
SIGNS = {  # how a file begins that is something else than it should be -> what it is
    POINTER: "a pointer of Git LFS, in whose place `git lfs pull` puts the file",
    b"<!doctype html": "a web page, which servers send in place of a file",
    b"<html": "a web page, which servers send in place of a file",
    b"\x1f\x8b": "a gzip file, which is to be unpacked first",
    b"BZh": "a bzip2 file, which is to be unpacked first",
    b"\xfd7zxz": "an xz file, which is to be unpacked first",
    b"PK\3\4": "a zip file",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd, which is to be unpacked first",
    b"PAR1": "a Parquet file, whose name must end in .parquet",
    b"ARROW1": "an Arrow or Feather file, which is to be saved as Parquet",
    b"%pdf": "a PDF",
    b"<svg": "SVG, which has no pixels",
    b"<?xml": "XML, such as SVG, which has no pixels",
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as UTF-16's
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def looks_like(start: bytes) -> str:
    """` (it looks like ...)` for messages about a file that begins so and cannot be read, or nothing.
    Text with every second byte zero is UTF-16 without its mark."""
    head = start[:64].lower()
    found = next((what for sign, what in SIGNS.items() if head.startswith(sign.lower())), "")
    if head[4:8] == b"ftyp" and head[8:11] != b"avi":
        found = "HEIC, which is to be converted" if head[8:10] in (b"he", b"mi") else "a film"
    if not found and len(head) >= 8 and (not any(head[1:8:2]) or not any(head[0:8:2])):
        found = "UTF-16" if any(head[:2]) and any(head[2:4]) else ""
    return f" (it looks like {found})" if found else ""


def encoding_of(start: bytes) -> str:
    """UTF-8, or UTF-16 where a text begins with its byte order mark, as Windows's programs and
    spreadsheets write it."""
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if marked and not start.startswith(codecs.BOM_UTF32_LE) else "utf-8-sig"


def lenient_text(data: bytes) -> str:
    """UTF-8 or UTF-16 text without its byte order mark; bytes that are neither become U+FFFD."""
    return data.decode(encoding_of(data[:4]), "replace")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: blanks, control characters, zero-width ones, a byte order mark."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def composed(name: object) -> str:
    """A name as Unicode composes it (NFC): macOS stores file names decomposed."""
    return unicodedata.normalize("NFC", str(name))


def as_list(value: Any) -> list:
    """A list or tuple as a list, anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def lines_in(text: str) -> list[str]:
    """The lines of a text. They end with LF or CR LF and with nothing else, as vocabularies need;
    with CR alone where there is no LF at all, as old Macs wrote them."""
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def whole_number(value: object) -> int | None:
    """The whole number that a value is or spells: 3, 3.0, "3", "3.0", b" 3\\n"; None for any other."""
    if isinstance(value, bytes):
        value = lenient_text(value)
    if isinstance(value, str):
        spelt = WHOLE_NUMBER.fullmatch(value.strip())
        return int(spelt[1]) if spelt else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text_of(value: object) -> str | None:
    """A text as it is, a number as its text (5.0, of pandas beside missing ones, as 5); None for NaN
    and whatever else is no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    whole = whole_number(value)
    return str(value if whole is None else whole)


def id_text(value: object) -> str:
    """An id as text, the same however a program wrote it: 5, 5.0 (pandas, beside missing ones) and "5"
    are one; "05" is another. Raises TypeError for what is no id."""
    if isinstance(value, str):
        spelt = WHOLE_NUMBER.fullmatch(value)
        return spelt[1] if spelt else value
    whole = whole_number(value.item() if hasattr(value, "item") else value)  # of NumPy
    if whole is None:
        raise TypeError(f"{value!r:.60} is no id")
    return str(whole)


def clean_surrogates(value: Any) -> Any:
    """Text, or plain data with text in it, with each lone surrogate as U+FFFD: UTF-8 cannot hold
    one."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [clean_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {clean_surrogates(key): clean_surrogates(each) for key, each in value.items()}
    return value
