"""Archives of torch that carry the hash of their content.

The sha256, computed while writing, is the comment of the zip archive itself: file and hash change
together in one rename, and every zip reader skips the comment.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from base.caches import file_state
from base.heartbeat import beat

HASH_LABEL = b"sha256:"
COMMENT_SIZE = len(HASH_LABEL) + 64
BLOCK = 1 << 22  # bytes hashed at a time


class _HashingFile:
    """A file object that hashes what it writes.

    `torch.save` calls it from C++, where an exception would be lost in a complaint about file
    positions: the first `OSError` is kept for `finish` to raise, and nothing is written after it.
    """

    def __init__(self, file):
        self.file = file
        self.hash = hashlib.sha256()
        self.error = None

    def write(self, data) -> int:
        beat("saving a checkpoint")
        if self.error is None:
            try:
                self.file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> bytes:
        if self.error is not None:
            raise self.error
        return HASH_LABEL + self.hash.hexdigest().encode()


def write_hashed(state: dict[str, Any], path: Path) -> str:
    """Writes `state` with `torch.save` and its hash as the archive's comment. Returns the hash."""
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing)
        comment = hashing.finish()
        file.seek(-2, os.SEEK_END)  # length of the archive's comment: zero so far
        file.write(len(comment).to_bytes(2, "little") + comment)
    return comment.removeprefix(HASH_LABEL).decode()


def recorded_hash(path: str | Path) -> str | None:
    """The sha256 in the archive's comment, or None where the file does not end in exactly such a
    comment."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) <= COMMENT_SIZE + 2:
            return None
        file.seek(-COMMENT_SIZE - 2, os.SEEK_END)
        size = file.read(2)
        comment = file.read()
    if int.from_bytes(size, "little") != COMMENT_SIZE or not comment.startswith(HASH_LABEL):
        return None
    return comment[len(HASH_LABEL) :].decode("ascii", "replace")


def find_file_damage(path: str | Path) -> str | None:
    """None if the file is exactly what was written, else what is wrong with it. Reads the whole
    file, once as long as it does not change."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return "not a regular file"  # a FIFO would wait for ever
    try:
        return _find_damage(path, file_state(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=4096)
def _find_damage(path: str | Path, state: tuple) -> str | None:
    recorded = recorded_hash(path)
    if recorded is None:
        return "no hash at its end, so it is truncated or not a checkpoint of this project"
    return None if _file_hash(path) == recorded else "its content does not match its hash"


def _file_hash(path: str | Path) -> str:
    """sha256 of the file as it was before the comment: without it, and with zero as its length."""
    remaining = os.path.getsize(path) - COMMENT_SIZE - 2
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0:
            block = file.read(min(BLOCK, remaining))
            if not block:
                break
            digest.update(block)
            remaining -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()
