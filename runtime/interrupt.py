"""Leaving in good order: SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit with a code that
asks for a requeue."""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

from base.distributed import ALONE, World, any_rank

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run is saved and wants to be started again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MOMENT = 0.01  # seconds
TRACER = os.path.join("torch", "_subclasses", "fake_tensor.py")
LOADER = os.path.join("torch", "utils", "data", "dataloader.py")
PATIENCE = 10.0  # seconds for the main thread to notice a signal, unless it waits in a collective


class Interrupt:
    """Remembers a signal until the loop asks at a step boundary, so that a save never cuts through
    an update. Where nothing is left to save, before the first update, in a validation and after the
    training, a signal ends the process at once; a write under way is finished.

    A second Ctrl-C does so always. finish_write: waits for a write beside the training.
    """

    def __init__(
        self, world: World, finish_write: Callable[[], None], signals: Sequence[int] = SIGNALS
    ):
        self.finish_write = finish_write
        self.received: int | None = None
        self.unsaved = False  # whether there are updates that no checkpoint holds
        self.thread: threading.Thread | None = None
        self.blocked_before: set[int] | None = None  # None = children are not spared
        for number in signals:
            signal.signal(number, self._remember)
        # at its end the interpreter gives them their defaults back: a second one would kill it
        atexit.register(_ignore_signals)
        if world.size > 1:
            self._start_thread()

    def _start_thread(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # a signal to a process forked from this one, such as a loader's worker, is none to it
        os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
        self.thread = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        self.thread.start()

    def spare_children(self) -> None:
        """Hide signals from the compilers that torch.compile starts from here on. A scheduler sends
        them to all processes of a step, a terminal to all of its group; a compiler that one of them
        ends would end the run in the midst of an update.

        Children inherit what their parent's thread blocks. The thread that watches blocks nothing:
        it takes the signals, and wakes the main one.
        """
        if self.thread is None:
            self._start_thread()
        signal.signal(signal.SIGURG, _wake)
        self.blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        from torch._inductor import async_compile  # before the next line: what came last ends first

        atexit.register(_end_compilers, async_compile)

    def spare_no_more(self) -> None:
        """Signals reach this thread and its children again."""
        if self.blocked_before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked_before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        again = self.received is not None
        self.received = number
        what = "saving after this step" if self.unsaved else "nothing is left to save; leaving"
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{signal.Signals(number).name} received: {what}\n".encode())  # reentrant
        if not (self.unsaved or again):  # what runs on the way out is left alone
            self._leave(frame)

    def _leave(self, frame: FrameType | None) -> None:
        """End the process from a handler of signals, where that does harm a moment later."""
        if _must_not_be_cut(frame):
            self._try_again()
            return
        self.finish_write()
        sys.unraisablehook = functools.partial(self._not_left, sys.unraisablehook)
        sys.exit(EXIT_REQUEUE)

    def _not_left(self, otherwise: Callable, lost: "sys.UnraisableHookArgs") -> None:
        """The signal came in what C code calls, such as a callback of the garbage collection, out of
        which no exception gets."""
        if lost.exc_type is SystemExit:
            self._try_again()
        else:
            otherwise(lost)

    def _try_again(self) -> None:
        signal.signal(signal.SIGALRM, self._leave_later)
        signal.setitimer(signal.ITIMER_REAL, MOMENT)

    def _leave_later(self, _number: int, frame: FrameType | None) -> None:
        if not self.unsaved:
            self._leave(frame)

    def _watch(self, read_end: int) -> None:
        """Does the same where the main thread cannot: on GPUs it waits without end in a collective
        for a process that has left. read_end: brings the number of every signal."""
        while number := os.read(read_end, 1):
            if number[0] in SIGNALS:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGURG)
            if number[0] not in (signal.SIGTERM, signal.SIGUSR1):
                continue
            time.sleep(PATIENCE)
            if self.received is None and not self.unsaved:
                with contextlib.suppress(Exception):  # the write has failed: there is an older one
                    self.finish_write()
                os._exit(EXIT_REQUEUE)

    def pending(self, device: torch.device) -> bool:
        """True on every process as soon as any process was signalled. A collective: all must ask at
        the same step."""
        return any_rank(self.received is not None, device)


def leave_when_signalled() -> None:
    """Where a script has nothing to save, not yet or never: a scheduler's signal ends it with the
    code that asks for a requeue. A run takes over when it opens; until then Ctrl-C is Python's."""
    Interrupt(ALONE, lambda: None, signals=(signal.SIGTERM, signal.SIGUSR1))


def _must_not_be_cut(frame: FrameType | None) -> bool:
    """Whether an exception in this frame may abort the process, as amid PyTorch's fake tensors, or
    leave a loader that cannot end its workers."""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith(TRACER) or (file.endswith(LOADER) and name == "__init__"):
            return True
        frame = frame.f_back
    return False


def _wake(_number: int, _frame: FrameType | None) -> None:
    """What the main thread waits for is interrupted, and the handlers of other signals run."""


def _end_compilers(async_compile) -> None:
    """torch would ask them by SIGTERM, which is hidden from them, and wait for ten seconds."""
    for pool in getattr(async_compile, "_pool_set", ()):
        server = pool.process.pid if hasattr(pool, "process") else None
        with contextlib.suppress(OSError):  # has ended; or no Linux
            for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
