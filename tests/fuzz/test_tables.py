"""Tables and folders that ask for much: refused in one sentence or read, in bounded memory and time,
and nothing waits for ever."""

import os
from pathlib import Path

import pytest

from tests.fuzz.seeds import table_rows
from tests.helpers.bounded import read_bounded

pytestmark = pytest.mark.slow
MIB, SECONDS = 700, 60
HEAD = b"image,caption\n"


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file of a few bytes that is `size` bytes of zeros long."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def parquet(path: Path, captions, rows: int, **options) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": ["0.png"] * rows, "caption": captions})
    parquet.write_table(table, path, compression="zstd", **options)
    return path


def repeated(text: str, rows: int):
    """A column that holds one text once, and means it `rows` times."""
    import pyarrow

    return pyarrow.array([text]).dictionary_encode().take(pyarrow.array([0] * rows))


def saved(folder: Path, data: bytes) -> Path:
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "data-00000-of-00001.arrow").write_bytes(data)
    return folder


def negative_offsets() -> bytes:
    """An Arrow stream whose texts begin before their buffer."""
    import numpy as np
    import pyarrow
    from pyarrow import ipc

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"image": ["0.png"] * 2, "caption": ["abc", "def"]})
    with ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    offsets = np.array([0, 3, 6], np.int32).tobytes()
    data = sink.getvalue().to_pybytes()
    assert data.count(offsets) == 1
    return data.replace(offsets, np.array([-(1 << 30), 1 << 20, 6], np.int32).tobytes())


def folder_of(path: Path, *fifos: str) -> Path:
    """An image with its caption, and FIFOs, which nobody ever writes to."""
    path.mkdir()
    (path / "0.jpg").write_bytes(b"x")
    (path / "0.txt").write_text("a dog")
    for name in fifos:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
    return path


def loops(path: Path) -> Path:
    folder_of(path)
    (path / "up").symlink_to("..")
    (path / "self").symlink_to("self")
    (path / "1.jpg").symlink_to("nowhere")
    return path


def doubling(path: Path) -> Path:
    """Folders with two links each to the next: 2 ** 30 paths."""
    path.mkdir()
    for number in range(30):
        folder_of(path / str(number))
        for link in "ab":
            (path / str(number) / link).symlink_to(path / str(number + 1))
    folder_of(path / "30")
    return path / "0"


def deep(path: Path) -> Path:
    folder = path.joinpath(*["d"] * 300)
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(b"x")
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


CASES = {  # what to make of a path -> what the refusal says; "": it is read
    "CSV, a field of 2 GB": (
        lambda p: sparse(p / "t.csv", HEAD + b'0.png,"', 2 << 30),
        "in a line",
    ),
    "CSV, a line of 3 GB": (lambda p: sparse(p / "t.csv", b"", 3 << 30), "in a line"),
    "CSV, ten million empty lines": (
        lambda p: written(p / "t.csv", HEAD + b"\n" * 10_000_000 + b"0.png,x\n"),
        "",
    ),
    "CSV, a million blanks": (lambda p: written(p / "t.csv", b"," * 1_000_000), "it is empty"),
    "CSV, a million names": (
        lambda p: written(p / "t.csv", ",".join(map(str, range(1_000_000))).encode()),
        "no column for",
    ),
    "CSV, a million cells": (
        lambda p: written(p / "t.csv", HEAD + b",x" * 1_000_000),
        "1000001 cells under 2 names",
    ),
    "CSV, lists in lists": (
        lambda p: written(p / "t.csv", HEAD + b"0.png," + b"[" * 100_000 + b"]" * 100_000),
        "",
    ),
    "CSV, one name twice": (lambda p: written(p / "t.csv", b"image,caption,caption\na,b,c"), "two"),
    "CSV without rows": (lambda p: written(p / "t.csv", HEAD), "names of columns and no rows"),
    "CSV, a FIFO": (lambda p: fifo(p / "t.csv"), "not a regular file"),
    "Parquet, a FIFO": (lambda p: fifo(p / "t.parquet"), "not a regular file"),
    "Parquet, a cell of 20 MB a thousand times": (
        lambda p: parquet(p / "t.parquet", repeated("a" * (20 << 20), 1000), 1000),
        "bytes in a cell",
    ),
    "Parquet, 40 GB of text": (
        lambda p: parquet(p / "t.parquet", repeated("a" * 20_000, 2_000_000), 2_000_000),
        "bytes of text",
    ),
    "saved data set, negative offsets": (lambda p: saved(p / "s", negative_offsets()), "damaged"),
    "folder, FIFOs": (
        lambda p: folder_of(p / "f", "1.jpg", "1.txt", "metadata.csv", "dataset_info.json"),
        "",
    ),
    "folder, FIFOs without a caption": (lambda p: folder_of(p / "f", "1.jpg", "metadata.csv"), ""),
    "folder, links in circles": (lambda p: loops(p / "f"), ""),
    "folder, links that double": (lambda p: doubling(p / "f"), "links to this folder"),
    "folder, 300 levels": (lambda p: deep(p / "f"), "folders in one another"),
}


def read(path: Path) -> int:
    return len(table_rows(path))


@pytest.mark.parametrize("name", CASES)
def test_tables_that_ask_for_much(name, tmp_path):
    make, words = CASES[name]
    place = tmp_path / "hostile"
    place.mkdir()
    outcome = read_bounded(read, make(place), seconds=SECONDS)
    assert outcome.mib < MIB, outcome
    if words:
        assert outcome.error in ("UserError", "MissingData"), outcome
        assert words in outcome.text and "\n" not in outcome.text, outcome
        assert len(outcome.text) < 500 + len(str(tmp_path))
    else:
        assert outcome.error == "", outcome
        assert int(outcome.text) == 1
