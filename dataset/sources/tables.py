"""Own data in other forms than JSON: tables (CSV, TSV, Parquet), Hugging Face data sets saved to
disk, and folders of images with captions beside them.

Each becomes JSON lines once (see dataset.sources.cached_tables), which `Records` then reads like any
annotation file:

    pairs.csv  pairs.tsv  pairs.parquet      a row an entry; columns by their usual names
    pairs.csv?image=url&caption=title,alt    columns by name; several columns make several captions
    pairs.jsonl?caption=alt:0.3,synthetic:0.7   with the weights that training samples them by; JSON
                                             files may name columns, too
    folder/                                  IMAGE.jpg with IMAGE.txt or .caption beside it, a caption
                                             a line; or what metadata.csv, .jsonl or .parquet in it lists
    folder/                                  of datasets' save_to_disk
    folder/                                  of Parquet files, as data sets of the hub come in, or
    folder/train-*.parquet                   those of one split
    hf://USER/NAME:SPLIT                     of the Hugging Face hub (see dataset.sources.hub)
"""

import ast
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from base.caches import file_state, states_digest
from base.errors import BadSample, UserError, brief
from base.image_names import BESIDE, FETCH, text_beside
from base.limits import CELL_BYTES, check_limit, over_limit
from base.names import SHARD_ENDING, matching_files, nearest
from base.reading import read_bytes, read_json, read_start, too_deep
from base.text import (
    as_list,
    encoding_of,
    is_blank,
    lenient_text,
    lines_in,
    looks_like,
    whole_number,
)
from dataset.images.formats import files_below, is_image
from dataset.sources.hub import is_hub, local_copy
from dataset.sources.json_entries import objects_of
from dataset.sources.left_out import LeftOut

JSON = (".json", ".jsonl")
TABLES = (".csv", ".tsv", ".parquet")
ONE_TEXT = r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*"""
PYTHON_TEXTS = re.compile(rf"\[{ONE_TEXT}(?:,{ONE_TEXT})*\]")  # how pandas saves a list of texts
BATCH_ROWS = 4096  # of a Parquet file that are in memory at a time
# What columns are called in the wild: field of an entry -> names of the column that holds it.
USUAL_NAMES = {
    "image": (
        *("filepath", "file_path", "image_path", "file_name", "filename", "path", "img"),
        *("image_file", "image_name", "image_id", "jpg", "jpeg", "png", "webp"),
    ),
    "caption": (
        *("captions", "title", "text", "txt", "sentence", "alt_text", "description"),
        "comment",  # Flickr30k's results.csv
    ),
    "text": ("expression", "sentence", "caption"),
    "answer": ("answers", "direct_answers"),  # the last of A-OKVQA
    "labels": ("label", "class"),
}
SAVED = "dataset_info.json"  # in a data set of datasets' save_to_disk
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of datasets' image folders
NUMBER_OF_PART = re.compile(r"[-_.]?\d+(-of-\d+)?$")  # at the end of a file's name
PACK = (
    "pack them into shards (python scripts/data/pack.py --data THIS --target FOLDER) and name the "
    "folder with --shards"
)


class Columns(NamedTuple):
    """The columns that hold a field; weights: of each in the sampling of captions, none = equal."""

    names: list[str]
    weights: list[float] | None = None

    def read(self, row: dict) -> tuple[object, list[float] | None]:
        """The value of the field in a row, and with `weights` that of every text in it: a column
        that holds several texts shares its weight among them."""
        if self.weights is None:
            values = [_listed(row[name]) for name in self.names]
            if len(values) == 1:
                return values[0], None
            return [each for value in values if value for each in as_list(value)], None
        texts: list[object] = []
        weights: list[float] = []
        for name, weight in zip(self.names, self.weights, strict=True):
            found = [text for text in as_list(_listed(row[name])) if text]
            if found:
                texts += found
                weights += [weight / len(found)] * len(found)
        return texts, weights


class Table(NamedTuple):
    """An annotation file with the columns that its address names: field -> column names."""

    path: Path
    columns: dict[str, list[str]]


class Wanted(NamedTuple):
    """What entries need: the fields that every one must have, and the columns that hold some; unusable
    rows go to `left_out`."""

    required: Sequence[str]
    columns: dict[str, list[str]]
    left_out: LeftOut


def parse_address(address: str | Path) -> Table:
    """`FILE?field=column&field=column:weight,column:weight`; a file that is called so wins.
    UserError."""
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
    path, columns = parse_address(address)
    return path.suffix.lower() in TABLES or path.is_dir() or bool(columns) or is_hub(path)


def address_state(address: str | Path) -> object:
    """What changes with the content of an annotation file, table or folder."""
    path = parse_address(address).path
    return path_state(local_copy(path) if is_hub(path) else path)


def path_state(path: Path) -> object:
    if path.is_file():
        return file_state(path)
    return states_digest(files_below(path) if path.is_dir() else parquet_files(path))


def parquet_files(path: Path) -> list[Path]:
    """A Parquet file itself, those that a pattern names, or those of a folder without images; none
    for anything else. UserError where those of a folder are of several splits."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    if not path.is_dir():
        is_pattern = "*" in path.name and path.suffix.lower() == ".parquet"
        return matching_files(path.parent, path.name) if is_pattern else []
    files = matching_files(path, "*.parquet")
    if not files or any(map(is_image, files_below(path))):
        return []
    if len(splits := _splits_of(files)) > 1:
        listed = ", ".join(splits[:8])
        example = f"'{path}/{splits[0]}*.parquet'"
        raise UserError(f"{path}: Parquet files of several splits, {listed}; name one: {example}")
    return files


