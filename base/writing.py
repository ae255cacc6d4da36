"""Files that are written whole or not at all: atomic, synced, a full disk in one sentence."""

import errno
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.errors import UserError, brief
from base.text import clean_surrogates

ROOM = "make room or name another folder"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STALE = 24 * 3600  # seconds after which a temporary file of another machine counts as left over


@contextmanager
def atomic_write(path: str | Path, remedy: str = ROOM) -> Iterator[Path]:
    """Gives the path of a temporary file beside `path` to write; afterwards it is synced and
    renamed to `path`.

        with atomic_write(path) as temporary:
            torch.save(content, temporary)

    Whatever fails, an older file of that name stays as it was and no temporary file is left; those
    of processes that were killed are removed. An OSError, such as a full disk, becomes a UserError
    that ends with `remedy`."""
    path = Path(path)
    _refuse_address(path, remedy)
    temporary = temporary_beside(path)
    try:
        with file_errors(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            yield temporary
            replace_synced(temporary, path)
    finally:
        _unlink(temporary)


def temporary_beside(path: Path) -> Path:
    """Where this process writes what becomes `path`; `remove_leftovers` removes it once the process
    is dead."""
    return path.with_name(f".{path.name}.{_this_host()}-{os.getpid()}.tmp")


@contextmanager
def file_errors(path: str | Path, remedy: str) -> Iterator[None]:
    """An OSError inside, such as a full disk, becomes a UserError about `path` that ends with
    `remedy`; about another file, which was to be read for it, one that names this."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if _is_of_another(error, Path(path).absolute()):
            raise UserError(f"{error.filename}: {what}; allow reading it, or remove it") from error
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(_existing(Path(path))).free / 2**30
            what = f"the disk is full or the quota used up ({what}; {free:.1f} GiB free)"
        raise UserError(f"{path}: not written, {what}; {remedy}") from error


def _is_of_another(error: OSError, path: Path) -> bool:
    """Whether an error names a file that lies neither in the folder of `path` nor above it."""
    if not isinstance(error.filename, str | Path):
        return False
    found = Path(error.filename).absolute()
    return path.parent not in found.parents and found not in path.parents


def _existing(path: Path) -> Path:
    """The path, or the nearest of the folders above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def check_output_folder(folder: str | Path) -> None:
    """Check, before work begins and leaving nothing behind, that results can be written to a folder,
    which need not be there yet. UserError."""
    remedy = "name another folder as --output_dir"
    _refuse_address(folder, remedy, "folders and buckets (s3://, gs://)")
    folder = Path(folder)
    _check_writable(folder, remedy)
    of_results = ("result/metrics.json", "result/metrics.jsonl", "result/report.html")
    for name in ("config.yaml", "log.jsonl", ".lock", *of_results):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise UserError(f"{folder / name}: not a regular file; remove it, or {remedy}")
    for name in ("result", "tensorboard"):
        if os.path.lexists(folder / name):
            if not (folder / name).is_dir():
                raise UserError(f"{folder / name}: not a folder; remove it, or {remedy}")
            _check_writable(folder / name, remedy)


def check_folder_option(folder: str | Path, option: str) -> None:
    """As `check_output_folder`, of a folder or file that `option` names and that has no layout."""
    remedy = f"name another {option}"
    _refuse_address(folder, remedy)
    _check_writable(Path(folder), remedy)


def make_folder(folder: str | Path, option: str) -> Path:
    """Make the folder that `option` names, with those above it. UserError."""
    folder = Path(folder)
    check_folder_option(folder, option)
    with file_errors(folder, f"name another {option}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_address(path: str | Path, remedy: str, places: str = "this machine alone") -> None:
    """UserError for `s3://...`, of which a folder `s3:` would be made, also without a bucket's name, and
    for `$HOME/...`, of which a folder `$HOME`."""
    if re.match(r"[a-z][a-z0-9+.-]*:/|(s3a?|gs|gcs|az|abfs):$", str(path)):
        raise UserError(f"{path}: results are written to {places}; {remedy}")
    if re.search(r"\$(\w|\{\w+\})", str(path)) and not os.path.lexists(path):
        raise UserError(f"{path}: only a shell fills in its variables, no file does; {remedy}")


def _check_writable(folder: Path, remedy: str) -> None:
    """UserError where a folder cannot be written to, or not be made."""
    with file_errors(folder, remedy):
        try:
            os.lstat(folder)
        except FileNotFoundError:
            pass  # but not too long a name, or a file as a folder above it
        except ValueError as error:  # a zero byte in it
            raise UserError(f"{brief(str(folder))}: {error}; {remedy}") from None
    found = _existing(folder)
    if not found.is_dir():
        raise UserError(f"{folder}: {found} is not a folder; {remedy}")
    try:  # its permissions are not asked: root may all, but not in /proc or an immutable folder
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=found))
    except OSError as error:
        made = f"nothing can be made in {found} ({error.strerror})"
        raise UserError(f"{folder}: {made}; {remedy}") from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file by `data` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by UTF-8 text atomically; a lone surrogate becomes U+FFFD."""
    write_bytes(path, clean_surrogates(text).encode())


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Replace a file by JSON atomically. JSON has no NaN: such numbers become text."""
    write_text(path, strict_json(value, indent=indent) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]) -> int:
    """Replace a file by one JSON object a line atomically, text as readable UTF-8; returns how
    many."""
    count = 0
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            file.write(clean_surrogates(strict_json(row, ensure_ascii=False)) + "\n")
            count += 1
    return count


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str], remedy: str = ROOM
) -> None:
    """Replace a file by tensors as safetensors atomically. They are contiguous and share no
    storage. UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path, remedy) as temporary:
        temporary.touch()
        # as the umask has it; safetensors lets the owner alone read
        mode = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:  # a full disk or quota; the number is in the text alone
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        temporary.chmod(mode)


def strict_json(value: Any, **options: Any) -> str:
    """Plain data as JSON, NaN and infinities as text. options: of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (ValueError, TypeError):  # such numbers, and mappings that are no dict
        return json.dumps(finite(value), allow_nan=False, **options)


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
