"""Processes that check at once, and what they report."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, since CUDA does not survive a fork. What has not begun when the
    block ends is not begun."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_share_cores, initargs=(count,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _share_cores(count: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
