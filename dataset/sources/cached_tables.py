"""Tables, folders and data sets as JSON lines in the cache, which `Records` reads."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from base.caches import cache_folder, digest, one_builder
from base.errors import UserError
from base.limits import EXPANSION, TABLE_FLOOR, check_limit
from base.writing import write_json_lines
from dataset.sources.encoded_table import encoded_table, with_image_files
from dataset.sources.hub import is_hub, local_copy
from dataset.sources.left_out import LeftOut, report_left_out
from dataset.sources.published_lists import answers_beside, rows_as_published
from dataset.sources.tables import (
    JSON,
    TABLES,
    is_table,
    parquet_files,
    parse_address,
    path_state,
    rows_of,
)

TABLE_VERSION = 7  # part of the key of cached tables: raise it when cells are read otherwise


def json_lines_of(address: str | Path, required: Sequence[str]) -> Path:
    """The JSON lines file made of a table or folder, from the cache where nothing has changed;
    any other file as it is.

    required: fields every entry must have. Raises UserError that names file, row and remedy.
    """
    path, columns = parse_address(address)
    if not is_table(address):
        return _of_published(path)
    if is_hub(path):
        path = local_copy(path)
    if columns and not (path.suffix.lower() in (*TABLES, *JSON) or path.is_dir()):
        raise UserError(f"{address}: only tables and JSON have columns; name the file alone")
    if not (path.exists() or parquet_files(path)):
        raise UserError(f"{path}: no such annotation file; check the name in the configuration")
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise UserError(f"{path}: not a regular file; name a table or a folder")
    key = (TABLE_VERSION, sorted(required), sorted(columns.items()), path_state(path))
    target = cache_folder() / f"{path.stem.replace('*', '')}-{digest(*key)}.jsonl"

    def rows(left_out: LeftOut) -> Iterator[dict]:
        found = encoded_rows(address, path, required)
        found = found or rows_of(path, required, columns, left_out)
        return _bounded(found, path, left_out)

    return made_once(target, path, rows)


def made_once(target: Path, source: Path, rows: Callable[[LeftOut], Iterable[dict]]) -> Path:
    """The cached JSON lines file of a list's rows, whose unusable entries go to the LeftOut; said once
    a run. UserError."""
    left_out = LeftOut(source)
    _write_once(target, lambda: left_out.kept_behind(rows(left_out), target))
    report_left_out(target)
    return target


def _of_published(path: Path) -> Path:
    """The list that is made of a file as its makers publish it; any other file as it is."""
    rows = rows_as_published(path)
    if rows is None:
        return path
    key = (TABLE_VERSION, path_state(path), path_state(answers_beside(path)))
    target = cache_folder() / f"{path.stem}-{digest(*key)}.jsonl"
    _write_once(target, lambda: rows)
    return target


def _write_once(target: Path, rows: Callable[[], Iterator[dict]]) -> None:
    """Write a cached file that is not there yet, by one of the processes that want it. UserError."""
    try:
        with one_builder(target):
            if not target.exists():
                write_json_lines(target, rows())
    except OSError as error:
        raise UserError(f"{target}: not written ({error}); set QUINTET_CACHE") from None


def encoded_rows(address: str | Path, path: Path, required: Sequence[str]) -> Iterator[dict] | None:
    """The rows of a table that holds the encoded images themselves, which become files in the cache;
    None for any other."""
    if is_hub(str(parse_address(address).path)):
        return None  # whose images are files already
    try:
        table = encoded_table(str(address), dict.fromkeys(("image", *required)))
    except UserError:  # which names the faults of reading it as any table again
        return None
    folder = cache_folder() / f"{path.stem.replace('*', '')}-images-{digest(path_state(path))}"
    return table and with_image_files(table, folder)


def _bounded(rows: Iterable[dict], path: Path, left_out: LeftOut) -> Iterator[dict]:
    """The rows; UserError where there is none, too many are unusable, or the file is small and they
    have no end."""
    stored = 0 if path.is_dir() else sum(map(os.path.getsize, parquet_files(path) or [path]))
    limit = max(TABLE_FLOOR, EXPANSION * stored)
    size = -1
    for row in rows:
        size += sum(_length(value) for value in row.values())
        if not path.is_dir():
            check_limit(path, size, limit, "bytes of text", "fetch it again")
        yield row
    left_out.check()
    if size < 0:
        raise UserError(f"{path}: empty: names of columns and no rows; fetch it again")


def _length(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str) else 8
