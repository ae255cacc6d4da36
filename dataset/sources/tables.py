"""Own data in other forms than JSON: tables (CSV, TSV, Parquet), Hugging Face data sets saved to
disk, and folders of images with captions beside them.

Each becomes JSON lines once, in the cache, which `Records` then reads like any annotation file:

    pairs.csv  pairs.tsv  pairs.parquet      a row an entry; columns by their usual names
    pairs.csv?image=url&caption=title,alt    columns by name; several columns make several captions
    folder/                                  IMAGE.jpg with IMAGE.txt beside it, a caption a line;
                                             or what metadata.csv / metadata.jsonl in it lists
    folder/                                  of datasets' save_to_disk
"""

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from base.errors import UserError, brief
from base.files import (
    cache_folder,
    digest,
    file_state,
    nearest,
    one_builder,
    read_bytes,
    read_json_lines,
    states_digest,
    write_json_lines,
)
from base.limits import CELL_BYTES, EXPANSION, TABLE_FLOOR, check_limit, over_limit
from dataset.images.formats import files_below, is_image

TABLES = (".csv", ".tsv", ".parquet")
BATCH_ROWS = 4096  # of a Parquet file that are in memory at a time
# What columns are called in the wild: field of an entry -> names of the column that holds it.
USUAL_NAMES = {
    "image": (
        *("filepath", "file_path", "image_path", "file_name", "filename", "path", "img"),
        *("image_file", "image_name", "image_id"),
    ),
    "caption": ("captions", "title", "text", "txt", "sentence", "alt_text", "description"),
    "text": ("expression", "sentence", "caption"),
    "answer": ("answers",),
    "labels": ("label", "class"),
}
METADATA = ("metadata.csv", "metadata.jsonl")  # of datasets' image folders
PACK = "pack them into shards with scripts/data/pack.py"


class Table(NamedTuple):
    """An annotation file with the columns that its address names: field -> column names."""

    path: Path
    columns: dict[str, list[str]]


def parse_address(address: str | Path) -> Table:
    """`FILE?field=column&field=column,column`; a file that is called so wins. UserError."""
    text = str(address)
    path, mark, query = text.rpartition("?")
    if not mark or Path(text).exists():
        return Table(Path(text).expanduser(), {})
    columns = {}
    for field, names in parse_qsl(query, keep_blank_values=True):
        columns[field] = [name.strip() for name in names.split(",") if name.strip()]
        if not columns[field]:
            raise UserError(f"{text}: no column given for {field}; write FILE?{field}=COLUMN")
    if not columns:
        raise UserError(f"{text}: expected FILE?field=column behind the question mark")
    return Table(Path(path).expanduser(), columns)


def is_table(address: str | Path) -> bool:
    """Whether an annotation file has one of the forms of this module."""
    path = parse_address(address).path
    return path.suffix.lower() in TABLES or path.is_dir()


def json_lines_of(
    address: str | Path, required: Sequence[str], cache_dir: str | Path | None = None
) -> Path:
    """The JSON lines file made of a table or folder, from the cache where nothing has changed;
    any other file as it is.

    required: fields every entry must have. Raises UserError that names file, row and remedy.
    """
    path, columns = parse_address(address)
    if not is_table(address):
        if columns:
            raise UserError(f"{address}: only tables have columns; name the file alone")
        return path
    if not path.exists():
        raise UserError(f"{path}: no such annotation file; check the name in the configuration")
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"{path}: not a regular file; name a table or a folder")
    key = (sorted(required), sorted(columns.items()), _state(path))
    target = cache_folder(cache_dir) / f"{path.stem}-{digest(*key)}.jsonl"
    try:
        with one_builder(target):
            if not target.exists():
                rows = rows_of(path, required, columns)
                write_json_lines(target, _bounded(rows, path))
    except OSError as error:
        raise UserError(f"{target}: not written ({error}); set QUINTET_CACHE") from None
    return target


def _bounded(rows: Iterable[dict], path: Path) -> Iterator[dict]:
    """The rows; UserError where there is none, or the file is small and they have no end."""
    stored = 0 if path.is_dir() else os.path.getsize(path)
    limit = max(TABLE_FLOOR, EXPANSION * stored)
    size = -1
    for row in rows:
        size += sum(_length(value) for value in row.values())
        if not path.is_dir():
            check_limit(path, size, limit, "bytes of text", "fetch it again")
        yield row
    if size < 0:
        raise UserError(f"{path}: empty: names of columns and no rows; fetch it again")


def _length(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str) else 8


def _state(path: Path) -> object:
    return states_digest(files_below(path)) if path.is_dir() else file_state(path)


