"""Functions and scripts on processes of their own, which do not import PyTorch each time.

A server imports the libraries and scripts once; every process is a fork of it, so that it starts at
once and yet fresh: without threads, without what other tests left.

    spawn(function, 2, *args)              # function(rank, *args) on two ranks that are joined
    output = run_script("main.py", flags, 2)  # the script on two ranks, as torchrun would start it
    run = Run("main.py", flags)                # … and something happens while it runs
"""

import atexit
import functools
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from base import distributed

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds for a script
GRACE = 10  # seconds for the other ranks after one has failed


@functools.cache
def fresh_processes():
    """The multiprocessing context whose processes are forks of the server."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    surroundings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, surroundings):
        forkserver.ensure_running()
    return context


def spawn(function, world_size: int, *args) -> None:
    """`function(rank, *args)` on `world_size` processes joined over gloo; raises where one of them
    raises."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        start_processes(_joined, (world_size, store, function, args), world_size)


def start_processes(function, args: tuple, count: int) -> None:
    """`function(rank, *args)` on `count` processes that join by themselves, if at all."""
    fresh_processes()
    given = pickle.dumps((dict(os.environ), function, args))  # torch would send tensors as files
    mp.start_processes(_alone, (given,), nprocs=count, start_method="forkserver")


def _alone(rank: int, given: bytes) -> None:
    environment, function, args = pickle.loads(given)
    as_new_process(environment)
    function(rank, *args)


def as_new_process(environment: dict) -> None:
    """Forget what the server was started with: the environment, and its way to start processes."""
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    tempfile.tempdir = None  # found by the server under its own TMPDIR
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)


def _joined(rank: int, world_size: int, store: str, function, args: tuple) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()  # nobody hangs up while another still talks
    finally:
        distributed.shutdown()
    os._exit(0)  # on the interpreter's own way out gloo's threads now and then abort it


class Run:
    """A script under way on one process or several; like subprocess.Popen as far as tests need."""

    def __init__(self, script: str, flags: list, processes: int = 1):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        words = [str(ROOT / script), *map(str, flags)]
        port = str(free_port())
        self.ranks = []
        for rank in range(processes):
            variables = dict(os.environ)
            if processes > 1:
                variables.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                variables.update(MASTER_ADDR="localhost", MASTER_PORT=port)
            given = (words, variables, self.files)
            self.ranks.append(fresh_processes().Process(target=_run_script, args=given))
        for file in self.files:
            file.touch()
        for process in self.ranks:
            process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, that of the first rank that failed; None while one still runs."""
        statuses = [process.exitcode for process in self.ranks]
        failed = [status for status in statuses if status]
        return failed[0] if failed else None if None in statuses else 0

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Until all ranks ended; where one fails, the others are ended, as torchrun does."""
        deadline = time.monotonic() + timeout
        while alive := [process for process in self.ranks if process.is_alive()]:
            remaining = max(0.0, deadline - time.monotonic())
            ended = connection.wait([process.sentinel for process in alive], timeout=remaining)
            if not ended:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.files[0]), timeout, self.said())
            if self.returncode:
                for process in alive:
                    process.join(GRACE)
                self.send_signal(signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, None]:
        self.wait(timeout)
        return self.said(), None

    @property
    def stdout(self) -> str:
        """What all ranks wrote to it so far."""
        return self.files[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What all ranks wrote to it so far."""
        return self.files[1].read_text(errors="replace")

    def said(self) -> str:
        return self.stdout + self.stderr


def run_script(script: str, flags: list, processes: int = 1, expect: int = 0) -> str:
    """Run a script of the repository's root to the end; the output, after checking the exit
    status."""
    run = Run(script, flags, processes)
    status = run.wait()
    assert status == expect, f"exit status {status}\n{run.said()[-3000:]}"
    return run.said()


def run_command(command: list, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """In place of `subprocess.run` where a test is about what `python SCRIPT FLAGS` makes, not about
    its start, which takes seconds."""
    python, script, *flags = map(str, command)
    assert python == sys.executable
    with mock.patch.dict(os.environ, env or {}, clear=env is not None):
        run = Run(script, flags)
    return subprocess.CompletedProcess(command, run.wait(), run.stdout, run.stderr)


def _run_script(argv: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """In the new process: what `python SCRIPT FLAGS` does."""
    as_new_process(environment)
    os.chdir(ROOT)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = argv
    try:
        with mock.patch.object(DataLoader, "__iter__", _hand_over):
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _hand_over(loader: DataLoader, iterate: Callable = DataLoader.__iter__):
    """Workers that are not forked, as on macOS and from Python 3.14 on, are sent all that they need:
    in every run of a script it must pickle, whatever starts its workers here."""
    pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    return iterate(loader)


def in_fork(work: Callable[[], None], output: Path) -> int:
    """Exit status of a fork that does `work`; what it prints goes to the file `output`."""
    child = os.fork()
    if child == 0:
        status = 1
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waits for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
