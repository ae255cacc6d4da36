"""Data sets of the Hugging Face hub by name: hf://USER/NAME, hf://USER/NAME:SPLIT (train where none
is named), hf://USER/NAME/CONFIGURATION:SPLIT.

The first use fetches the split with the package `datasets`, which runs no code of a data set, and
keeps it in the cache: the images as files, and a JSON lines file of everything else, which `tables`
then reads as any annotation file. Later uses need no network.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from base.caches import cache_folder, digest, one_builder
from base.errors import BadSample, UserError
from base.hub import ask_hub
from base.writing import write_json_lines
from dataset.images.decode import image_ending

# Path() makes one slash of two
ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+(?:/[\w.-]+){0,2})(?::([\w.\[\]%+-]+))?")
ENTRIES = "entries.jsonl"
IMAGES_A_FOLDER = 1000
PLAIN_TYPES = {
    *("string", "large_string", "bool", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}
OLDEST = 4  # of `datasets`: earlier ones run code that comes with a data set


def is_hub(address: str | Path) -> bool:
    """Whether an address begins as that of a data set of the hub."""
    return str(address).startswith("hf:/")


def local_copy(address: str | Path) -> Path:
    """The JSON lines file of a split, made at its first use. UserError."""
    found = ADDRESS.fullmatch(str(address))
    if found is None:
        raise UserError(f"{address}: expected hf://USER/NAME or hf://USER/NAME:SPLIT")
    name, split = found.groups()
    user, _, rest = name.partition("/")
    own, _, configuration = rest.partition("/")
    name = f"{user}/{own}" if own else user
    split = split or "train"
    folder = cache_folder() / f"hub-{own or user}-{digest(name, configuration, split)}"
    try:
        with one_builder(folder):
            if not (folder / ENTRIES).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # an interrupted copy
                _copy(_fetched(name, configuration or None, split), folder)
    except OSError as error:
        raise UserError(f"{folder}: not written ({error}); set QUINTET_CACHE") from None
    return folder / ENTRIES


def _fetched(name: str, configuration: str | None, split: str):
    """The split as a `datasets.Dataset`, with its images encoded. UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hf://{name} needs the package datasets: pip install 'datasets>={OLDEST}'"
        ) from None
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        raise UserError(
            f"hf://{name}: datasets {datasets.__version__} runs code of data sets; "
            f"pip install 'datasets>={OLDEST}'"
        )
    try:
        ask_hub(name, "dataset")
        found = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # of the network, the hub, the files, by many libraries
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"hf://{name}:{split}: not fetched ({reason}); check name, "
            "split and network, or copy it here with `hf download` and name its files"
        ) from None
    for column in image_columns(found):
        found = found.cast_column(column, datasets.Image(decode=False))
    return found


def image_columns(data) -> list[str]:
    """The columns that hold images."""
    return [name for name, kind in data.features.items() if type(kind).__name__ == "Image"]


def _copy(data, folder: Path) -> None:
    """Write images and entries; the file of the entries comes last and says that all is there."""
    images = image_columns(data)
    plain = [name for name, kind in data.features.items() if _is_plain(kind)]
    left_out = [name for name in data.features if name not in (*images, *plain)]
    if left_out:
        print(f"{folder.name}: columns left out, no text, number or image: {', '.join(left_out)}")

    def entries() -> Iterator[dict]:
        for number, row in enumerate(data):
            entry = {name: row[name] for name in plain}
            for column in images:
                entry[column] = image_file(row[column], folder, column, number)
            yield entry

    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / ENTRIES, _with_progress(entries(), len(data), folder.name))


def _with_progress(entries: Iterator[dict], count: int, name: str) -> Iterator[dict]:
    from tqdm import tqdm

    return iter(tqdm(entries, f"copying {name}", count, disable=None))


def _is_plain(kind: object) -> bool:
    """Whether a column holds texts or numbers, or lists of them."""
    while isinstance(kind, list) or hasattr(kind, "feature"):
        kind = kind[0] if isinstance(kind, list) else kind.feature
    if type(kind).__name__ == "ClassLabel":
        return True
    return getattr(kind, "dtype", "") in PLAIN_TYPES and type(kind).__name__ == "Value"


def image_file(image: dict | None, folder: Path, column: str, number: int) -> str | None:
    """The absolute path of an image, written below the folder, whatever its column is called; None
    where the row has none."""
    if image is None:
        return None
    content = image.get("bytes")
    if content is None:
        return image.get("path")
    try:
        ending = image_ending(content, "")
    except BadSample:
        ending = "bin"  # it is counted where it is read
    part = f"{number // IMAGES_A_FOLDER:05d}"
    path = folder.absolute() / _folder_of(column) / part / f"{number:09d}.{ending}"
    if not (path.is_file() and path.stat().st_size == len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)


def _folder_of(column: str) -> str:
    """A name for a column's images: its own, or where that could lead elsewhere, one made of it."""
    safe = re.sub(r"\W", "_", column)[:40]
    return column if column == safe else f"{safe}-{digest(column)}"
