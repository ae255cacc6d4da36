"""`--output_dir s3://…` and `gs://…`: a run writes to a folder here, and threads bring it to the bucket.

    with output_in_bucket(config):      # runtime.config.cli.run_script
        main(config)

The bucket holds the run's files under their own names; `.committed.json`, written after them, lists
what belongs together, and a fresh machine fetches just that. `.lease.json` belongs to the one run
that writes there. A bucket that fails or stalls costs the training nothing: it is reported, tried
again, and at the end the run says what is not there.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from base.caches import one_builder
from base.errors import UserError
from base.reading import parse_json
from base.remote import describe, file_system, is_forbidden, is_missing
from base.writing import file_errors

SCHEMES = ["s3", "s3a", "gs", "gcs", "az", "abfs"]
COMMITTED, LEASE = ".committed.json", ".lease.json"
PULSE = 20.0  # seconds between two signs of life in the lease
ANSWER = 60.0  # seconds for the first answer of a bucket
REPORT = 60.0  # seconds without progress after which it is reported
EXIT_NOT_WRITTEN = 74  # EX_IOERR of sysexits.h
STEP = re.compile(r"checkpoint_(\d+)(?:\.pt)?(?:/|$)")
REMEDY = "check the address, the credentials and the bucket's policy, or name another --output_dir"


def bucket_url(path: Path) -> str | None:
    """The URL that an output folder means; None where it is a plain folder."""
    scheme, colon, rest = str(path).partition(":/")
    return f"{scheme}://{rest.strip('/')}" if colon and scheme in SCHEMES else None


@contextlib.contextmanager
def output_in_bucket(config: Any, rank: str) -> Iterator[None]:
    """Replaces a bucket as `config.output_dir` by a folder below `config.scratch`, with the run that
    is in the bucket; meanwhile rank 0 brings to the bucket what changes there. UserError where
    another run writes to the bucket, or nobody may."""
    url = bucket_url(config.output_dir)
    if url is None:
        yield
        return
    scratch = Path(getattr(config, "scratch", "output/scratch"))
    config.output_dir = folder = scratch / url.replace("://", "/")
    bucket = Bucket(url)
    lease = Lease(bucket)
    if rank == "0":
        within(ANSWER + 2 * PULSE, lease.take, url)
    with one_builder(folder.with_name(f".{folder.name}.download")):
        committed = fetch_run(bucket, folder)
    if rank != "0":
        yield
        return
    pause = getattr(config, "bucket_seconds", 10.0)
    uploader = Uploader(bucket, folder, lease, committed, pause)
    left: list[str] = []
    try:
        yield
    finally:
        left = uploader.close(getattr(config, "bucket_patience", 300.0))
        if left:
            names = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            print(
                f"error: not written to {url}: {names} ({uploader.trouble or 'no answer'}); all is in "
                f"{folder}: start the same command again here, or copy it there",
                file=sys.stderr,
                flush=True,
            )
    if left:
        sys.exit(EXIT_NOT_WRITTEN)


def within(seconds: float, work: Callable[[], None], url: str) -> None:
    """`work()` on a bucket. UserError where it fails or takes longer."""
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"{url}: no answer for {seconds:g} seconds; {REMEDY}")
    for error in failures:
        if isinstance(error, UserError):
            raise error
        raise UserError(f"{url}: cannot be written to ({describe(error)}); {REMEDY}") from None


class Bucket:
    """The objects below a URL."""

    def __init__(self, url: str):
        self.url = url
        self.files, self.root = file_system(url)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> dict | None:
        """A small JSON object; None where there is none, or what there is is no JSON."""
        try:
            return parse_json(self.files.cat_file(self.path(name)), name, dict)
        except UserError:
            return None
        except Exception as error:  # every storage service raises its own
            if is_missing(error):
                return None
            raise

    def names(self) -> list[str]:
        """Of all objects here; none where it is forbidden to list them."""
        try:
            self.files.invalidate_cache(self.root)
            found = self.files.find(self.root)
        except Exception as error:  # every storage service raises its own
            if is_forbidden(error):
                return []
            raise
        return [name.removeprefix(self.path("")) for name in found]

    def write(self, name: str, value: dict) -> None:
        self.files.pipe_file(self.path(name), json.dumps(value).encode())

    def remove(self, name: str) -> None:
        try:
            self.files.rm_file(self.path(name))
        except Exception as error:
            if not is_missing(error):
                raise


class Lease:
    """The right to write to a bucket: an object in which one run shows signs of life."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        self.id = secrets.token_hex(8)
        self.beats = 0
        self.lost = self.given_back = False
        self.lock = threading.Lock()

    def take(self) -> None:
        """UserError where another run has it."""
        found = self.bucket.read(LEASE)
        if found is not None and is_alive(found, self.bucket):
            raise UserError(self._refusal(found))
        self._write()
        found = self.bucket.read(LEASE)
        if found is None or found.get("id") != self.id:  # two came at the same time
            raise UserError(self._refusal(found or {}))

    def renew(self) -> None:
        """Another sign of life. UserError where another run has taken the lease."""
        with self.lock:
            self._hold()
            if not self.given_back:
                self._write()

    def give_back(self) -> None:
        """UserError where another run has taken the lease, which stays its own."""
        with self.lock:
            self._hold()
            self.given_back = True
            self.bucket.remove(LEASE)

    def _hold(self) -> None:
        found = self.bucket.read(LEASE)
        self.lost = found is not None and found.get("id") != self.id
        if self.lost:
            raise UserError(self._refusal(found or {}))

    def _write(self) -> None:
        self.beats += 1
        own = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid(), "beats": self.beats}
        self.bucket.write(LEASE, {**own, "started": started(os.getpid())})

    def _refusal(self, found: dict) -> str:
        who = f"process {found.get('pid')} on {found.get('host')}"
        return f"{self.bucket.url}: another run writes there ({who}); choose another --output_dir"


