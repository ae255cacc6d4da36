"""Build the metadata of YFCC15M from what is published about YFCC100M and OpenAI's caption list.

    python scripts/data/make_dataset.py --captions yfcc100m_dataset.txt --available flickr_unique_ids.npy \\
        --subset yfcc100m_subset_data.tsv --output datasets/yfcc15m_v1/yfcc15m.jsonl

The two tables are read packed (.bz2), too. The images are expected as ROOT/images/AB/CDE.zip, member
FGH.jpg, where ABCDEFGH is the line number in yfcc100m_dataset.txt (eight digits). `--available` holds
the line numbers of the images that were downloaded (an integer .npy array, or text with one number
a line); `--subset` is OpenAI's list, whose first column is the line number.
Titles and descriptions are URL-decoded and cleared of links and bold or italic marks. SLIP and
CLIP-rocket counted 14,689,580 samples this way. The output trains with `main.py --dataset yfcc15m
--metadata OUTPUT --root ROOT`.
"""

import bz2
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError, brief
from base.text import whole_number
from base.writing import write_json_lines
from dataset.tasks.captions import yfcc_row
from runtime.config.cli import knob, run_script

LINE, TITLE, DESCRIPTION = 0, 8, 9  # columns of yfcc100m_dataset.txt
MARKUP = re.compile(r"<a.*?>|</a>|</?[bi]>")
ADDRESS = re.compile(r"(?:http|www)\S+")


@dataclass
class Config:
    """YFCC15M metadata."""

    captions: Path = knob(Path("yfcc100m_dataset.txt"), "table of YFCC100M, plain or .bz2")
    available: Path = knob(
        Path("flickr_unique_ids.npy"), "line numbers of the downloaded images: .npy or text"
    )
    subset: Path = knob(
        Path("yfcc100m_subset_data.tsv"), "OpenAI's list of captioned images, plain or .bz2"
    )
    output: Path = knob(Path("yfcc15m.jsonl"), "JSON lines to write")


def plain_or_packed(path: Path) -> Path:
    """A file, or what is published in its place: NAME.txt.bz2 or NAME.bz2. UserError."""
    for place in (path, Path(f"{path}.bz2"), path.with_suffix(".bz2")):
        if place.is_file():
            return place
    raise UserError(f"{path}: no such file; see `python scripts/data/make_dataset.py --help`")


def lines(path: Path) -> Iterator[str]:
    """The lines of a text without their ends; blank ones are left out. UserError."""
    how = {"encoding": "utf-8-sig", "newline": "\n"}
    try:
        with bz2.open(path, "rt", **how) if path.suffix == ".bz2" else path.open(**how) as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or not UTF-8 ({error}); fetch it again") from None


def numbers(path: Path):
    """Sorted int64 array of the line numbers in an .npy array or in the first column of a text."""
    import numpy as np

    if path.suffix == ".npy":
        try:
            found = np.load(path, allow_pickle=False)
        except Exception as error:  # NumPy lets out the errors of its parser
            raise UserError(f"{path}: no array of line numbers ({brief(str(error))})") from None
        if found.dtype.kind not in "iu":
            raise UserError(f"{path}: an array of {found.dtype}, not of line numbers")
        return np.unique(found.astype(np.int64))
    return np.unique(np.fromiter(first_column(path), np.int64))


def first_column(path: Path) -> Iterator[int]:
    """The line number that every line of a table begins with. UserError."""
    for line in lines(path):
        number = whole_number(line.split("\t", 1)[0])
        if number is None or number < 0:
            raise UserError(f"{path}: the first column must be line numbers, not {brief(line)}")
        yield number


def cleaned(text: str) -> str:
    """A title or description as in the table, decoded and without markup and addresses."""
    return ADDRESS.sub("", MARKUP.sub("", unquote(text).replace("+", " ")))


def captioned(table: Path, wanted) -> Iterator[dict]:
    """Rows of the wanted lines, in the order of the table. UserError where it has none of them."""
    import numpy as np
    from tqdm import tqdm

    any_found = False
    for place, line in enumerate(
        tqdm(lines(table), desc=table.name, unit=" lines", unit_scale=True, disable=None)
    ):
        row = line.split("\t")
        try:
            number = int(row[LINE])
            title = row[TITLE]
            description = row[DESCRIPTION]
        except (ValueError, IndexError):
            raise UserError(
                f"{table}, line {place}: expected the line number, ..., title and description in columns "
                f"{LINE}, {TITLE}, {DESCRIPTION}, separated by tabs; is it yfcc100m_dataset.txt?"
            ) from None
        found = np.searchsorted(wanted, number)
        if found < len(wanted) and wanted[found] == number:
            any_found = True
            yield yfcc_row((number, cleaned(title), cleaned(description)))
    if not any_found:
        lines_wanted = f"{len(wanted):,} lines, such as {wanted[0]}"
        raise UserError(f"{table}: has none of the {lines_wanted}; is it whole?")


def main(config: Config) -> None:
    import numpy as np

    table, *lists = map(plain_or_packed, (config.captions, config.available, config.subset))
    available, subset = map(numbers, lists)
    wanted = np.intersect1d(available, subset)
    if not len(wanted):
        raise UserError(f"{config.available} and {config.subset} have no line number in common")
    count = write_json_lines(config.output, captioned(table, wanted))
    print(
        f"{config.output}: {count:,} captioned images ({len(available):,} available, {len(subset):,} on the list)"
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