def _splits_of(files: Sequence[Path]) -> list[str]:
    return sorted({NUMBER_OF_PART.sub("", file.stem) for file in files})


def _parquet_rows(files: Sequence[Path], wanted: Wanted) -> Iterator[dict]:
    for path in files:
        file = open_parquet(path)
        rows = _batch_rows(path, file.iter_batches(batch_size=BATCH_ROWS))
        yield from _entries(path, file.schema_arrow.names, rows, wanted)


def rows_of(
    path: Path,
    required: Sequence[str],
    columns: dict[str, list[str]] | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[dict]:
    """Entries with the required fields, and every column that is not one of them as it is; unusable
    rows go to `left_out`."""
    wanted = Wanted(required, columns or {}, left_out or LeftOut(path))
    if path.is_dir():
        yield from _folder_rows(path, wanted)
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_rows(parquet_files(path), wanted)
    elif path.suffix.lower() in JSON:
        yield from _whole_entries(path, lambda: objects_of(path), wanted)
    else:
        yield from _csv_rows(path, wanted)


# ---- tables
def _csv_rows(path: Path, wanted: Wanted) -> Iterator[dict]:
    csv.field_size_limit(CELL_BYTES)
    try:
        with path.open(
            encoding=encoding_of(read_start(path, 4)), errors="surrogatepass", newline=""
        ) as file:
            head = next(filter(str.strip, _lines(file, path)), "")
            stated = re.fullmatch(r'"?sep=(.)"?\s*', head)  # as Excel writes it in front
            if not stated:
                file.seek(0)
            # the first where none occurs
            separator = stated[1] if stated else max("\t", ",", ";", "|", key=head.count)
            # `image, caption`: a blank behind each separator is no part of the cells
            spaced = 0 < head.count(separator) == head.count(f"{separator} ")
            rows = csv.reader(
                _lines(file, path), delimiter=separator, strict=True, skipinitialspace=spaced
            )
            names = [name.strip() for name in next(filter(any, rows), [])]
            entries = _by_name(names, _readable(rows, separator))
            yield from _entries(path, names, entries, wanted)
    except UnicodeDecodeError as error:
        seen = looks_like(read_start(path))
        raise UserError(f"{path}: not UTF-8 ({error.reason}){seen}; save it as UTF-8") from None
    except csv.Error as error:
        seen = looks_like(read_start(path))  # Python 3.10's csv refuses the zeros of UTF-16
        raise UserError(
            f"{path}: no table ({error}){seen}; save it as CSV with quoted texts"
        ) from None


def _readable(rows, separator: str) -> Iterator[list[str] | str]:
    """The rows of a CSV reader without blank ones (Excel's are separators alone). Where quotes do not
    pair, what is wrong, once for each of the lines between them: so many rows may be lost."""
    while True:
        before = rows.line_num
        row: list[str] = []
        try:
            row = next(rows)
            fault = "quotes that hold other rows" if _holds_rows(row, separator) else ""
        except StopIteration:
            return
        except csv.Error as error:
            fault = str(error)
        if fault:
            lines = f"lines {before + 1} to {rows.line_num}"
            fault = f"{lines}: {fault}; quote texts, and double the quotes in them"
            yield from [fault] * max(1, rows.line_num - before)
        elif any(row):
            yield row


def _holds_rows(row: list[str], separator: str) -> bool:
    """Whether a cell of several lines swallowed rows: a text's own quote opened it, another's ended
    it. A line of it has tabs, where they part the cells, or an image among its parts."""
    lines = [line.split(separator) for cell in row if "\n" in cell for line in cell.split("\n")]
    return any(
        len(parts) > 1 and (separator == "\t" or any(map(is_image, parts))) for parts in lines
    )


def _lines(file, path: Path) -> Iterator[str]:
    """The lines of a text file, none of which may be longer than a cell."""
    while line := file.readline(CELL_BYTES):
        if len(line) == CELL_BYTES:
            raise UserError(over_limit(path, len(line), CELL_BYTES - 1, "characters in a line"))
        yield line


def _by_name(names: list[str], rows: Iterable[list[str] | str]) -> Iterator[dict | str]:
    """The rows by the names of their columns; what is wrong with one that has too many or too few
    cells. A text in place of a row passes through."""
    for row in rows:
        if isinstance(row, str):
            yield row
            continue
        while len(row) > len(names) and not row[-1]:  # separators at the end of a line
            row.pop()
        while len(row) < len(names) and not names[len(row)]:  # or of the line of names
            row.append("")
        if len(row) == len(names):
            yield dict(zip(names, map(_cell, row), strict=True))
        else:
            yield f"{len(row)} cells under {len(names)} names; quote texts that hold the separator"


def _cell(text: str) -> object:
    """A cell's text; a list in it, as JSON or Python writes it, is a list unless it is too deep."""
    if text[:1] == "[" and text[-1:] == "]" and not too_deep(text.encode(errors="surrogatepass")):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text) if PYTHON_TEXTS.fullmatch(text) else text
    return text


