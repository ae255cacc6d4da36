"""Crash a training script at every file operation, start it again, and compare with the run that
was not disturbed.

    python -m tests.helpers.crash_points VE 1 OUTPUT_DIR --config … --output_dir OUTPUT_DIR

runs VE.py to its end and keeps OUTPUT_DIR as it is on the disk at every (second argument: n-th)
point at which something in it is about to change: what a run that is killed there leaves. From each
of these the script is started again; points between which nothing changed on the disk count as one.
Prints JSON: how many points there are and were tried, and at which ones the folder ended different.
Every run is a fork of this process, which has imported all and computed nothing.

    python -m tests.helpers.crash_points beside 1 OUTPUT_DIR

does the same with the small run of tests/unit/test_run.py, whose sharded checkpoints are written by a
thread beside the training. No copy is made there, for the training continues meanwhile: the run is
killed at each point of that thread, wherever the training is by then.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # these three are imported once, not in every fork
import torch.distributed.checkpoint.state_dict
import torch.utils.data
import torchvision  # noqa: F401

from runtime.checkpoint import find_damage
from runtime.config.cli import parse
from runtime.log import RunLog
from tests.helpers.processes import in_fork
from tests.helpers.runs import without_timing

KILLED = 137
CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"}
CHANGES |= {"shutil.rmtree"}


class Points:
    """Counts the changes in a folder that are about to be made, and calls `at(number)` before each.
    beside: only those of other threads than the main one, and those that name the best checkpoint,
    which the main one does."""

    def __init__(self, folder: Path, at: Callable[[int], None], beside: bool = False):
        self.folder, self.at, self.count = str(folder), at, 0
        self.beside = beside
        self.made: list[str] = []
        self.fsync = os.fsync

    def watch(self) -> None:
        """From here on; audit hooks and patches stay until the process ends."""
        sys.addaudithook(self.audited)
        os.fsync = self.synced
        write = RunLog.write

        def logged(log: RunLog, *args, **values) -> None:
            self.passed("log")
            write(log, *args, **values)
            self.passed("logged")

        RunLog.write = logged

    def audited(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            second = event in ("os.rename", "os.link", "os.symlink")
            path = arguments[1] if second else arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not self.inside(os.fspath(path)):
            return
        if (event == "os.mkdir") == os.path.lexists(path) and event in ("os.mkdir", "os.remove"):
            return  # nothing to do
        self.passed(f"{event} {os.path.basename(path)}")

    def synced(self, descriptor: int) -> None:
        if self.inside(os.readlink(f"/proc/self/fd/{descriptor}")):
            self.passed("fsync")
        self.fsync(descriptor)

    def inside(self, path: str) -> bool:
        return path == self.folder or path.startswith(self.folder + os.sep)

    def passed(self, name: str) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if self.beside and in_main and "checkpoint_best" not in name:
            return
        self.at(self.count)
        self.count += 1
        self.made.append(name)


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds, by name: a digest, of the log without what depends on the clock; of the
    page about the log that it is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        if not path.is_file() or path.is_symlink() or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "index.html":
            data = b""
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps(without_timing(lines)).encode()
        if path.suffix == ".pt" and find_damage(path) is None:
            # its values: equal strings may be pickled as one or as two
            content = torch.load(path, weights_only=True)
            content.pop("files", None)  # hashes of such files
            data = plain(content).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def plain(tree: Any) -> str:
    """Text that changes with any value in a checkpoint, to the last bit."""
    if isinstance(tree, torch.Tensor):
        if tree.is_meta:
            return f"{tree.dtype} {list(tree.shape)}"
        values = tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tree.dtype} {list(tree.shape)} {hashlib.sha256(values).hexdigest()}"
    if isinstance(tree, dict):
        return str({name: plain(value) for name, value in tree.items()})
    if isinstance(tree, list | tuple):
        return str([plain(value) for value in tree])
    return repr(tree)


def copy(folder: Path, target: Path) -> None:
    """A folder as it is on the disk: times, links and files with several names, too. There may be
    none yet."""
    names: dict[int, str] = {}

    def copy_file(source: str, destination: str) -> None:
        number = os.lstat(source).st_ino
        if number in names:
            os.link(names[number], destination, follow_symlinks=False)
        else:
            shutil.copy2(source, destination, follow_symlinks=False)
        names[number] = destination

    shutil.rmtree(target, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, target, symlinks=True, copy_function=copy_file)


def state(folder: Path) -> list[tuple]:
    """All that a copy keeps."""
    found, numbers = [], {}
    for path in sorted([folder, *folder.rglob("*")]) if folder.exists() else []:
        about = path.lstat()
        number = numbers.setdefault(about.st_ino, len(numbers))
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        target = os.readlink(path) if path.is_symlink() else ""
        mode, time = about.st_mode, about.st_mtime_ns
        name = str(path.relative_to(folder))
        found.append((name, mode, time, number, target, hashlib.sha256(data).hexdigest()))
    return found


class Runs:
    """Forks that do `main`, which writes to `folder`."""

    def __init__(self, main: Callable[[], Any], folder: Path, beside: bool):
        self.main, self.folder, self.beside = main, folder, beside
        self.output, self.points = folder.with_suffix(".txt"), folder.with_suffix(".json")

    def to_the_end(self, at: Callable[[int], None]) -> int:
        """Exit status; `at` is called at every point, whose names are stored."""

        def work() -> None:
            torch.set_num_threads(1)
            watched = Points(self.folder, at, self.beside)
            watched.watch()
            self.main()
            self.points.write_text(json.dumps(watched.made))

        return in_fork(work, self.output)

    def leave_killed(self, number: int) -> int:
        """What a run that is killed at a point leaves; the exit status."""

        def kill(reached: int) -> None:
            if reached == number:
                os._exit(KILLED)

        shutil.rmtree(self.folder)
        return self.to_the_end(kill)

    def copy_of(self, number: int) -> Path:
        # not beside the run, whose page would read and compare all of them
        return self.folder.parent / "killed" / str(number)


def crash_everywhere(
    main: Callable[[], Any], every: int, folder: Path, beside: bool = False
) -> dict:
    """See above; main: the run that writes to `folder`."""
    runs = Runs(main, folder, beside)

    def keep(number: int) -> None:
        if not beside and number % every == 0:
            # others might write meanwhile
            assert threading.current_thread() is threading.main_thread()
            copy(folder, runs.copy_of(number))

    shutil.rmtree(folder, ignore_errors=True)
    assert runs.to_the_end(keep) == 0, runs.output.read_text()[-2000:]
    made, expected = json.loads(runs.points.read_text()), contents(folder)
    failures, tried, left = [], range(0, len(made), every), None
    for number in tried:
        what, status = "", KILLED
        if beside:
            status = runs.leave_killed(number)
        else:
            before, left = left, state(runs.copy_of(number))
            if left == before:
                continue  # the crash before left the same
            copy(runs.copy_of(number), folder)
        if status != KILLED:
            what = f"not killed: status {status}"
        elif (status := runs.to_the_end(ignore)) != 0:
            what = f"status {status}: {runs.output.read_text()[-500:]}"
        elif (found := contents(folder)) != expected:
            different = sorted({name for name, _ in expected.items() ^ found.items()})
            what = f"different: {different}"
        if what:
            failures.append({"point": number, "before": made[number], "what": what})
    return {"points": len(made), "tried": len(tried), "names": made, "failures": failures}


def ignore(number: int) -> None:
    """A point that is passed."""


def run_of(script: str, folder: Path, flags: list[str]) -> Callable[[], Any]:
    """What a script does with these flags; `beside`: the small run."""
    if script == "beside":
        from tests.unit import test_run

        test_run.KIND[0] = "sharded"
        return lambda: test_run.train(test_run.options(folder), scores=[1, 3, 2, 0])
    module = importlib.import_module(script)
    config = parse(module.Config, flags)
    return lambda: module.main(config)


if __name__ == "__main__":
    script, every, name, *flags = sys.argv[1:]
    folder = Path(name)
    main = run_of(script, folder, flags)
    print(json.dumps(crash_everywhere(main, int(every), folder, script == "beside")))
