"""Runs a reader in a child process with limits on its memory and time, and reports what came of it."""

import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401 - here, so that its own memory is not the reader's


@dataclass(frozen=True)
class Outcome:
    """error: "" for a value, else the name of the exception's class; text: its message, or the
    value's repr; mib: growth of the peak of resident memory; seconds: of wall-clock time."""

    error: str
    text: str
    mib: float
    seconds: float


def read_bounded(
    read: Callable, *arguments: object, seconds: int = 60, gib: float = 2.0
) -> Outcome:
    """What `read(*arguments)` does in a forked child that may take `gib` more memory and `seconds`
    of processor time. AssertionError where the child is killed, as by a hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, read, arguments, seconds, gib))
    process.start()
    sender.close()
    try:
        data = receiver.recv_bytes()
    except EOFError:
        data = b""
    process.join()
    assert data, f"killed, exit status {process.exitcode}: it crashed or took {seconds} s"
    return Outcome(*pickle.loads(data))


def _child(sender, read, arguments, seconds: int, gib: float) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
    room = _kib("VmSize") * 1024 + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    before = _kib("VmRSS")
    started = time.monotonic()
    try:
        error, text = "", f"{read(*arguments)!r:.200}"
    except Exception as raised:
        error, text = type(raised).__name__, str(raised)[:2000]
    grown = (_kib("VmHWM") - before) / 1024
    sender.send_bytes(pickle.dumps((error, text, grown, time.monotonic() - started)))
    sender.close()


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
