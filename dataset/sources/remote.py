"""Local and remote files by path or URL, through fsspec: retried with back-off, never in silence.

A read that fails for a reason that may pass (a 503, a reset, a body that was cut, a time-out) is
tried again from the byte where it stopped. A missing file or a refused login is not. A server that
never answers costs a shard two to three minutes (see base/remote.py).
"""

import bz2
import gzip
import io
import lzma
import os
import random
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from base.caches import digest, file_state
from base.errors import MissingData, UserError
from base.limits import EXPANSION, SMALL_BYTES, check_limit
from base.remote import cause, describe, file_system, is_missing, patience
from base.writing import atomic_write, write_text

ATTEMPTS = 6  # with the waits between them about 16 seconds
FIRST_WAIT = 0.5  # seconds, doubled from attempt to attempt
BUFFER = 1 << 20  # bytes read at a time
GZIP, BZIP2, XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
NOT_READ = {b"\x28\xb5\x2f\xfd": "zstandard", b"\x04\x22\x4d\x18": "lz4"}  # how a file begins
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)  # what decompressors raise
PASSING_STATUS = (408, 425, 429)  # client errors worth another attempt
Result = TypeVar("Result")


def is_remote(url: str) -> bool:
    """Whether a string is a URL instead of a path."""
    return "://" in url


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if is_missing(error):
        return False
    error = cause(error)
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in PASSING_STATUS
    lasting = (IsADirectoryError, PermissionError, UserError, ImportError, NotImplementedError)
    return not isinstance(error, lasting)


class Patience:
    """The seconds that failed attempts may still cost, for one file or request."""

    def __init__(self):
        self.left = patience()

    def try_until_it_works(self, work: Callable[[], Result]) -> Result:
        """`work()`, tried up to ATTEMPTS times with growing waits where its error may pass, as long
        as the patience lasts."""
        for attempt in range(ATTEMPTS):
            begin = time.monotonic()
            try:
                return work()
            except Exception as error:  # every storage service raises its own
                self.left -= time.monotonic() - begin
                if attempt == ATTEMPTS - 1 or self.left <= 0 or not may_pass(error):
                    raise
                _wait(attempt)
        raise AssertionError


def with_retries(work: Callable[[], Result]) -> Result:
    """`work()`, tried again where its error may pass."""
    return Patience().try_until_it_works(work)


_JITTER = random.Random()  # its own: the global generators belong to the samples


def _wait(attempt: int) -> None:
    """The jitter keeps a thousand readers of one store from coming back at the same moment."""
    time.sleep(FIRST_WAIT * 2**attempt * _JITTER.uniform(0.75, 1.25))


class RemoteFile(io.RawIOBase):
    """A remote file, read forward and by seeking. size: its bytes; None where nobody knows."""

    def __init__(self, url: str):
        self.url = url
        self.file = None  # before what may fail: it is closed all the same
        self.files, self.path = file_system(url)
        self.patience = Patience()  # for all reads together
        about = self.patience.try_until_it_works(lambda: self.files.info(self.path))
        self.size = about.get("size")
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size or 0}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        data = self.patience.try_until_it_works(lambda: self._read(len(buffer)))
        self.position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, count: int) -> bytes:
        try:
            if self.file is None:
                # a known size saves a request, and a chance to fail
                known = {"size": self.size} if self.url.startswith("http") and self.size else {}
                self.file = self.files.open(self.path, "rb", **known)
            if self.file.tell() != self.position:
                self._move()
            data = self.file.read(count)
            if not data and self.size is not None and self.position < self.size:
                raise ConnectionError(f"ended at byte {self.position} of {self.size}")
            if count and not data and not self.position:
                raise ConnectionError("an empty answer")
            return data
        except Exception:
            self._drop()
            raise

    def _move(self) -> None:
        """Go to `position`; a stream without a known length is read up to there."""
        if self.size is not None:
            self.file.seek(self.position)
            return
        while (left := self.position - self.file.tell()) > 0:
            if not self.file.read(min(left, BUFFER)):
                raise ConnectionError(f"ended before byte {self.position}")

    def _drop(self) -> None:
        file = self.file
        self.file = None
        try:
            if file is not None:
                file.close()
        except Exception:  # it is broken already
            pass

    def close(self) -> None:
        self._drop()
        super().close()


@contextmanager
def open_file(url: str):
    """A local or remote file opened for reading bytes, buffered and with `peek`."""
    if is_remote(url):
        with io.BufferedReader(RemoteFile(url), BUFFER) as file:
            yield file
    else:
        with open(url, "rb") as file:
            yield file


def read_file(url: str) -> bytes:
    """Content of a small local or remote file, in one request. UserError above the limit."""
    if not is_remote(url):
        if not os.path.isfile(url):
            raise FileNotFoundError(f"{url}: no such file")
        with open(url, "rb") as file:
            data = file.read(SMALL_BYTES + 1)
    else:
        files, path = file_system(url)
        data = with_retries(lambda: _first_bytes(files, path, SMALL_BYTES + 1))
    check_limit(url, len(data), SMALL_BYTES, "bytes or more", "fetch it again")
    return data


