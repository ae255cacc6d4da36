"""Files: strict JSON, atomic writes, the cache folder, and the nearest of some names. Each exists
only here."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.limits import NESTED_LEVELS, TEXT_BYTES
from base.text import lines_in

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CACHE_VERSION = 2  # raised when something else is made of the same file
# folders of macOS's archives, of Synology (with thumbnails), of Windows and of file systems
OF_SYSTEMS = (
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
)
STALE = 24 * 3600  # seconds after which a temporary file of another machine counts as left over
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


# ---- reading
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


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer would wait for ever


def read_text(path: str | Path, remedy: str = "check its name", limit: int = TEXT_BYTES) -> str:
    """A UTF-8 text file without its byte order mark, line ends as they are. UserError."""
    data = read_bytes(path, remedy, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8, or fetch it again"
        raise UserError(message) from None


def read_lines(
    path: str | Path, remedy: str = "check its name", limit: int = TEXT_BYTES
) -> list[str]:
    """Lines of a text file (see `base.text.lines_in`)."""
    return lines_in(read_text(path, remedy, limit))


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
) -> Any:
    """The value that JSON text holds; `name` is what UserError blames.

    Takes UTF-8, UTF-16 and UTF-32, each with or without a byte order mark. Refuses NaN and
    Infinity, which JSON does not know, a key that an object has twice, and nesting deeper than
    NESTED_LEVELS. A lone surrogate (half an emoji) becomes U+FFFD."""
    try:
        if isinstance(data, bytes):
            encoding = json.detect_encoding(data)
            text = data.decode(encoding)
            data = data if encoding.startswith("utf-8") else text.encode("utf-8", "surrogatepass")
        else:
            text, data = data, data.encode("utf-8", "surrogatepass")
        if _too_deep(data):
            raise ValueError(f"nested deeper than {NESTED_LEVELS} levels")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not valid JSON: not UTF-8 at byte {error.start}; {remedy}"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{name}: not valid JSON at {where}: {error.msg}; {remedy}") from None
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


def read_json_lines(
    path: str | Path, remedy: str = "fix or fetch the file again"
) -> Iterator[dict]:
    """The objects of a JSON lines file in order; blank lines are skipped. UserError names file and
    line."""
    for number, line in enumerate(read_lines(path, remedy), 1):
        if line.strip():
            yield parse_json(line, f"{path}, line {number}", dict, remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return content


def _no_constant(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no JSON number")


def _too_deep(data: bytes) -> bool:
    """Whether JSON text nests deeper than NESTED_LEVELS: peels off innermost pairs of brackets, level
    by level."""
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


def clean_surrogates(value: Any) -> Any:
    """Text, or plain data with text in it, with each lone surrogate as U+FFFD: UTF-8 cannot hold
    one."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [clean_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {clean_surrogates(key): clean_surrogates(each) for key, each in value.items()}
    return value


# ---- writing
@contextmanager
def atomic_write(
    path: str | Path, remedy: str = "make room or name another folder"
) -> Iterator[Path]:
    """Gives the path of a temporary file beside `path` to write; afterwards it is synced and
    renamed to `path`.

        with atomic_write(path) as temporary:
            torch.save(content, temporary)

    Whatever fails, an older file of that name stays as it was and no temporary file is left; those
    of processes that were killed are removed. An OSError, such as a full disk, becomes a UserError
    that ends with `remedy`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_this_host()}-{os.getpid()}.tmp")
    try:
        with file_errors(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            yield temporary
            replace_synced(temporary, path)
    finally:
        _unlink(temporary)


@contextmanager
def file_errors(path: str | Path, remedy: str) -> Iterator[None]:
    """An OSError inside, such as a full disk, becomes a UserError about `path` that ends with
    `remedy`."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(_existing(Path(path))).free / 2**30
            what = f"the disk is full or the quota used up ({what}; {free:.1f} GiB free)"
        raise UserError(f"{path}: not written, {what}; {remedy}") from error


