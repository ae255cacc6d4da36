"""The bar of a loop: drawn every second on a terminal, seldom in the log file of a job."""

import sys
from collections.abc import Iterable
from typing import Any

ON_TERMINAL, IN_FILE = 1.0, 30.0  # seconds between two drawings


def progress_bar(items: Iterable | None = None, **options: Any):
    """tqdm's bar over `items`, or one to `update`; options: tqdm's."""
    from tqdm import tqdm

    pause = ON_TERMINAL if sys.stderr.isatty() else IN_FILE
    pauses = {"mininterval": pause, "maxinterval": max(10.0, pause)}  # tqdm's default is 10
    return tqdm(items, dynamic_ncols=True, **pauses, **options)