def rows_of(
    path: Path, required: Sequence[str], columns: dict[str, list[str]] | None = None
) -> Iterator[dict]:
    """Entries with the required fields, and every column that is not one of them as it is."""
    columns = columns or {}
    if path.is_dir():
        yield from _folder_rows(path, required, columns)
    elif path.suffix.lower() == ".parquet":
        file = open_parquet(path)
        rows = _batch_rows(path, file.iter_batches(batch_size=BATCH_ROWS))
        yield from _entries(path, file.schema_arrow.names, rows, required, columns)
    else:
        yield from _csv_rows(path, required, columns)


# ---- tables
def _csv_rows(path: Path, required: Sequence[str], columns: dict) -> Iterator[dict]:
    csv.field_size_limit(CELL_BYTES)
    try:
        with path.open(encoding=_encoding(path), errors="surrogatepass", newline="") as file:
            head = file.readline(CELL_BYTES)
            separator = max("\t", ",", ";", key=head.count)  # the first where none occurs
            file.seek(0)
            rows = csv.reader(_lines(file, path), delimiter=separator, strict=True)
            names = [name.strip() for name in next(rows, [])]
            _check_unique(path, names)
            filled = (row for row in rows if row)
            yield from _entries(path, names, _by_name(path, names, filled), required, columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: no table ({error}); save it as CSV with quoted texts") from None


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 where the file begins with its byte order mark, as spreadsheets write it."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _lines(file, path: Path) -> Iterator[str]:
    """The lines of a text file, none of which may be longer than a cell."""
    while line := file.readline(CELL_BYTES):
        if len(line) == CELL_BYTES:
            raise UserError(over_limit(path, len(line), CELL_BYTES - 1, "characters in a line"))
        yield line


def _check_unique(path: Path, names: list[str]) -> None:
    twice = [name for number, name in enumerate(names) if name and name in names[:number]]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]}; rename one")


def _by_name(path: Path, names: list[str], rows: Iterable[list[str]]) -> Iterator[dict]:
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise UserError(
                f"{path}, row {number}: {len(row)} cells under {len(names)} names; quote texts that "
                "hold the separator"
            )
        yield dict(zip(names, map(_cell, row), strict=True))


def _cell(text: str) -> object:
    """A cell's text; a JSON list in it is a list."""
    if text[:1] == "[" and text[-1:] == "]":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


@contextmanager
def reading_arrow(path: Path, what: str = "damaged") -> Iterator[None]:
    """What pyarrow raises inside becomes a UserError."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: {what} ({brief(str(error))}); fetch it again") from None


def open_parquet(path: Path):
    """pyarrow's ParquetFile, whose texts stay dictionaries: a small file may mean one text a million
    times. UserError."""
    from pyarrow import parquet, types

    with reading_arrow(path, "no Parquet file"):
        schema = parquet.read_schema(path)
        texts = [field.name for field in schema if types.is_string(field.type)]
        return parquet.ParquetFile(path, read_dictionary=texts)


def open_arrow(folder: Path) -> list:
    """pyarrow's readers of the files of a saved data set, which stay on disk. UserError."""
    import pyarrow
    from pyarrow import ipc

    files = sorted(file for file in folder.glob("*.arrow") if file.is_file())
    if not files:
        raise UserError(f"{folder}: no data-*.arrow in it; save the data set again")
    with reading_arrow(folder, "no Arrow stream"):
        return [ipc.open_stream(pyarrow.memory_map(str(file))) for file in files]


def _batch_rows(path: Path, batches: Iterable) -> Iterator[dict]:
    with reading_arrow(path):
        for batch in batches:
            step = rows_at_a_time(path, batch)
            for start in range(0, len(batch), step):
                yield from batch.slice(start, step).to_pylist()


