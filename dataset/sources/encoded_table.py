"""Parquet files and saved data sets that hold the encoded images themselves, row by row."""

import bisect
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from base.caches import one_builder
from base.distributed import say
from base.errors import UserError
from base.limits import ROW_GROUP_BYTES, check_limit
from dataset.sources.hub import image_file
from dataset.sources.tables import (
    SAVED,
    Columns,
    columns_of,
    open_arrow,
    open_parquet,
    parquet_files,
    parse_address,
    plain,
    plain_field,
    reading_arrow,
    rows_at_a_time,
)

SMALLER = "write it with fewer rows in a row group"
SHARDS = "shards (scripts/data/pack.py)"


def encoded_table(address: str, required: Sequence[str]) -> "EncodedTable | None":
    """The rows of a Parquet file or saved data set that holds encoded images; None for any other
    annotation file. UserError."""
    path, columns = parse_address(address)
    if (path / SAVED).is_file():
        parts = _record_batches(path)
    else:
        parts = [part for file in parquet_files(path) for part in _row_groups(file)]
    if not parts:
        return None
    names = parts[0][2].names
    used = columns_of(path, names, required, columns)
    kind = parts[0][2].field(used["image"].names[0]).type
    if not _holds_bytes(kind):
        return None
    if any(set(schema.names) != set(names) for _, _, schema in parts):
        raise UserError(f"{path}: its files have different columns; name one file")
    return EncodedTable(path, parts, used)


def _holds_bytes(kind) -> bool:
    from pyarrow import types

    if types.is_struct(kind):  # datasets' images: {bytes, path}
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return str(kind) in ("binary", "large_binary", "binary_view")


def _row_groups(path: Path) -> list[tuple]:
    """(rows, read, schema) of every row group."""
    file = open_parquet(path)
    parts: list[tuple] = []
    for group in range(file.metadata.num_row_groups):
        about = file.metadata.row_group(group)
        check_limit(path, about.total_byte_size, ROW_GROUP_BYTES, "bytes in a row group", SMALLER)
        rows = about.num_rows
        parts.append((rows, partial(file.read_row_group, group), file.schema_arrow))
    return parts


def _record_batches(folder: Path) -> list[tuple]:
    """(rows, read, schema) of every batch of the Arrow files."""
    parts = []
    with reading_arrow(folder):
        for stream in open_arrow(folder):
            for batch in stream:
                parts.append((batch.num_rows, partial(batch.slice, 0), stream.schema))
    return parts


def with_image_files(table: "EncodedTable", folder: Path) -> Iterator[dict]:
    """The entries with their images as files below `folder`, by absolute path, each written once.
    Rows whose image img2dataset could not fetch, by their `status`, are left out, counted and said."""
    said = False
    failed = 0
    with one_builder(folder):
        for entry in table:
            number, image = entry.pop("index"), entry["image"]
            if not image and entry.get("status") not in (None, "success"):
                failed += 1
                continue
            if isinstance(image, bytes):
                if not said:
                    say(
                        f"{table.path}: its images become files in {folder}; many load faster as {SHARDS}"
                    )
                said = True
                image = image_file({"bytes": image}, folder, table.used["image"].names[0], number)
            yield {**{k: v for k, v in entry.items() if not isinstance(v, dict)}, "image": image}
    if failed:
        say(f"{table.path}: {failed:,} of {len(table):,} rows have no image, by their status")


class EncodedTable(Sequence):
    """Entries by number: the required fields, `image` as bytes or a path, and the other columns."""

    def __init__(self, path: Path, parts: list[tuple], used: dict[str, Columns]):
        self.path = path
        self.parts = parts
        self.used = used
        self.ends = list(accumulate(rows for rows, _, _ in parts))
        self.current, self.held = -1, None  # the part read last: entries are taken in order

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        part = bisect.bisect_right(self.ends, index)
        if part != self.current:
            with reading_arrow(self.path):
                held = self.parts[part][1]()
                rows_at_a_time(self.path, held)  # checks it
            self.current = part
            self.held = held
        start = self.ends[part - 1] if part else 0
        row = self.held.slice(index - start, 1).to_pylist()[0]
        taken = {name for each in self.used.values() for name in each.names}
        entry = {name: plain(value) for name, value in row.items() if name not in taken}
        for field, given in self.used.items():
            value, weights = given.read(row)
            entry[field] = value if field == "image" else plain_field(value, field)
            if weights:
                entry[f"{field}_weights"] = weights
        image = entry["image"]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        entry["image"] = image or b""
        entry["index"] = index
        return entry