def is_alive(found: dict, bucket: Bucket) -> bool:
    """Whether the run that wrote a lease still runs. That of another machine is watched for two
    pulses: clocks differ. So is one here where nothing tells when processes began (macOS)."""
    here = found.get("host") == socket.gethostname() and isinstance(found.get("pid"), int)
    if here and found.get("started"):
        return started(found["pid"]) == found["started"]
    end = time.monotonic() + 2 * PULSE
    print(f"{bucket.url}: looking for {2 * PULSE:g} s whether a run still writes there", flush=True)
    while time.monotonic() < end:
        time.sleep(PULSE / 10)
        now = bucket.read(LEASE)
        if now is None:
            return False
        if now != found:
            return True
    return False


def started(pid: int) -> str | None:
    """When a process began, in ticks since the start of the machine: numbers come again in containers.
    None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


# ---- from the bucket
def fetch_run(bucket: Bucket, folder: Path) -> dict:
    """Fetch the run that was committed, unless this folder has come as far. A folder that is behind
    is set aside. Returns what was committed: `files` and `links`, by name. UserError, also where no
    checkpoint is left, here or there."""
    here = newest_step(files_in(folder))
    try:
        committed = bucket.read(COMMITTED) or {"files": {}, "links": {}}
        if newest_step(committed["files"]) <= here:
            return committed
        fetched = folder.with_name(f".{folder.name}.fetching")
        shutil.rmtree(fetched, ignore_errors=True)
        for name in committed["files"]:
            _fetch(bucket, name, fetched)
        for name, target in committed["links"].items():
            if Path(name).name == name and Path(target).name == target:
                (fetched / name).symlink_to(target, target_is_directory=True)
    except UserError:
        raise
    except Exception as error:  # every storage service raises its own
        raise UserError(f"{bucket.url}: cannot be read ({describe(error)}); {REMEDY}") from None
    if newest_step(files_in(fetched)) <= here:  # the bucket has lost what was ahead
        shutil.rmtree(fetched, ignore_errors=True)
        if here >= 0:
            return committed
        raise UserError(
            f"{bucket.url}: no checkpoint is there of those that {COMMITTED} names; restore them, or "
            "name another --output_dir"
        )
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.superseded-{secrets.token_hex(4)}")
        print(f"{folder} is behind {bucket.url}; now {aside.name}", flush=True)
        folder.rename(aside)
    fetched.rename(folder)
    print(f"fetched {len(committed['files'])} files of {bucket.url} into {folder}", flush=True)
    return committed


def _fetch(bucket: Bucket, name: str, folder: Path) -> None:
    """One file. What is missing or cut is noticed by its hash, as on a disk."""
    target = folder / name
    if folder.resolve() not in target.resolve().parents:
        raise UserError(f"{bucket.url}: {COMMITTED} names {name!r}; name another --output_dir")
    with file_errors(target, "make room or name another --scratch"):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        bucket.files.get_file(bucket.path(name), str(target))
    except Exception as error:
        if not is_missing(error):
            raise
        print(f"warning: {bucket.url} lacks {name}", file=sys.stderr, flush=True)


def newest_step(names: Any) -> int:
    """Step of the newest checkpoint among files; -1 where there is none."""
    found = [STEP.match(name) for name in names]
    return max((int(match[1]) for match in found if match), default=-1)


# ---- to the bucket
def files_in(folder: Path) -> dict[str, tuple]:
    """What to bring: the state of each file by its name; checkpoints first, for a log must not be
    older than its checkpoint."""
    found = {}
    for path, folders, names in os.walk(folder):
        here = Path(path)
        folders[:] = [n for n in folders if is_kept(n) and not (here / n).is_symlink()]
        for name in filter(is_kept, names):
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                about = (here / name).stat()
                state = (about.st_size, about.st_mtime_ns, about.st_ino)
                found[(here / name).relative_to(folder).as_posix()] = state
    return dict(sorted(found.items(), key=lambda entry: (not STEP.match(entry[0]), entry[0])))


def is_kept(name: str) -> bool:
    return not name.startswith(".") and ".superseded" not in name


def links_in(folder: Path) -> dict[str, str]:
    """Links to checkpoints beside them, by name."""
    return {
        path.name: os.readlink(path) for path in folder.glob("checkpoint_*") if path.is_symlink()
    }


class Uploader:
    """Threads that bring a folder to a bucket, which has what is `committed`. `trouble` is what went
    wrong last; None = all well."""

    def __init__(self, bucket: Bucket, folder: Path, lease: Lease, committed: dict, pause: float):
        self.bucket = bucket
        self.folder = folder
        self.lease = lease
        self.pause = pause
        self.committed = committed
        # checkpoints that a run before this one brought and died before it could commit them, or
        # took out of the list and died before it could remove them; None = not looked for yet
        self.strays: list[str] | None = None if committed["files"] else []
        # states of the files that are in the bucket; numbered checkpoints do not change
        self.there = {
            name: state
            for name, state in files_in(folder).items()
            if STEP.match(name) and self.committed["files"].get(name) == state[0]
        }
        self.trouble: str | None = None
        self.doing = ""  # nothing
        self.progress = 0.0  # time of the last success, or of the last block of a file
        self.ending = threading.Event()
        self.ended = threading.Event()
        for work in (self._bring, self._pulse, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def sync(self) -> None:
        """Bring what has changed, then write what belongs together, then remove what is gone."""
        if self.lease.lost:
            raise UserError("another run has taken the bucket")
        files = files_in(self.folder)
        for name, state in files.items():
            if self.there.get(name) != state:
                self._bring_file(name, state)
        sizes = {name: state[0] for name, state in files.items() if name in self.there}
        committed = {"files": sizes, "links": links_in(self.folder)}
        if committed == self.committed:
            return
        with self._doing(f"writing {COMMITTED}"):
            self.bucket.write(COMMITTED, committed)
        gone = [name for name in self.committed["files"] if name not in sizes]
        self.committed = committed
        for name in gone:
            self.there.pop(name, None)
            self._remove(name)
        self._remove_strays(sizes)

    def _remove_strays(self, kept: dict[str, int]) -> None:
        """Remove what no list names, as far as the run has come: a later checkpoint may have been
        put there by hand. Of the run's other files none but the newest is there."""
        if self.strays is None:
            with self._doing("looking for checkpoints that do not count"):
                self.lease.renew()
                self.strays = [name for name in self.bucket.names() if STEP.match(name)]
        newest = newest_step(kept)
        behind = [name for name in self.strays if newest_step([name]) <= newest]
        for name in behind:
            if name not in kept:
                self._remove(name)
        self.strays = [name for name in self.strays if name not in behind]

    def _remove(self, name: str) -> None:
        with self._doing(f"removing {name}"):
            self.bucket.remove(name)

    def _bring_file(self, name: str, state: tuple) -> None:
        from fsspec.callbacks import Callback

        class Progress(Callback):
            def relative_update(_, inc=1):
                self.progress = time.monotonic()

        path = self.folder / name
        try:
            with self._doing(f"writing {name}"):
                self.bucket.files.put_file(str(path), self.bucket.path(name), callback=Progress())
            self.there[name] = state
        except FileNotFoundError:
            if path.exists():  # not pruned meanwhile: it is the bucket that is gone
                raise

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        if self.ended.is_set():
            raise UserError("the run has ended, and has said what is not there")
        if self.trouble is None:
            self.progress = time.monotonic()
        self.doing = what
        yield
        self.doing = ""
        self.progress = time.monotonic()

    def missing(self) -> list[str]:
        """Files that are not in the bucket as they are here."""
        files = files_in(self.folder)
        return [name for name, state in files.items() if self.there.get(name) != state]

    def close(self, patience: float) -> list[str]:
        """Bring the rest, as long as it gets on; returns the files that are not in the bucket."""
        self.progress = time.monotonic()
        self.ending.set()
        while not self.ended.wait(0.1) and time.monotonic() - self.progress < patience:
            pass
        left = [] if self.ended.is_set() else self.missing() or [COMMITTED]
        self.ended.set()
        return left

    def _bring(self) -> None:
        while not self.ended.is_set():
            last = self.ending.wait(self.pause)
            try:
                self.sync()
                self.trouble = None
                if last and not self.missing():
                    self.lease.give_back()
                    self.ended.set()
                    return
            except Exception as error:  # every storage service raises its own
                if self.ended.is_set():
                    return
                self.trouble = str(error) if isinstance(error, UserError) else describe(error)
            if last:
                time.sleep(min(1.0, self.pause))

    def _pulse(self) -> None:
        while not self.ended.wait(PULSE):
            with contextlib.suppress(Exception):  # `sync` meets it, too
                self.lease.renew()

    def _watch(self) -> None:
        """Reports trouble once, until all is well again."""
        reported = False
        while not self.ended.wait(min(1.0, self.pause)):
            trouble = self.trouble
            if self.doing and time.monotonic() - self.progress > REPORT:
                trouble = trouble or f"no progress in {REPORT:g} s while {self.doing}"
            if trouble and not reported:
                print(
                    f"warning: {self.bucket.url}: {trouble}; training continues, its files stay in "
                    f"{self.folder} and are tried again",
                    file=sys.stderr,
                    flush=True,
                )
            reported = trouble is not None