def rows_at_a_time(path: Path, part) -> int:
    """How many rows of pyarrow's batch or table may become Python's objects at once: cells of a
    dictionary are one text there, but one each here. Checks its offsets: they may point anywhere."""
    from pyarrow import compute, types

    part.validate(full=True)
    longest = 1
    for column in part.columns:
        kind = column.type
        if types.is_dictionary(kind) and types.is_string(kind.value_type):
            chunks = getattr(column, "chunks", [column])
            texts = [chunk.dictionary for chunk in chunks]
        else:
            texts = [column] if types.is_string(kind) else []
        for values in texts:
            longest = max(longest, compute.max(compute.binary_length(values)).as_py() or 0)
    check_limit(path, longest, CELL_BYTES, "bytes in a cell", "fetch it again")
    return max(1, min(BATCH_ROWS, CELL_BYTES // longest))


def _entries(
    path: Path, names: list[str], rows: Iterable[dict], required: Sequence[str], columns: dict
) -> Iterator[dict]:
    """The rows with their columns under the names of the fields they hold."""
    used = {field: column_names(path, field, names, required, columns) for field in required}
    used |= {field: _known(path, given, names) for field, given in columns.items()}
    taken = {name for given in used.values() for name in given}
    read = {field: _reader(given) for field, given in used.items()}
    for number, row in enumerate(rows, 1):
        entry = {name: plain(value) for name, value in row.items() if name not in taken}
        for field, value_of in read.items():
            entry[field] = _checked(value_of(row), field, f"{path}, row {number}")
        yield entry


def column_names(
    path: Path, field: str, names: list[str], required: Sequence[str], columns: dict
) -> list[str]:
    """The columns that hold a field: those named, the one of its name, or a usual one."""
    if field in columns:
        return columns[field]
    if field in names:
        return [field]
    lower = {name.lower(): name for name in reversed(names)}
    for usual in (field, *USUAL_NAMES.get(field, ())):
        if usual in lower and usual not in required:
            return [lower[usual]]
    listed = ", ".join(names[:12]) or "none"
    raise UserError(
        f"{path}: no column for {field} (it has {listed}); name it: {path}?{field}=COLUMN"
    )


def _known(path: Path, given: list[str], names: list[str]) -> list[str]:
    for name in given:
        if name not in names:
            like = nearest(name, names)
            hint = f"; did you mean {like}?" if like else f"; it has {', '.join(names[:12])}"
            raise UserError(f"{path}: no column {name}{hint}")
    return given


def _reader(given: list[str]) -> Callable[[dict], object]:
    if len(given) == 1:
        return lambda row: row[given[0]]
    return lambda row: [row[name] for name in given if row[name]]


def plain(value: object) -> object:
    """A value that JSON can hold; bytes and dates as text."""
    if value is None or isinstance(value, str | int | float | list | dict):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _checked(value: object, field: str, where: str) -> object:
    """A field's value; images must be paths, and several labels are parted by commas."""
    if field == "labels" and isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if field != "image":
        return plain(value)
    if isinstance(value, dict):  # datasets' images: {bytes, path}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        raise UserError(f"{where}: holds the encoded image, not its path; {PACK}")
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: {brief(value)} is no path of an image; fix or remove the row")
    return str(value)


# ---- folders
def _folder_rows(folder: Path, required: Sequence[str], columns: dict) -> Iterator[dict]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))
        raise UserError(f"{folder}: several splits; name one: {folder}/{(splits or ['train'])[0]}")
    if (folder / "dataset_info.json").is_file():
        streams = open_arrow(folder)
        rows = (row for stream in streams for row in _batch_rows(folder, stream))
        yield from _entries(folder, streams[0].schema.names, rows, required, columns)
        return
    for name in METADATA:
        if (folder / name).is_file():
            yield from _metadata_rows(folder, folder / name, required, columns)
            return
    if set(required) - {"image", "caption"}:
        raise UserError(f"{folder}: a folder gives images and captions; name an annotation file")
    yield from image_text_rows(folder, need_caption="caption" in required)


def _metadata_rows(folder: Path, file: Path, required: Sequence[str], columns: dict):
    """What metadata.csv or metadata.jsonl lists; its paths start from the folder."""
    if file.suffix == ".csv":
        rows = _csv_rows(file, required, columns)
    else:
        lines = list(read_json_lines(file))
        names = list(dict.fromkeys(name for line in lines for name in line))
        whole = ({name: line.get(name) for name in names} for line in lines)
        rows = _entries(file, names, whole, required, columns)
    for row in rows:
        yield {**row, "image": str(folder.absolute() / row["image"])}


def image_text_rows(folder: Path, need_caption: bool = True) -> Iterator[dict]:
    """{image: absolute path, caption: [lines]} of every image below a folder with a .txt of its
    name beside it; images without one are counted and said."""
    lonely, found = 0, 0
    for path in files_below(folder.absolute()):
        if not is_image(path):
            continue
        beside = path.with_suffix(".txt")
        if not need_caption:
            found += 1
            yield {"image": str(path)}
        elif beside.is_file():
            data = read_bytes(beside, "put a caption a line into it", CELL_BYTES)
            text = data.decode("utf-8-sig", errors="replace")
            found += 1
            yield {
                "image": str(path),
                "caption": [line for line in text.splitlines() if line.strip()],
            }
        else:
            lonely += 1
    if not found:
        what = f"{lonely:,} images without a .txt beside them" if lonely else "no images"
        raise UserError(
            f"{folder}: {what}; put IMAGE.txt beside IMAGE.jpg, or name a table with a caption column"
        )
    if lonely:
        print(f"{folder}: {lonely:,} images have no .txt beside them and are left out")
