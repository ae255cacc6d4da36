"""Leaving in good order: SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit with a code that
asks for a requeue."""

import os
import signal
import sys

import torch

from base.distributed import any_rank

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run is saved and wants to be started again


class Interrupt:
    """Remembers a signal until the loop asks at a step boundary, so that a save never cuts through
    an update. After the training, when nothing is left to save, a signal ends the process at once.

    A second Ctrl-C does so always.
    """

    def __init__(self):
        self.received: int | None = None
        self.training = True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        again = self.received is not None
        self.received = number
        what = "saving after this step" if self.training else "the training is saved; leaving"
        os.write(2, f"{signal.Signals(number).name} received: {what}\n".encode())  # reentrant
        if not (self.training or again):  # what runs on the way out is left alone
            sys.exit(EXIT_REQUEUE)

    def training_is_saved(self) -> None:
        """What follows, such as a final test, may be cut short: a requeued run repeats it."""
        self.training = False

    def pending(self, device: torch.device) -> bool:
        """True on every process as soon as any process was signalled. A collective: all must ask at
        the same step."""
        return any_rank(self.received is not None, device)
