"""Strict JSON, atomic synced writes, the cache folder's keys, nearest names."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base import caches, names, reading, writing
from base.errors import UserError
from base.text import clean_surrogates
from base.writing import atomic_write, check_output_folder, make_folder, write_text

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_any_unicode_encoding(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_bytes('{"caption": ["ein Bär", "猫"]}'.encode(encoding))
    assert reading.read_json(path, dict) == {"caption": ["ein Bär", "猫"]}


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": NaN}', "NaN, which is no JSON number"),
        (b"[-Infinity]", "-Infinity"),
        (b"[" * 201 + b"]" * 201, "deeper than 200"),
        (b"[" * 300_000, "deeper than 200"),
        (b'{"a":' * 300_000, "deeper than 200"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
        (b"[1, 2]", "expected an object, found list"),
    ],
)
def test_unusable_json_is_one_sentence_with_file_and_position(tmp_path, content, complaint):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        reading.read_json(path, dict, "fetch it again")
    message = str(error.value)
    assert (
        message.startswith(f"{path}: ")
        and complaint in message
        and message.endswith("fetch it again")
    )
    assert "\n" not in message and len(message) < 400


def test_brackets_in_strings_do_not_count_as_depth():
    text = json.dumps({"caption": "[" * 5000 + '\\"' + "{" * 5000, "deep": [[]]})
    assert reading.parse_json(text, "x")["deep"] == [[]]
    assert reading.parse_json("[" * 200 + "]" * 200, "x") is not None


@pytest.mark.parametrize("make", ["missing", "folder", "fifo", "too large"])
def test_what_is_no_readable_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "a.json"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "too large":
        path.write_bytes(b"[]" + b" " * 100)
    complaint = {
        "missing": "no such file",
        "folder": "directory",
        "fifo": "regular",
        "too large": "more than 100",
    }
    with pytest.raises(UserError, match=complaint[make]):
        reading.read_json(path, limit=100)


def test_half_an_emoji_becomes_the_replacement_character():
    value = reading.parse_json(
        r'{"a": "x \ud83d", "b": ["\ud83d\ude00", "\ude00y"], "k\ud83d": 1}', "x"
    )
    assert value == {"a": "x \ufffd", "b": ["😀", "\ufffdy"], "k\ufffd": 1}
    assert clean_surrogates("a\ud83d\ud83d\ude00") == "a\ufffd😀"


def test_text_and_lines_without_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + "cat\r\nzwei\u2028Wörter\x85\n\ndog".encode())
    assert reading.read_lines(path) == ["cat", "zwei\u2028Wörter\x85", "", "dog"]
    path.write_bytes(b"cat\n\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 4"):
        reading.read_text(path)


def test_json_lines_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a"')
    rows = reading.read_json_lines(path)
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: not valid JSON"):
        next(rows)


def test_written_json_is_strict_and_readable(tmp_path):
    path = tmp_path / "new" / "a.json"
    writing.write_json(path, {"loss": float("nan"), "rows": [1, (2.5, float("-inf"))]})
    assert reading.read_json(path) == {"loss": "nan", "rows": [1, [2.5, "-inf"]]}
    count = writing.write_json_lines(path, ({"caption": text} for text in ("Bär", "x\ud83d")))
    assert (
        count == 2 and path.read_bytes() == '{"caption": "Bär"}\n{"caption": "x\ufffd"}\n'.encode()
    )


@pytest.mark.parametrize("where", ["body", "fsync", "replace"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, fault):
    path = tmp_path / "a.txt"
    writing.write_text(path, "old")

    def fail(*_):
        raise OSError(fault, os.strerror(fault))

    complaint = "the disk is full" if fault == errno.ENOSPC else "Permission denied"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=complaint) as error:
        if where != "body":
            patched.setattr(os, where, fail)
        with writing.atomic_write(path, remedy="free some space") as temporary:
            temporary.write_text("half")
            if where == "body":
                fail()
    assert str(path) in str(error.value) and str(error.value).endswith("free some space")
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_any_other_failure_is_cleaned_up_and_passed_on(tmp_path):
    with pytest.raises(ZeroDivisionError), writing.atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_not_taken_for_the_one_that_is_written(tmp_path):
    with (
        pytest.raises(UserError, match=r"lists/a\.json: No such file or directory; allow reading"),
        atomic_write(tmp_path / "cache/a.index") as temporary,
    ):
        temporary.write_bytes((tmp_path / "lists/a.json").read_bytes())


def test_a_file_in_the_way_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="not written"):
        writing.write_text(tmp_path / "out" / "a.txt", "x")


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_sync(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_rename(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    writing.write_bytes(tmp_path / "a", b"x")
    assert calls == ["file", "rename", "folder"]


KILLED = """
import os, signal, sys
from base import writing
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
writing.write_text(sys.argv[1], "half")
"""


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")])
    assert result.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    mine = tmp_path / f".b.{writing._this_host()}-{os.getppid()}.tmp"  # of a living process
    elsewhere, stale = tmp_path / ".b.another_host-1.tmp", tmp_path / ".c.another_host-1.tmp"
    for path in (mine, elsewhere, stale):
        path.write_text("being written")
    os.utime(stale, (0, time.time() - 2 * writing.STALE))
    writing.write_text(tmp_path / "other", "x")
    assert leftover.name.endswith(".tmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["other", mine.name, elsewhere.name]
    )


def test_a_digest_changes_with_each_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = caches.digest("kind", caches.file_state(path), b"\x00", 1)
    assert (
        before == caches.digest("kind", caches.file_state(path), b"\x00", 1) and len(before) == 20
    )
    assert before != caches.digest("kind", caches.file_state(path), b"\x01", 1)
    changed = path.stat()
    path.write_text("two")
    os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns))  # same size, same time of change
    assert before != caches.digest("kind", caches.file_state(path), b"\x00", 1)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path))
    assert caches.cache_folder() == tmp_path and caches.cache_folder("x").name == "x"
    monkeypatch.delenv("QUINTET_CACHE")
    assert caches.cache_folder().parts[-2:] == (".cache", "quintet")


def test_nearest_names():
    assert names.nearest("imagnet", ["imagenet", "mnist"]) == "imagenet"
    assert names.did_you_mean("imagnet", ["imagenet", "mnist"]) == "; did you mean imagenet?"
    assert names.did_you_mean("zzz", ["imagenet", "mnist"]) == ""


# ---- output folders
def unusable(root: Path) -> dict[str, tuple[Path, str]]:
    """Folders that nothing can be written to, and what is said about each."""
    (root / "file").write_text("in the way")
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to(root / "nowhere")
    for name in ("config.yaml", "log.jsonl", "result/metrics.json", "result/metrics.jsonl"):
        (root / f"with {name}" / name).mkdir(parents=True)
    (root / "with a file").mkdir()
    (root / "with a file/result").write_text("in the way")
    os.mkdir(root / "with fifo")
    os.mkfifo(root / "with fifo/log.jsonl")
    return {
        "a file": (root / "file", "is not a folder"),
        "below a file": (root / "file/run", "Not a directory"),
        "a FIFO": (root / "fifo", "is not a folder"),
        "a dangling link": (root / "link", "is not a folder"),
        "below a dangling link": (root / "link/run", "is not a folder"),
        "too long a name": (root / ("x" * 300), "name too long"),
        "a folder as config.yaml": (root / "with config.yaml", "config.yaml: not a regular file"),
        "a folder as log.jsonl": (root / "with log.jsonl", "log.jsonl: not a regular file"),
        "a folder as metrics.json": (
            root / "with result/metrics.json",
            "metrics.json: not a regular file",
        ),
        "a folder as metrics.jsonl": (
            root / "with result/metrics.jsonl",
            "metrics.jsonl: not a regular file",
        ),
        "a FIFO as log.jsonl": (root / "with fifo", "log.jsonl: not a regular file"),
        "a file as result": (root / "with a file", "result: not a folder"),
        "a URL": (Path("https://host/run"), "folders and buckets"),
    }


def test_unusable_output_folders_are_one_sentence(tmp_path):
    for case, (folder, said) in unusable(tmp_path).items():
        with pytest.raises(UserError) as error:
            check_output_folder(folder)
        message = str(error.value)
        assert said in message, (case, message)
        assert "--output_dir" in message and "\n" not in message


@pytest.mark.parametrize("make", [make_folder, lambda path, option: write_text(path / "a", "x")])
def test_results_are_not_written_into_a_folder_called_like_a_scheme(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3:/bucket.* this machine alone"):
        make(Path("s3://bucket/x"), "--target")
    with pytest.raises(UserError, match=r"s3:: results .*folders and buckets"):
        check_output_folder(Path("s3://"))  # without a bucket's name
    for name in ("$HOME/run", "/runs/${USER}", "$SCRATCH"):  # in a YAML file
        with pytest.raises(UserError, match=r"^[^ ]*\$[^ ]*: only a shell fills in its variables"):
            check_output_folder(tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "$mine").mkdir()
    check_output_folder(tmp_path / "$mine")
    (tmp_path / "file").touch()
    for name in ("file", "a\0b", "file/x", "a" * 300):
        with pytest.raises(UserError, match="name another --target"):
            make_folder(tmp_path / name, "--target")
    assert make_folder(tmp_path / "a/b", "--target").is_dir()


def refuse_in(places, monkeypatch):
    """Root may write anywhere, so that permissions hinder no test: the system refuses here."""
    make = os.mkdir

    def mkdir(path, *mode):
        if Path(path).parent in places:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *mode)

    monkeypatch.setattr(os, "mkdir", mkdir)


def test_folders_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "run/result").mkdir(parents=True)
    refuse_in([tmp_path, tmp_path / "run/result"], monkeypatch)
    for folder, place in (("new/run", tmp_path), ("run", tmp_path / "run/result")):
        with pytest.raises(UserError, match=f"nothing can be made in {place} .Permission denied"):
            check_output_folder(tmp_path / folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux alone has /proc")
def test_what_even_root_may_not_write_is_said_at_once():
    for folder in ("/proc/run", "/proc/new/run"):
        with pytest.raises(UserError, match=r"/proc .*name another folder as --output_dir"):
            check_output_folder(folder)


def test_usable_output_folders_are_left_as_they_are(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path, tmp_path / "link", tmp_path / "new/run", tmp_path / "link/new"):
        check_output_folder(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert not list((tmp_path / "elsewhere").iterdir())
