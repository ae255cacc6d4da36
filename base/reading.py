"""Text and JSON files: read strictly, within the limits of `base.limits`."""

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.limits import NESTED_LEVELS, TEXT_BYTES
from base.text import clean_surrogates, lines_in, looks_like

NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: str | Path, remedy: str = "check its name", limit: int = TEXT_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes. UserError ends with `remedy`."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{path}: not a regular file; {remedy}")
            if about.st_size > limit:
                raise UserError(f"{path}: {about.st_size:,} bytes, more than {limit:,}; {remedy}")
            return file.read()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise UserError(f"{path}: {what}; {remedy}") from None


def is_file(path: str | Path) -> bool:
    """Whether there is such a regular file: not by a name that is too long, holds a zero byte or lies
    in a folder that may not be read, either."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_start(path: str | Path, count: int = 64) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            return file.read(count) or b""
    except OSError:
        return b""


def first_letter(path: str | Path) -> bytes:
    """The first byte of a text file that is neither blank nor of its byte order mark; b"" where a
    kibibyte holds none."""
    return read_start(path, 1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer would wait for ever


def read_text(path: str | Path, remedy: str = "check its name", limit: int = TEXT_BYTES) -> str:
    """A UTF-8 text file without its byte order mark, line ends as they are. UserError."""
    data = read_bytes(path, remedy, limit)
    try:
        if b"\0" in data[:8] and (seen := looks_like(data)):  # English UTF-16 is UTF-8, too
            raise UserError(f"{path}: not UTF-8{seen}; save it as UTF-8, or fetch it again")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = (
            f"{path}: not UTF-8 at byte {error.start}{looks_like(data)}; save it as UTF-8, "
            "or fetch it again"
        )
        raise UserError(message) from None


def read_lines(path: str | Path, remedy: str = "check its name") -> list[str]:
    """Lines of a text file (see `base.text.lines_in`)."""
    return lines_in(read_text(path, remedy))


def read_json(
    path: str | Path,
    kind: type | None = None,
    remedy: str = "fix or fetch the file again",
    limit: int = TEXT_BYTES,
) -> Any:
    """Content of a JSON file; kind: dict or list where it must be one. UserError names file and
    position."""
    return parse_json(read_bytes(path, remedy, limit), path, kind, remedy)


def parse_json(
    data: bytes | str,
    name: object,
    kind: type | None = None,
    remedy: str = "fix or fetch the file again",
    nan_is_null: bool = False,
) -> Any:
    """The value that JSON text holds; `name` is what UserError blames.

    Takes UTF-8, UTF-16 and UTF-32, each with or without a byte order mark. Refuses NaN and
    Infinity, which JSON does not know (nan_is_null: takes them for null), a key that an object has
    twice, and nesting deeper than NESTED_LEVELS. A lone surrogate (half an emoji) becomes U+FFFD."""
    try:
        if isinstance(data, bytes):
            encoding = json.detect_encoding(data)
            text = data.decode(encoding)
            data = data if encoding.startswith("utf-8") else text.encode("utf-8", "surrogatepass")
        else:
            text = data
            data = data.encode("utf-8", "surrogatepass")
        if too_deep(data):
            raise ValueError(f"nested deeper than {NESTED_LEVELS} levels")
        constant = _null if nan_is_null else _no_constant
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not valid JSON: not UTF-8 at byte {error.start}{looks_like(data)}; {remedy}"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        seen = looks_like(data[:64])
        raise UserError(f"{name}: not valid JSON at {where}: {error.msg}{seen}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {str(error)[:200]}; {remedy}") from None
    if kind is not None and not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}[kind]
        raise UserError(f"{name}: expected {expected}, found {type(value).__name__}; {remedy}")
    return clean_surrogates(value) if SURROGATE_ESCAPE.search(data) else value


def parse_entry(data: bytes) -> Any:
    """The value of JSON text that was checked before; a lone surrogate becomes U+FFFD."""
    value = json.loads(data)
    return clean_surrogates(value) if SURROGATE_ESCAPE.search(data) else value


def parse_first_entry(data: bytes) -> Any:
    """As `parse_entry`, of text with more behind the value."""
    value, _ = json.JSONDecoder().raw_decode(data.decode())
    return clean_surrogates(value) if SURROGATE_ESCAPE.search(data) else value


def read_json_lines(path: str | Path) -> Iterator[dict]:
    """The objects of a JSON lines file in order; blank lines are skipped. UserError names file and
    line."""
    for number, line in enumerate(read_lines(path, "fix or fetch the file again"), 1):
        if line.strip():
            yield parse_json(line, f"{path}, line {number}", dict)


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key that stands twice in an object, given as json's object_pairs_hook gets it."""
    if len(dict(pairs)) == len(pairs):
        return None
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return dict(pairs)


def _no_constant(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no JSON number")


def _null(text: str) -> None:
    return None


def too_deep(data: bytes) -> bool:
    """Whether JSON text nests deeper than NESTED_LEVELS: peels off innermost pairs of brackets, level
    by level."""
    if data.count(b"[") + data.count(b"{") <= NESTED_LEVELS:
        return False
    brackets = data.translate(None, NOT_BRACKETS)
    for _ in range(NESTED_LEVELS):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not brackets:
            return False
    depth = 0  # too deep, or brackets inside strings do not pair
    for match in STRING_OR_BRACKET.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > NESTED_LEVELS:
            return True
    return False
