"""Signs of life: long work says from time to time what it does, and a watchdog looks at it.

Loops over the batches of a validation, metrics by blocks, and the writer of checkpoints call `beat`.
It costs less than a microsecond and does nothing by itself (see runtime/watchdog.py).
"""

import threading
import time
from dataclasses import dataclass


@dataclass
class Life:
    """What this process does, and since when."""

    beats: int = 0
    doing: str = ""
    since: float = 0.0  # time.monotonic() of the last beat


LIFE = Life()  # of the main thread, which trains and evaluates
BESIDE = Life()  # of a thread that writes beside it


def beat(doing: str) -> None:
    """This process gets on; doing: a phrase behind `the rank stalls`, as `in validation`."""
    life = LIFE if threading.current_thread() is threading.main_thread() else BESIDE
    life.beats += 1
    life.doing = doing
    life.since = time.monotonic()
