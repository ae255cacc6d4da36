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
from collections.abc import Callable
from types import FrameType

import torch

from base.distributed import World, any_rank

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run is saved and wants to be started again
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

    def __init__(self, world: World, finish_write: Callable[[], None]):
        self.finish_write = finish_write
        self.received: int | None = None
        self.unsaved = False  # whether there are updates that no checkpoint holds
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)
        # at its end the interpreter gives them their defaults back: a second one would kill it
        atexit.register(_ignore_signals)
        if world.size > 1:
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            # a signal to a process forked from this one, such as a loader's worker, is none to it
            os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
            self.thread = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
            self.thread.start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        again = self.received is not None
        self.received = number
        what = "saving after this step" if self.unsaved else "nothing is left to save; leaving"
        os.write(2, f"{signal.Signals(number).name} received: {what}\n".encode())  # reentrant
        if not (self.unsaved or again):  # what runs on the way out is left alone
            self._leave(frame)

    def _leave(self, frame: FrameType | None) -> None:
        """End the process from a handler of signals, where that does harm a moment later."""
        if _must_not_be_cut(frame):
            signal.signal(signal.SIGALRM, self._leave_later)
            signal.setitimer(signal.ITIMER_REAL, MOMENT)
            return
        self.finish_write()
        sys.exit(EXIT_REQUEUE)

    def _leave_later(self, _number: int, frame: FrameType | None) -> None:
        if not self.unsaved:
            self._leave(frame)

    def _watch(self, read_end: int) -> None:
        """Does the same where the main thread cannot: on GPUs it waits without end in a collective
        for a process that has left. read_end: brings the number of every signal."""
        while number := os.read(read_end, 1):
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


def _must_not_be_cut(frame: FrameType | None) -> bool:
    """Whether an exception in this frame may abort the process, as amid PyTorch's fake tensors, or
    leave a loader that cannot end its workers."""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith(TRACER) or (file.endswith(LOADER) and name == "__init__"):
            return True
        frame = frame.f_back
    return False


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
