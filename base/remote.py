"""Remote files by URL, through fsspec: how a file system is found, and what an error means."""

import os
from typing import Any

from base.errors import UserError

CONNECT = 20.0  # seconds in which a server must accept a connection
SILENCE = 60.0  # seconds without a byte after which it counts as stalled; QUINTET_REMOTE_SILENCE
PATIENCE = 120.0  # seconds that a file's failed attempts may cost; QUINTET_REMOTE_PATIENCE
PACKAGES = {  # what fsspec needs for a scheme
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}


def file_system(url: str):
    """(file system, path in it) of a URL. UserError names the package that a scheme needs."""
    import fsspec

    scheme = url.partition("://")[0]
    limits = _limits(url, scheme)
    try:
        return fsspec.core.url_to_fs(url, **limits)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else "fetch it and give its path"
        need = f"needs the package {package}" if package else f"is not supported ({error})"
        raise UserError(f"{url}: {scheme}:// {need}; {remedy}") from None


def _limits(url: str, scheme: str) -> dict[str, Any]:
    """fsspec's options for a server that does not answer."""
    if scheme in ("http", "https"):
        return {"client_kwargs": {"timeout": _http_timeout(url)}}
    if scheme in ("s3", "s3a"):
        # s3fs tries five times; botocore would do that each time
        limits = {"connect_timeout": CONNECT, "read_timeout": silence()}
        return {"config_kwargs": {**limits, "retries": {"max_attempts": 0}}}
    return {}


def _http_timeout(url: str):
    try:
        import aiohttp
    except ImportError:
        raise UserError(f"{url}: http:// needs the package aiohttp; pip install aiohttp") from None
    connect = min(CONNECT, silence())
    return aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=silence())


def silence() -> float:
    """Seconds without a byte after which a server counts as stalled."""
    return _seconds("QUINTET_REMOTE_SILENCE", SILENCE)


def patience() -> float:
    """Seconds that the failed attempts to read a file may cost together."""
    return _seconds("QUINTET_REMOTE_PATIENCE", PATIENCE)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={text}: expected a number of seconds above 0")
    return value


def cause(error: BaseException) -> BaseException:
    """What lies behind an error: fsspec calls a server that does not answer a missing file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def describe(error: BaseException) -> str:
    """The root of an error in one line."""
    root = cause(error)
    return f"{type(root).__name__}: {' '.join(str(root).split())}"


def is_forbidden(error: BaseException) -> bool:
    """Whether a store refuses a file. One that may not be listed does so where there is none, too."""
    root = cause(error)
    return getattr(root, "status", None) in (401, 403) or isinstance(root, PermissionError)


def is_missing(error: BaseException) -> bool:
    """Whether an error says that there is no such file."""
    root = cause(error)
    if getattr(root, "status", None) in (404, 410):
        return True
    # a dictionary stands behind fsspec's file system in memory
    return isinstance(root, (FileNotFoundError, NotADirectoryError, KeyError))
