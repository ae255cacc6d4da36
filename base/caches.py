"""Where things made of files are kept, and by what they are known to be current."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from base.image_names import existing

CACHE_VERSION = 2  # raised when something else is made of the same file


def cache_folder(folder: str | Path | None = None) -> Path:
    """`folder`, else $QUINTET_CACHE, else ~/.cache/quintet."""
    return Path(folder or os.environ.get("QUINTET_CACHE") or "~/.cache/quintet").expanduser()


def digest(*parts: object) -> str:
    """20 hexadecimal digits that change with any of `parts`: plain values, bytes, file states."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:20]


def file_state(path: str | Path) -> tuple[str, int, int, int]:
    """What changes with a file's content without reading it: absolute path, bytes, times of change
    (ns)."""
    status = os.stat(path)
    return str(Path(path).absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sizes_of(folder: Path, files: Iterable[Path]) -> dict[str, int]:
    """Bytes of files by their paths below `folder`, by which `have_sizes` later finds one that was
    cut off or is gone."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def have_sizes(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether all files are there, as long as `sizes_of` found them."""
    files = {folder / name: size for name, size in sizes.items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def states_digest(paths: Iterable[str | Path]) -> str:
    """A digest of many images' states, asked by threads: network file systems answer slowly. A
    missing one counts as such."""
    found = hashlib.sha256()
    paths = iter(paths)
    with ThreadPoolExecutor(16) as pool:
        while some := list(islice(paths, 10_000)):
            # a thread takes a few at a time: handing them over costs more than to ask a disk
            blocks = [some[start : start + 100] for start in range(0, len(some), 100)]
            states = [state for block in pool.map(_states_or_none, blocks) for state in block]
            found.update(repr(states).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:20]


def _states_or_none(paths: Iterable[str | Path]) -> list[tuple | None]:
    return [image_state(path) for path in paths]


def image_state(path: str | Path) -> tuple[str, int, int, int] | None:
    """`file_state` of the file that the path of an image means; None where there is none."""
    try:
        return file_state(path)
    except NotADirectoryError:  # a member of a zip file changes with it
        return image_state(os.path.dirname(path))
    except FileNotFoundError:
        found = existing(path)
        return None if found == Path(path) else image_state(found)
    except (OSError, ValueError):  # the second for a zero byte in a name
        return None


def weights_digest(state: Mapping[str, Any]) -> str:
    """A digest of names, dtypes, shapes and values of a state dict (name -> tensor)."""
    import torch  # here, for --help must not wait for it

    found = hashlib.sha256()
    for name, value in state.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def cached_path(source: str | Path, suffix: str, *parts: object) -> Path:
    """Where to keep what is made of the file `source`: its name changes with the file and `parts`."""
    key = digest(CACHE_VERSION, file_state(source), *parts)
    return cache_folder() / f"{Path(source).stem}-{key}{suffix}"


@contextmanager
def one_builder(cached: Path) -> Iterator[None]:
    """Lets one of many processes build a cached file while the others wait, and removes the lock
    file at the end; on file systems without locks all build it."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    path = cached.with_suffix(".lock")
    with ExitStack() as held:
        while True:
            lock = held.enter_context(path.open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                break
            if is_at(path, lock):  # or the one before has removed it meanwhile
                break
        held.callback(path.unlink, missing_ok=True)
        yield


def is_at(path: Path, file: IO) -> bool:
    """Whether an open file is the one that lies at a path now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False
