"""Work beside the training: one task at a time in a thread, and agreement of all processes on how it
ended, without a collective."""

import json
import threading
import time
from collections.abc import Callable

from base import distributed
from base.distributed import World
from base.errors import UserError
from base.heartbeat import BESIDE, beat

GRACE = 60.0  # seconds that a process which has ended otherwise waits for the others' parts
JOIN_SECONDS = 1.0  # between two looks at a write that training waits for
SHORT_WAIT, LONG_WAIT = 0.01, 0.5  # seconds between two questions to the store


class Background:
    """One task at a time. What it fails with is kept for the thread that started it."""

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with a task, after the one before."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by `wait`
            self.error = error

    @property
    def failure(self) -> str | None:
        """What the last task failed with, in one line; None where it did not, or is under way."""
        return None if self.error is None else str(self.error) or repr(self.error)

    def wait(self) -> None:
        """Until the task is done; raises what it failed with."""
        seen = BESIDE.beats
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(JOIN_SECONDS)
            if BESIDE.beats != seen:  # to the watchdog, a write that gets on is no stall
                seen = BESIDE.beats
                beat("saving a checkpoint")
        self.thread = None
        if self.error is not None:
            raise self.error


def together(
    world: World, number: int, part: Callable[[], str], finish: Callable[[list[str]], None]
) -> None:
    """`part()` on every process, then `finish(their answers)` on rank 0. Returns when that is done.

    Where anything failed, every process raises a UserError that says what. number: counts the calls,
    alike on all processes. They talk through the launcher's store alone, so this may run in a thread
    while the training thread is in its own collectives.
    """
    if world.size == 1:
        finish([part()])
        return
    store = distributed.store(f"together_{number}")
    answer, failure = _attempt(part)
    store.set(f"rank_{world.rank}", json.dumps([answer, failure]))
    if world.is_main:
        found = [json.loads(_when_there(store, f"rank_{rank}")) for rank in range(world.size)]
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text]
        if not failures:
            _, failure = _attempt(lambda: finish([answer for answer, _ in found]))
            failures = [failure] if failure else []
        store.set("end", json.dumps(failures))
    failures = json.loads(_when_there(store, "end"))
    if failures:
        raise UserError(failures[0])


def _attempt(work: Callable) -> tuple:
    """(result, None) of `work()`, or (None, what it failed with)."""
    try:
        return work(), None
    except Exception as error:  # goes to all processes
        return None, str(error) or repr(error)


def _when_there(store, key: str) -> bytes:
    """A value of the store, asked for so that other threads can use the store meanwhile."""
    pause = SHORT_WAIT
    ended = None
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, LONG_WAIT)
        if not threading.main_thread().is_alive():  # the training has failed
            ended = ended or time.monotonic()
            if time.monotonic() - ended > GRACE:
                raise UserError(f"no answer of another process ({key})")
    return store.get(key)
