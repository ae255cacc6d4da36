"""Leaving in good order: SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit with a code that
asks for a requeue."""

import os
import signal

import torch

from base.distributed import any_rank

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run is saved and wants to be started again


class Interrupt:
    """Remembers a signal until the loop asks at a step boundary, so that a save never cuts through
    an update.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        os.write(
            2, f"{signal.Signals(number).name} received: saving after this step\n".encode()
        )  # reentrant

    def pending(self, device: torch.device) -> bool:
        """True on every process as soon as any process was signalled. A collective: all must ask at
        the same step."""
        return any_rank(self.received is not None, device)