def _listed(value: object) -> object:
    """A text that spells a list of texts as that list: tables of texts alone are saved so."""
    found = _cell(value) if isinstance(value, str) else value
    is_list = isinstance(found, list) and all(isinstance(text, str) for text in found)
    return found if is_list else value


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

    files = _arrow_files(folder)
    if not files:
        raise UserError(f"{folder}: no data-*.arrow in it; save the data set again")
    with reading_arrow(folder, "no Arrow stream"):
        return [ipc.open_stream(pyarrow.memory_map(str(file))) for file in files]


def _arrow_files(folder: Path) -> list[Path]:
    """The files that the state of a saved data set lists: datasets' map and filter leave others beside
    them (cache-*.arrow), and an earlier save in more parts its own. UserError."""
    state = folder / "state.json"
    if state.is_file():
        try:
            listed = read_json(state, dict)["_data_files"]
            return [folder / Path(each["filename"]).name for each in listed]
        except (KeyError, TypeError):
            raise UserError(f"{state}: lists no _data_files; save the data set again") from None
    files = [file for file in matching_files(folder, "*.arrow") if file.stem[:6] != "cache-"]
    if len(splits := _splits_of(files)) > 1:  # as datasets' own cache holds them
        raise UserError(
            f"{folder}: Arrow files of several splits, {', '.join(splits[:8])}; save one"
        )
    return files


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
    path: Path, names: list[str], rows: Iterable[dict | str], wanted: Wanted
) -> Iterator[dict]:
    """The rows with their columns under the names of the fields they hold. A text in place of a row
    is what is wrong with it."""
    left_out = wanted.left_out
    used = columns_of(path, names, wanted.required, wanted.columns)
    taken = {name for each in used.values() for name in each.names}
    for number, row in enumerate(rows, 1):
        left_out.total += 1
        if isinstance(row, str):
            left_out.add(f"{path}, row {number}: {row}")
            continue
        entry = {name: plain(value) for name, value in row.items() if name not in taken}
        try:
            for field, given in used.items():
                value, weights = given.read(row)
                entry[field] = _checked(value, field, f"{path}, row {number}")
                if weights:
                    entry[f"{field}_weights"] = weights
        except BadSample as error:
            left_out.add(str(error))
        else:
            yield entry