def _existing(path: Path) -> Path:
    """The path, or the nearest of the folders above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def check_output_folder(folder: str | Path) -> None:
    """Check, before work begins and without writing, that results can be written to a folder, which
    need not be there yet. UserError."""
    remedy = "name another folder as --output_dir"
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(folder)):
        raise UserError(
            f"{folder}: results are written to folders and buckets (s3://, gs://); {remedy}"
        )
    folder = Path(folder)
    with file_errors(folder, remedy):
        try:
            os.lstat(folder)
        except FileNotFoundError:
            pass  # but not too long a name, or a file as a folder above it
    found = _existing(folder)
    if not found.is_dir():
        raise UserError(f"{folder}: {found} is not a folder; {remedy}")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {found} is read-only or not yours; {remedy}")
    for name in ("config.yaml", "log.jsonl", ".lock"):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise UserError(f"{folder / name}: not a regular file; remove it, or {remedy}")
    for name in ("result", "tensorboard"):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise UserError(f"{folder / name}: not a folder; remove it, or {remedy}")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file by `data` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by UTF-8 text atomically; a lone surrogate becomes U+FFFD."""
    write_bytes(path, clean_surrogates(text).encode())


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Replace a file by JSON atomically. JSON has no NaN: such numbers become text."""
    write_text(path, json.dumps(finite(value), indent=indent, allow_nan=False) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]) -> int:
    """Replace a file by one JSON object a line atomically, text as readable UTF-8; returns how
    many."""
    count = 0
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            line = json.dumps(finite(row), ensure_ascii=False, allow_nan=False)
            file.write(clean_surrogates(line) + "\n")
            count += 1
    return count


def finite(value: Any) -> Any:
    """Plain data with NaN and infinities as text, which a strict reader of JSON accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` in a folder whose processes are dead (elsewhere:
    a day old)."""
    if (folder := folder.absolute()) in _CLEANED:
        return
    _CLEANED.add(folder)
    for path in folder.glob(".*.tmp"):
        host, _, pid = path.name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
        if not pid.isdigit():
            continue
        if host == _this_host():
            dead = not _alive(int(pid))
        else:
            dead = _age(path) > STALE
        if dead:
            _unlink(path)


_CLEANED: set[Path] = set()  # a process looks once: folders of shards are large


def _this_host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is a file, or has become read-only
        pass


def replace_synced(temporary: Path, path: Path) -> None:
    """Rename a file that is whole to `path`, so that both outlast a power failure."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


# ---- caches
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


def states_digest(paths: Iterable[str | Path]) -> str:
    """A digest of many files' states, asked by threads: network file systems answer slowly. A
    missing file counts as such."""
    found, paths = hashlib.sha256(), iter(paths)
    with ThreadPoolExecutor(16) as pool:
        while some := list(islice(paths, 10_000)):
            states = list(pool.map(_state_or_none, some))
            found.update(repr(states).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:20]


def _state_or_none(path: str | Path) -> tuple | None:
    try:
        return file_state(path)
    except OSError:
        return None


def weights_digest(state: Mapping[str, Any]) -> str:
    """A digest of names, dtypes, shapes and values of a state dict (name -> tensor)."""
    import torch  # here, for --help must not wait for it

    found = hashlib.sha256()
    for name, value in state.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def cached_path(
    source: str | Path, suffix: str, *parts: object, folder: str | Path | None = None
) -> Path:
    """Where to keep what is made of the file `source`: its name changes with the file and `parts`."""
    key = digest(CACHE_VERSION, file_state(source), *parts)
    return cache_folder(folder) / f"{Path(source).stem}-{key}{suffix}"


@contextmanager
def one_builder(cached: Path) -> Iterator[None]:
    """Lets one of many processes build a cached file while the others wait; on file systems without
    locks all build it."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    with cached.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


# ---- names
def is_hidden(name: str | Path) -> bool:
    """Whether a path or URL names a hidden file, such as the `._x.jpg` that macOS puts beside x.jpg,
    or a folder that systems make for themselves."""
    last = str(name).rpartition("/")[2]
    return last.startswith(".") or last in OF_SYSTEMS


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names match, sorted, without hidden ones."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not is_hidden(path))


def nearest(name: object, known: Iterable[object], cutoff: float = 0.5) -> str | None:
    """The most similar of `known`, None where none is like it."""
    close = get_close_matches(str(name), [str(each) for each in known], 1, cutoff)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """`; did you mean X?`, or nothing where none of `known` is like `name`."""
    found = nearest(name, known, cutoff)
    return f"; did you mean {found}?" if found else ""
