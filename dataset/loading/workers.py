"""Signals and threads of data loader worker processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEFT_TO_PARENT = (
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # signals that worker processes ignore


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
    """One thread per worker process, and signals of the scheduler or of Ctrl-C are left to the
    parent to act on.

    SIGTERM still ends the worker when it comes from the parent, as it does when the parent exits.
    """
    torch.set_num_threads(1)
    for number in LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    held = {signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set()  # not on macOS
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, *LEFT_TO_PARENT} - held)
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