def _whole_entries(
    path: Path, open_rows: Callable[[], Iterable[dict]], wanted: Wanted
) -> Iterator[dict]:
    """The entries of rows that need not have the same names: what a row lacks is None."""
    names = list(dict.fromkeys(name for row in open_rows() for name in row))
    rows = ({name: row.get(name) for name in names} for row in open_rows())
    yield from _entries(path, names, rows, wanted)


def columns_of(
    path: Path, names: list[str], required: Sequence[str], columns: dict
) -> dict[str, Columns]:
    """Field -> the columns that hold it, of a table with columns of these names. UserError."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]}; rename one")
    if not names:
        raise UserError(f"{path}: no columns, it is empty; fetch it again")
    used, unnamed = {}, []
    for field in dict.fromkeys((*required, *columns)):
        if field in columns:
            used[field] = given_columns(path, field, columns[field], names)
        elif usual := usual_column(field, names, required):
            used[field] = Columns([usual])
        else:
            unnamed.append(field)
    if unnamed:
        listed = ", ".join(names[:12]) or "none"
        address = f"{path}?" + "&".join(f"{field}=COLUMN" for field in unnamed)
        of_text = path.is_file() and path.suffix.lower() != ".parquet"
        seen = looks_like(read_start(path)) if of_text else ""
        missing = f"no column for {' and '.join(unnamed)} (it has {listed}){seen}"
        has_urls = any(name.lower() == "url" or "://" in name for name in names)  # CC3M: no names
        remedy = ""
        if "image" in unnamed and _has_shards_beside(path):
            remedy = "name its folder with --shards, whose images these rows are about, or "
        elif "image" in unnamed and has_urls:
            remedy = f"{FETCH}, or "
        elif any(map(is_image, names)):
            remedy = "its first row holds no names: put a row of them above it, or "
        raise UserError(f"{path}: {missing}; {remedy}write '{address}'")
    return used


def _has_shards_beside(table: Path) -> bool:
    """Whether a table lies among shards, as img2dataset writes it."""
    folder = table if table.is_dir() else table.parent
    return any(re.search(f"{SHARD_ENDING}$", file.name) for file in folder.glob("*.t*"))


def given_columns(
    path: Path | str, field: str, given: list[str], names: Sequence[str] | None = None
) -> Columns:
    """Columns that an address names, each alone or as NAME:WEIGHT. names: those that there are,
    where they are known. UserError."""
    found = []
    weights = []
    for item in given:
        name, mark, weight = item.rpartition(":")
        if item in (names or ()) or not mark or not _is_number(weight):
            found.append(item)
        elif not 0 < float(weight) < math.inf:
            raise UserError(f"{path}: {item}: the weight of a column must be above 0; leave it out")
        else:
            found.append(name)
            weights.append(float(weight))
    if names is not None:
        for name in found:
            if name not in names:
                like = nearest(name, names)
                hint = f"; did you mean {like}?" if like else f"; it has {', '.join(names[:12])}"
                raise UserError(f"{path}: no column {name}{hint}")
    if not weights:
        return Columns(found)
    if field != "caption":
        raise UserError(f"{path}: {field}: only columns of captions have weights")
    if len(weights) != len(found):
        example = ",".join(f"{name}:{1 / len(found):.2g}" for name in found)
        raise UserError(f"{path}: give every column a weight: {field}={example}")
    return Columns(found, weights)


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def usual_column(field: str, names: list[str], required: Sequence[str] = ()) -> str | None:
    """The column of a field's name, or of a usual one; None where there is neither."""
    if field in names:
        return field
    lower = {name.lower(): name for name in reversed(names)}
    for usual in (field, *USUAL_NAMES.get(field, ())):
        if usual in lower and (usual == field or usual not in required):
            return lower[usual]
    return None


