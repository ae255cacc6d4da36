"""Remote files by URL, through fsspec: how a file system is found, and what an error means."""

from base.errors import UserError

SILENCE = 60.0  # seconds without a byte after which an http server counts as stalled
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


def file_system(url: str, options: dict | None = None):
    """(file system, path in it) of a URL. UserError names the package that a scheme needs."""
    import fsspec

    scheme = url.partition("://")[0]
    options = dict(options or {})
    if scheme in ("http", "https") and "client_kwargs" not in options:
        options["client_kwargs"] = {"timeout": _http_timeout(url)}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else "fetch it and give its path"
        need = f"needs the package {package}" if package else f"is not supported ({error})"
        raise UserError(f"{url}: {scheme}:// {need}; {remedy}") from None


def _http_timeout(url: str):
    try:
        import aiohttp
    except ImportError:
        raise UserError(f"{url}: http:// needs the package aiohttp; pip install aiohttp") from None
    return aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)


def cause(error: BaseException) -> BaseException:
    """What lies behind an error: fsspec calls a server that does not answer a missing file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def describe(error: BaseException) -> str:
    """The root of an error in one line."""
    root = cause(error)
    return f"{type(root).__name__}: {' '.join(str(root).split())}"


def is_missing(error: BaseException) -> bool:
    """Whether an error says that there is no such file."""
    root = cause(error)
    if getattr(root, "status", None) in (404, 410):
        return True
    # a dictionary stands behind fsspec's file system in memory
    return isinstance(root, (FileNotFoundError, NotADirectoryError, KeyError))
