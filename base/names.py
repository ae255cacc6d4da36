"""Names of files, records and options: hidden ones, shards, and the nearest of some."""

from collections.abc import Container, Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from base.errors import UserError

# what systems make for themselves: folders of macOS's archives, of Synology (with thumbnails), of
# Windows and of file systems; files of Windows's folders. In lower case
OF_SYSTEMS = (
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
    "thumbs.db",
    "desktop.ini",
)

# how the ending of a shard's name begins: of tars, compressed or not, and of TFRecord files
SHARD_ENDING = r"\.(tar|tgz|tbz2?|txz|tzst|tfrec(ords?)?)"


def is_hidden(name: str | Path) -> bool:
    """Whether a path or URL names a hidden file, such as the `._x.jpg` that macOS puts beside x.jpg,
    or what systems make for themselves."""
    last = str(name).rpartition("/")[2]
    return last.startswith(".") or last.lower() in OF_SYSTEMS


@lru_cache(1024)
def is_hidden_folder(path: str) -> bool:
    """Whether a relative folder, or one above it, is hidden; `..` is not."""
    return any(is_hidden(part) for part in path.split("/") if part.strip("."))


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names match, sorted, without hidden ones."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not is_hidden(path))


def name_of(record: dict) -> str:
    """How to call a record in a message: its key in a shard, its image, or its number."""
    named = (record.get(field) for field in ("key", "image", "url"))
    found = next((str(name) for name in named if isinstance(name, str | Path)), None)
    return found or f"entry {record.get('index', '?')}"


def check_stems(paths: Iterable[Path], option: str, taken: Container[str] = ()) -> None:
    """UserError where two of the files that `option` names differ in folder or ending alone, or one
    is called as something else is (`taken`): what is made of a file is called by its stem, and one
    result would replace the other."""
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in taken:
            raise UserError(
                f"{option} {path}: other results are called {path.stem} already; rename the file"
            )
        other = seen.setdefault(path.stem, path)
        if other != path:
            raise UserError(
                f"{option}: what is made of {other} and of {path} would both be called {path.stem}; "
                "name them in two commands"
            )


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def nearest(name: object, known: Iterable[object], cutoff: float = 0.5) -> str | None:
    """The most similar of `known`, None where none is like it."""
    names = {str(each).lower(): str(each) for each in known}
    close = get_close_matches(str(name).lower(), names, 1, cutoff)
    return names[close[0]] if close else None


def did_you_mean(name: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """`; did you mean X?`, or nothing where none of `known` is like `name`."""
    found = nearest(name, known, cutoff)
    return f"; did you mean {found}?" if found else ""