def _first_bytes(files, path: str, count: int) -> bytes:
    """Up to `count` bytes of a remote file's start."""
    if path.startswith("http"):  # as a stream: some servers know no ranges and send everything
        data = bytearray()
        # fsspec makes a stream of blocks of 0 bytes, and any size saves the request for it
        with files.open(path, "rb", block_size=0, size=count) as stream:
            while len(data) < count and (block := stream.read(BUFFER)):
                data += block
        return bytes(data)
    try:
        return files.cat_file(path, start=0, end=count)
    except Exception:  # an empty file has no range; every storage service raises its own
        if files.info(path).get("size") == 0:
            return b""
        raise


def state_of(url: str) -> tuple:
    """What changes with the content of a file, without reading it."""
    if not is_remote(url):
        return file_state(url)
    files, path = file_system(url)
    return url, *state_in(with_retries(lambda: files.info(path)))


def state_in(about: dict) -> tuple[str, ...]:
    """What changes with the content of a file, of what its store says about it: size, then others,
    each empty or None where it is not said."""
    names = ("size", "ETag", "etag", "LastModified", "mtime", "last_modified", "updated", "md5Hash")
    return tuple(str(about.get(name, "")) for name in names)


def read_text(place: str, name: str) -> str | None:
    """A small text file of a folder or URL; None where there is none.

    MissingData where a URL cannot be asked, so that no answer is not taken for a missing file.
    """
    url = address(place, name)
    try:
        return read_file(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text ({error})") from None
    except Exception as error:  # every storage service raises its own
        if is_missing(error):
            return None
        raise MissingData(
            f"{url}: cannot be read ({describe(error)}); check the address and the "
            "network, or fetch the data set and name its folder"
        ) from None


def address(place: str, name: str) -> str:
    """Where a file of a folder or URL is read; of a data set's page at Hugging Face, its files."""
    place = place.rstrip("/")
    if place.startswith("https://huggingface.co/datasets/"):
        head, tree, branch = place.partition("/tree/")
        if tree:
            place = f"{head}/resolve/{branch}"
        elif "/resolve/" not in place:
            place = f"{place}/resolve/main"
    return f"{place}/{name}"


@contextmanager
def plain_stream(url: str):
    """(file, size) of a local or remote file, decompressed. size: None where it must be read
    through: compressed, or of unknown length. Raises what the storage raises."""
    if not is_remote(url) and not os.path.isfile(url):
        raise FileNotFoundError(f"{url}: no such file")
    with open_file(url) as file:
        start = file.peek(6)[:6]
        if program := NOT_READ.get(start[:4]):
            raise UserError(f"{url}: compressed by {program}, which is not read; use gzip or none")
        if start.startswith(GZIP):
            yield gzip.GzipFile(fileobj=file), None
        elif start.startswith(BZIP2):
            yield bz2.BZ2File(file), None
        elif start.startswith(XZ):
            yield lzma.LZMAFile(file), None
        else:
            yield file, file.raw.size if is_remote(url) else os.fstat(file.fileno()).st_size


def local_copy(place: str, name: str, cache: Path) -> Path:
    """The file itself where it is local, else its copy in `cache`, made at the first use and again
    where the original has changed. Without a network the copy serves as it is."""
    url = address(place, name)
    if not is_remote(url):
        if not Path(url).is_file():
            raise UserError(
                f"{url}: no such file, though nshards.txt counts it; fetch the data set again"
            )
        return Path(url)
    target = cache / digest(place) / name
    made_of = target.with_name(f"{target.name}.source")
    try:
        state = digest(state_of(url))
        if not target.is_file() or not made_of.is_file() or made_of.read_text() != state:
            with atomic_write(target) as temporary, open_file(url) as source:
                _copy(source, temporary)
            write_text(made_of, state)
    except Exception as error:  # every storage service raises its own
        if not target.is_file():
            raise MissingData(
                f"{url}: cannot be fetched into {cache} ({describe(error)}); check "
                "the network and the disk"
            ) from None
    return target


def plain_copy(url: str, cache: Path) -> Path:
    """A file that can seek: the file itself where it is local and not compressed, else its
    decompressed copy in `cache`. UserError where it cannot be read."""
    try:
        with plain_stream(url) as (source, size):
            if size is not None and not is_remote(url):
                return Path(url)
            target = cache / "shards" / f"{digest(state_of(url))}.tar"
            if not target.is_file():
                limit = EXPANSION * _stored_bytes(url) + BUFFER
                with atomic_write(target) as temporary:
                    _copy(source, temporary, limit)
            return target
    except UserError:
        raise
    except Exception as error:  # decompressors and every storage service raise their own
        raise UserError(f"{url}: cannot be read ({describe(error)}); fetch it again") from None


def _stored_bytes(url: str) -> int:
    if not is_remote(url):
        return os.path.getsize(url)
    files, path = file_system(url)
    return with_retries(lambda: files.info(path)).get("size") or BUFFER


def _copy(source, target: Path, limit: int | None = None) -> None:
    written = 0
    with target.open("wb") as file:
        while block := _block_of(source):
            written += len(block)
            if limit is not None and written > limit:
                raise ValueError(f"expands to more than {EXPANSION} times its size")
            file.write(block)


class _SourceFault(Exception):
    """A file could not be read to its end: as an OSError it would be taken for a full disk."""


def _block_of(source) -> bytes:
    try:
        return source.read(BUFFER)
    except Exception as error:  # decompressors and every storage service raise their own
        raise _SourceFault from error
