"""Shards on a server that is slow, refuses, resets connections and cuts bodies; and start-up."""

import io
import json
import re
import socket
import threading
import time
from collections import Counter
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest

from base.errors import BadSample, UserError
from base.remote import file_system
from dataset.loading.stream import StreamLoader
from dataset.sources import remote, shard_list
from dataset.sources.remote import RemoteFile, local_copy, read_text
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import find_shards, list_shards
from dataset.sources.shards import ShardSource, read_shard, shard_sources
from dataset.sources.tfrecord import encode_example, write_records
from tests.contract.stream_cases import Build, stream, write_shards
from tests.helpers.processes import spawn

pytest.importorskip("aiohttp")


class Server(ThreadingHTTPServer):
    """Files of a folder by range. trouble(request number, path): what goes wrong, or None."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests = Counter()
        self.trouble = lambda number, path: None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients leave when we cut them off


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        with server.lock:
            server.requests[self.path] += 1
            number = sum(server.requests.values())
        trouble = server.trouble(number, self.path)
        if trouble == "slow":
            time.sleep(0.05)
        if trouble == "reset":
            self.hang_up()
            return
        path = server.folder / self.path.lstrip("/")
        if trouble in (503, 429, 403, 416, 200):  # 200: a proxy's, with nothing behind it
            self.empty(trouble)
        elif trouble == "redirect":
            self.redirect()
        elif not path.is_file():
            self.empty(404)
        else:
            self.content(path.read_bytes(), body, trouble)

    def empty(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, data, body, trouble):
        total = len(data)
        cut = trouble in ("cut", "longer")
        wanted = trouble != "no range" and re.match(
            r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")
        )
        if wanted:
            first = int(wanted[1])
            last = min(int(wanted[2] or total - 1), total - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        if trouble != "no range":
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(2 * len(data) if trouble == "longer" else len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    (tmp_path / "store").mkdir()
    write_shards(tmp_path / "store", (9, 6, 8))
    server = Server(tmp_path / "store")
    yield server
    server.shutdown()
    server.server_close()


def numbers(loader, count):
    return [number for batch in islice(loader, count) for number in batch["number"].tolist()]


TROUBLES = {
    "slow": lambda number, path: "slow" if number % 3 == 0 else None,
    "503": lambda number, path: 503 if number % 3 == 1 else None,
    "429": lambda number, path: 429 if number % 3 == 1 else None,
    "reset": lambda number, path: "reset" if number % 3 == 1 else None,
    "cut": lambda number, path: "cut" if number % 3 == 1 else None,
    "no range": lambda number, path: "no range",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_loses_nothing(trouble, server, tmp_path):
    server.trouble = TROUBLES[trouble]
    url = f"{server.url}/{{00000..00002}}.tar"
    source = ShardSource(find_shards(url), Build(), group=2, shuffle_buffer=7)
    local = find_shards(f"{tmp_path}/store/{{00000..00002}}.tar")
    local = ShardSource(local, Build(), group=2, shuffle_buffer=7)
    assert source.found.counts == local.found.counts == (9, 6, 8)
    ours = StreamLoader(stream(source), 4, 0, seed=3)
    theirs = StreamLoader(stream(local), 4, 0, seed=3)
    assert numbers(ours, 12) == numbers(theirs, 12)
    assert sum(ours.errors.values()) == 0
    assert read_text(server.url, "00001_stats.json") == json.dumps({"successes": 6})
    whole = (tmp_path / "store/00001.tar").read_bytes()
    assert local_copy(server.url, "00001.tar", tmp_path / "copies").read_bytes() == whole
    index = ShardIndex([f"{server.url}/00002.tar"])
    assert [index[i]["caption"] for i in range(8)] == [str(n) for n in range(15, 23)]


def test_reading_goes_on_from_the_byte_where_it_stopped(server, tmp_path, monkeypatch):
    data = bytes(range(256)) * 4000
    (tmp_path / "store/x.bin").write_bytes(data)
    server.trouble = TROUBLES["cut"]
    with io.BufferedReader(RemoteFile(f"{server.url}/x.bin"), 1 << 16) as file:
        assert file.read(1000) == data[:1000]
        file.seek(500_000)
        assert file.read() == data[500_000:]
        file.seek(7)
        assert file.read(9) == data[7:16]


@pytest.mark.parametrize("trouble", [503, "reset", "cut", 200, 416, "redirect", "longer"])
def test_a_lost_shard_counts_its_samples_and_is_named(trouble, server):
    url = f"{server.url}/{{00000..00002}}.tar"
    source = ShardSource(find_shards(url), Build(), group=2, shuffle_buffer=7)
    server.trouble = lambda number, path: trouble if path == "/00001.tar" else None
    loader = StreamLoader(stream(source), 4, 0, seed=3, error_budget=0.9)
    seen = set(numbers(loader, 8))
    assert seen == {*range(9), *range(15, 23)}
    assert loader.errors[url] % 6 == 0 and loader.errors[url] > 0
    assert "00001.tar" in loader.bad_samples[0] and "is lost" in loader.bad_samples[0]
    loader = StreamLoader(stream(source), 4, 0, seed=3)
    with pytest.raises(UserError, match=r"00001\.tar.*is lost"):
        numbers(loader, 40)


@pytest.mark.parametrize("trouble", [None, "no range"])
def test_small_files_are_read_in_one_request_up_to_the_limit(
    trouble, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "SMALL_BYTES", 3_000_000)
    server.trouble = lambda number, path: trouble
    for size in (0, 3_000_000, 3_000_001):
        (tmp_path / f"store/{size}").write_bytes(b"x" * size)
    assert read_text(server.url, "0") == ""
    assert read_text(server.url, "3000000") == "x" * 3_000_000
    assert set(server.requests.values()) == {1}
    for place in (server.url, f"{tmp_path}/store"):
        with pytest.raises(UserError, match=r"3000001: 3,000,001 bytes or more, the limit"):
            read_text(place, "3000001")


def test_an_empty_small_file_of_a_bucket(monkeypatch):
    files = file_system("memory://")[0]
    files.pipe_file("/box/empty.txt", b"")
    files.pipe_file("/box/names.txt", b"cat")

    def ranged(path, start, end):
        if not files.size(path):
            raise OSError("InvalidRange")  # as s3 answers
        return type(files).cat_file(files, path, start, end)

    monkeypatch.setattr(files, "cat_file", ranged)
    assert read_text("memory://box", "empty.txt") == ""
    assert read_text("memory://box", "names.txt") == "cat"
    assert read_text("memory://box", "missing.txt") is None


def test_what_does_not_pass_is_not_tried_again(server):
    server.trouble = lambda number, path: 403
    begin = time.monotonic()
    (bad,) = read_shard(f"{server.url}/00000.tar", 9)
    assert isinstance(bad, BadSample) and bad.lost == 9 and "403" in str(bad)
    assert time.monotonic() - begin < 5 and sum(server.requests.values()) <= 3
    with pytest.raises(UserError, match=r"00000\.tar.*403"):
        find_shards(f"{server.url}/00000.tar")


class Breaking(io.BytesIO):
    """A body that comes without its length and breaks off."""

    def read(self, count=-1):
        if self.tell() > 3000:
            raise ConnectionResetError("reset by peer")
        return super().read(count)


@pytest.mark.parametrize("name", ["00000.tar", "00000.tfrecord"])
def test_a_store_that_fails_while_it_is_counted_has_no_shorter_shard(name, server, monkeypatch):
    store = server.folder
    (store / "00000_stats.json").unlink()
    images = [encode_example({"jpg": bytes(1000)})] * 9
    write_records(store / "00000.tfrecord", images)
    with monkeypatch.context() as patched:
        data = (store / name).read_bytes()
        breaking = nullcontext((Breaking(data), None))
        patched.setattr(shard_list, "plain_stream", lambda url: breaking)
        with pytest.raises(UserError, match=r"its samples cannot be counted .*reset by peer"):
            find_shards(f"{server.url}/{name}")
    assert find_shards(f"{server.url}/{name}").counts == (9,)


def test_statistics_that_are_forbidden_are_none(server, tmp_path):
    """As a bucket that may not be listed answers for what is not there."""
    server.trouble = lambda number, path: 403 if path.endswith(".json") else None
    assert find_shards(f"{server.url}/00001.tar").counts == (6,)


def test_shards_without_statistics_are_counted_once(server, tmp_path):
    for path in (tmp_path / "store").glob("*.json"):
        path.unlink()
    url = f"{server.url}/{{00000..00002}}.tar"
    assert find_shards(url).counts == (9, 6, 8)
    first = server.requests["/00001.tar"]
    assert find_shards(url).counts == (9, 6, 8)
    assert server.requests["/00001.tar"] <= first + 2  # asks for its state alone
    assert find_shards(url, samples=23).counts == ()


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme, package):
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(UserError, match=f"needs the package {package}; pip install {package}"):
            list_shards(f"{scheme}://bucket/folder/*.tar")
        with pytest.raises(UserError, match=f"needs the package {package}"):
            find_shards(f"{scheme}://bucket/0.tar")
    with pytest.raises(UserError, match="nowhere:// is not supported"):
        find_shards("nowhere://bucket/0.tar")


DELAY = 0.03  # seconds an answer of the store takes


def slow_store(requests):
    """A file system that answers each request after DELAY, as object stores do."""
    import fsspec

    lock = threading.Lock()

    class Slow(fsspec.AbstractFileSystem):
        protocol = "slow"

        def cat_file(self, path, start=None, end=None, **options):
            time.sleep(DELAY)
            with lock:
                requests["cat"] += 1
            return json.dumps({"successes": 1000}).encode()

        def info(self, path, **options):
            time.sleep(DELAY)
            with lock:
                requests["info"] += 1
            return {"name": path, "size": 10240, "type": "file"}

    fsspec.register_implementation("slow", Slow, clobber=True)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_shards_on_a_slow_store_start_quickly(count):
    """One request a shard, 64 at a time, by one process for all; one after another it would take
    count times DELAY on every process."""
    requests = Counter()
    slow_store(requests)
    begin = time.monotonic()
    shards = find_shards(f"slow://bucket/{{00000..{count - 1:05d}}}.tar")
    seconds = time.monotonic() - begin
    assert shards.samples == 1000 * count and requests == {"cat": count}
    assert seconds < min(60, count * DELAY / 4)
    print(f"{count} shards, {DELAY * 1000:.0f} ms an answer: {seconds:.1f} s")


def start_on_a_slow_store(rank, count):
    requests = Counter()
    slow_store(requests)
    begin = time.monotonic()
    (source,) = shard_sources([f"slow://bucket/{{00000..{count - 1:05d}}}.tar"], Build(), 10)
    seconds = time.monotonic() - begin
    assert len(source) == 1000 * count and len(source.found.counts) == count
    assert requests == ({} if rank else {"cat": count})  # each file once a run, not once a process
    assert seconds < 60, f"{count} shards: {seconds:.1f} s"


LARGE = [pytest.param(10_000, ranks, marks=pytest.mark.slow) for ranks in (2, 4)]


@pytest.mark.parametrize(("count", "ranks"), [(400, 2), *LARGE])
def test_many_processes_start_as_quickly_as_one(count, ranks):
    spawn(start_on_a_slow_store, ranks, count)


def test_tar_files_of_a_plain_server_folder_need_braces(server):
    with pytest.raises(UserError, match=r"no such shard|cannot be listed"):
        list_shards(f"{server.url}/nowhere/")


def test_a_stalled_server_is_given_up(server, monkeypatch):
    """After its patience, not after all six attempts: each asks twice, by HEAD and by GET."""
    monkeypatch.setenv("QUINTET_REMOTE_SILENCE", "0.3")
    monkeypatch.setenv("QUINTET_REMOTE_PATIENCE", "0.5")
    answer = threading.Event()

    def stall(number, path):
        answer.wait(60)

    server.trouble = stall
    (bad,) = read_shard(f"{server.url}/00000.tar", 9)
    answer.set()
    assert bad.lost == 9 and "Timeout" in str(bad)
    assert sum(server.requests.values()) == 2


def test_a_server_that_stalls_within_a_shard_is_given_up(server, monkeypatch):
    """The attempts of all reads count together: one that gets a few bytes each time ends, too."""
    data = bytes(range(256)) * 40
    (server.folder / "x.bin").write_bytes(data)
    monkeypatch.setenv("QUINTET_REMOTE_PATIENCE", "1")
    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    file = RemoteFile(f"{server.url}/x.bin")
    read, reads = file._read, []

    def every_second_fails(count):
        reads.append(file.position)
        if len(reads) % 2:
            clock[0] += 0.3  # seconds
            raise TimeoutError
        return read(100)

    file._read = every_second_fails
    with pytest.raises(TimeoutError):
        while True:
            file.read(1000)
    assert reads == [0, 0, 100, 100, 200, 200, 300]


def test_limits_of_stores(monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # botocore rewrites the options of those that connected
    files, _ = file_system("s3://bucket/key")
    assert files.config_kwargs["retries"] == {"max_attempts": 0}
    assert files.config_kwargs["read_timeout"] == 60
    monkeypatch.setenv("QUINTET_REMOTE_SILENCE", "soon")
    with pytest.raises(
        UserError, match="QUINTET_REMOTE_SILENCE=soon: expected a number of seconds"
    ):
        file_system("http://localhost/x")
    never_opened = RemoteFile.__new__(RemoteFile)
    with pytest.raises(UserError):
        never_opened.__init__("http://localhost/x")
    never_opened.close()  # as Python does


@pytest.mark.parametrize("trouble", [200, "redirect", "longer"])
def test_what_is_no_answer_is_neither_counted_nor_kept(trouble, server, tmp_path):
    """Nothing, a circle, and less than was announced: no count and no copy is made of them."""
    for path in (tmp_path / "store").glob("*.json"):
        path.unlink()
    server.trouble = lambda number, path: trouble if path.endswith(".tar") else None
    with pytest.raises(UserError, match=r"00000\.tar: its samples cannot be counted"):
        find_shards(f"{server.url}/00000.tar")
    with pytest.raises(UserError, match=r"00000\.tar: cannot be fetched"):
        local_copy(server.url, "00000.tar", tmp_path / "copies")
    assert not list((tmp_path / "copies").rglob("*.tar"))
    server.trouble = lambda number, path: None
    assert find_shards(f"{server.url}/00000.tar").counts == (9,)
