"""Processes on this machine that share a list of work. Imports no torch."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from base.errors import UserError

# set for a script of ours that another one starts: it ends with that one, and leaves the sentence that
# it fails with in this file instead of on stderr
SENTENCE_FILE = "QUINTET_SENTENCE_FILE"
Item = TypeVar("Item")
Result = TypeVar("Result")


def linux_bytes(file: str, field: str) -> int:
    """A field of a file of /proc that has kB, such as Rss of /proc/self/smaps_rollup."""
    fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far; getrusage begins at the launching process's."""
    return linux_bytes("/proc/self/status", "VmHWM")


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _start() -> None:
    """The scheduler's signals go to all processes of a task; the first of them decides."""
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent.pid != os.getppid():  # a server of multiprocessing, the default since Python 3.14
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    """Kill this process when `parent` has ended: the server that forked it waits for it."""
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> Iterator[Result]:
    """`work(item)` of every item in order; no process outlives this one.

    UserError where a process was killed.
    """
    if processes == 1 or len(items) < 2:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(min(processes, len(items)), initializer=_start) as pool:
        # the server that Python 3.14 starts here inherits what is blocked: SIGUSR1 would end it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            results = pool.map(work, items)  # starts the processes
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield from results
        except BrokenProcessPool:
            raise UserError(
                "a process was killed, most often because memory ran out; what is finished is "
                "kept: start the same command again, with fewer --workers"
            ) from None


def usable_cores() -> int:
    """CPU cores that this process may use: those that Slurm gave to it, else those it may run on."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdecimal():
        return int(given)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