def plain(value: object) -> object:
    """A value that JSON can hold; bytes and dates as text, NaN as null, without bytes in objects (an
    image's)."""
    if isinstance(value, list | tuple):  # the second are entries of a map
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if not isinstance(each, bytes)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return lenient_text(value) if isinstance(value, bytes) else str(value)


def plain_field(value: object, field: str) -> object:
    """A field's value that JSON can hold; several labels in one text are parted by commas."""
    if field == "labels" and isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return plain(value)


def _checked(value: object, field: str, where: str) -> object:
    """A field's value; images must be paths. BadSample, or UserError where a table of this kind has
    no paths."""
    if field == "label" and value == "":  # as null in JSON
        raise BadSample(f"{where}: no label; fix or remove the row")
    if field != "image":
        return plain_field(value, field)
    if isinstance(value, dict):  # datasets' images: {bytes, path}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        raise UserError(f"{where}: holds the encoded image, not its path; {PACK}")
    if isinstance(value, str) and value:
        return value
    number = whole_number(value) if not isinstance(value, str) else None  # pandas: 5.0 for 5
    if number is None:
        raise BadSample(f"{where}: {brief(value)} is no path of an image; fix or remove the row")
    return str(number)


# ---- folders
def _folder_rows(folder: Path, wanted: Wanted) -> Iterator[dict]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))
        raise UserError(f"{folder}: several splits; name one: {folder}/{(splits or ['train'])[0]}")
    if (folder / SAVED).is_file():
        streams = open_arrow(folder)
        rows = (row for stream in streams for row in _batch_rows(folder, stream))
        yield from _entries(folder, streams[0].schema.names, rows, wanted)
        return
    for name in METADATA:
        if (folder / name).is_file():
            yield from _metadata_rows(folder, folder / name, wanted)
            return
    if files := parquet_files(folder):
        yield from _parquet_rows(files, wanted)
        return
    if set(wanted.required) - {"image", "caption"}:
        raise UserError(f"{folder}: a folder gives images and captions; name an annotation file")
    yield from image_text_rows(folder, need_caption="caption" in wanted.required)


def _metadata_rows(folder: Path, file: Path, wanted: Wanted) -> Iterator[dict]:
    """What metadata.csv, .jsonl or .parquet lists; its paths start from the folder."""
    if file.suffix == ".jsonl":
        rows = _whole_entries(file, lambda: objects_of(file), wanted)
    else:
        rows = rows_of(file, *wanted)
    for row in rows:
        yield {**row, "image": str(folder.absolute() / row["image"])}


def image_text_rows(folder: Path, need_caption: bool = True) -> Iterator[dict]:
    """{image: absolute path, caption: [lines]} of every image below a folder with a .txt or .caption
    of its name beside it; images without one are counted and said."""
    lonely = 0
    found = 0
    used: set[Path] = set()  # texts that stand beside an image
    others: list[Path] = []
    for path in files_below(folder.absolute()):
        if not is_image(path):
            others.append(path)
            continue
        if not need_caption:
            found += 1
            yield {"image": str(path)}
        elif beside := text_beside(path):
            data = read_bytes(beside, "put a caption a line into it", CELL_BYTES)
            lines = lines_in(lenient_text(data))
            found += 1
            used.add(beside)
            yield {"image": str(path), "caption": [line for line in lines if not is_blank(line)]}
        else:
            lonely += 1
    if not found:
        tables = sorted({path.parent for path in others if path.suffix.lower() == ".parquet"})
        if tables:
            raise UserError(f"{folder}: its Parquet files lie in {tables[0]}; name that folder")
        what = f"{lonely:,} images without a .txt beside them" if lonely else "no images"
        raise UserError(
            f"{folder}: {what}; put IMAGE.txt beside IMAGE.jpg, or name a table with a caption column"
        )
    if lonely:
        print(f"{folder}: {lonely:,} images have no .txt beside them and are left out")
    unused = [path for path in others if path.suffix in BESIDE and path not in used]
    if need_caption and unused:
        some = f"{len(unused):,} texts have no image beside them that can be read, such as"
        print(f"{folder}: {some} {unused[0].relative_to(folder.absolute())}")
