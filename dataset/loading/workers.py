"""Signals and threads of data loader worker processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Signals that worker processes ignore.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.25  # between two looks whether the parent is alive


@contextmanager
def signals_held() -> Iterator[None]:
    """Keeps the scheduler's signals and Ctrl-C waiting: processes started in here inherit that
    until `worker_init`.

    Without it a signal to the whole job that comes while workers start would kill them, and the run
    with them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *LEFT_TO_PARENT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_init(_: int) -> None:
    """One thread per worker process; signals of the scheduler or of Ctrl-C are left to the parent.

    SIGTERM still ends the worker when it comes from the parent, as it does when the parent exits. A
    worker whose parent is gone, killed without a last word, ends within POLL_SECONDS.
    """
    torch.set_num_threads(1)
    for number in LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    held = {signal.SIGTERM} if hasattr(signal, "sigtimedwait") else set()  # not on macOS
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, *LEFT_TO_PARENT} - held)
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when `parent` says so by SIGTERM, or is gone.

    A process forked from a server of multiprocessing has the server for its system parent, which
    outlives the one that asked for the process; then only `parent.is_alive` tells.
    """
    system_parent = os.getppid()
    forked_from_it = system_parent == parent.pid
    while os.getppid() == system_parent and (forked_from_it or parent.is_alive()):
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(POLL_SECONDS)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
