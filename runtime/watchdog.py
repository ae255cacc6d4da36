"""Ends a run on several processes in which one of them stalls, and says which one."""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from base import distributed
from base.distributed import World
from base.flight_recorder import last_collective, write_record
from base.heartbeat import LIFE, beat

EXIT_STALLED = 70  # EX_SOFTWARE of sysexits.h
COMPILATION = 3600.0  # seconds that torch.compile may take for one graph
ANSWER_SECONDS = 10.0  # in which the other ranks must say where they are
TORCH = os.path.dirname(torch.__file__) + os.sep


class Watchdog:
    """A thread that notices when no process has shown a sign of life for `minutes`.

    Signs are every step of the training loop, every batch of a validation and every block of a
    checkpoint (base/heartbeat.py). A collective holds up every process where one stalls, so all of
    them notice; while one validates or saves and the others wait for it, they see it beat in the
    launcher's store. Then each leaves there where it is and its last collective, and writes torch's
    flight record below `folder`; the first that has all answers prints one line, and all end with
    EXIT_STALLED. Watching begins with the first finished update; a compilation after it, for
    batches of another shape, counts as a sign of life for an hour. minutes: 0 = never. On a single
    process it does nothing.
    """

    def __init__(self, world: World, minutes: float, folder: str | Path):
        self.world = world
        self.seconds = 60 * minutes
        self.folder = folder
        self.enabled = world.size > 1 and minutes > 0 and dist.is_initialized()
        self.thread: threading.Thread | None = None
        self.main_thread = threading.get_ident()
        self.ended = threading.Event()
        self.watching = False
        self.step = 0  # updates finished
        self.marks = 0  # counts `mark`: the rank that stalls has made the fewest
        self.reported = -1  # beats of this process that are in the store
        self.heard = b""  # beats of all processes, as last read there ...
        self.heard_at = 0.0  # ... and when they were last seen to change

    def mark(self, doing: str) -> None:
        """The training loop continues with `doing`."""
        beat(doing)
        self.marks += 1
        self.watching = self.thread is not None

    def update(self, step: int) -> None:
        """Update `step` is finished. The first one starts the thread."""
        self.step = step
        if self.enabled and self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.mark("between two updates")

    def pause(self) -> None:
        """Until the next mark anything may take its time, as a compilation may."""
        self.watching = False

    def stop(self) -> None:
        """The loop has ended."""
        self.ended.set()

    def _watch(self) -> None:
        store = distributed.store("watchdog")
        began = 0.0  # the compilation under way; 0 = none
        while not self.ended.wait(min(5.0, self.seconds / 10)):
            began = (began or time.monotonic()) if compiling() else 0.0
            if began and time.monotonic() - began < COMPILATION:
                LIFE.beats += 1
                LIFE.since = time.monotonic()
            try:
                stalled = self._stalled(store)
            except RuntimeError:  # the store has gone, with the rank that keeps it
                stalled = time.monotonic() - LIFE.since > self.seconds
            if stalled and self.watching:
                try:
                    self._report(store)
                finally:
                    os._exit(EXIT_STALLED)  # the main thread waits in a collective without end

    def _stalled(self, store) -> bool:
        """Whether this process has stood still for the time, and every other for half of it."""
        if LIFE.beats != self.reported:
            self.reported = LIFE.beats
            store.set(f"beats {self.world.rank}", str(self.reported))
        still = time.monotonic() - LIFE.since
        if still < self.seconds / 2:
            return False
        names = [f"beats {rank}" for rank in range(self.world.size)]
        heard = b" ".join(store.get(name) for name in names if store.check([name]))
        if heard != self.heard:
            self.heard = heard
            self.heard_at = time.monotonic()
        return still > self.seconds and time.monotonic() - self.heard_at > self.seconds / 2

    def _report(self, store) -> None:
        """Tell the others where this rank is; print what all tell, unless another rank has."""
        file, line = self._place()
        own = {"marks": self.marks, "beats": LIFE.beats, "step": self.step, "doing": LIFE.doing}
        own |= {"place": f"{os.path.basename(file)}:{line}", "waits": file.startswith(TORCH)}
        collective = last_collective()
        own |= {"collective": str(collective), "entered": collective.number}
        own["inside"] = collective.waits
        store.set(str(self.world.rank), json.dumps(own))
        deadline = time.monotonic() + ANSWER_SECONDS
        answers = {}
        while len(answers) < self.world.size and time.monotonic() < deadline:
            time.sleep(0.2)
            for rank in set(range(self.world.size)) - answers.keys():
                if store.check([str(rank)]):
                    answers[rank] = json.loads(store.get(str(rank)))
        if store.add("said", 1) == 1:
            print(
                stall_message(answers, self.world.size, self.seconds), file=sys.stderr, flush=True
            )
        write_record(self.folder, self.world.rank)
        time.sleep(1.0)  # nobody takes the store away while another still asks

    def _place(self) -> tuple[str, int]:
        """File and line that the main thread is in."""
        frame = sys._current_frames()[self.main_thread]
        summary = traceback.extract_stack(frame)[-1]
        return summary.filename, summary.lineno or 0


def compiling() -> bool:
    """Whether torch.compile is at work in this process, in the forward pass or, in autograd's
    thread, the backward pass."""
    for frame in sys._current_frames().values():
        for inner, _ in traceback.walk_stack(frame):
            file, name = inner.f_code.co_filename, inner.f_code.co_name
            # generated code runs inside of compile_fx.py, too, in functions of other names
            if file.endswith("_dynamo/convert_frame.py") or (
                file.endswith("_inductor/compile_fx.py") and "compile" in name
            ):
                return True
    return False


def stall_message(answers: dict[int, dict], size: int, seconds: float) -> str:
    """One line that names the ranks that stall, with their last update, where they are and their
    last collective, and the collectives that the others wait in.

    They do not answer at all, or are behind the others in the loop, or have entered the fewest
    collectives, or are the ones that do not wait inside of torch; in a validation those behind in its
    batches.
    """
    stalled = [rank for rank in range(size) if rank not in answers] or _behind(answers)
    causes = []
    for rank in sorted(stalled):
        if rank in answers:
            about = answers[rank]
            causes.append(
                f"rank {rank} stalls {about['doing']} (last update {about['step']:,}, at "
                f"{about['place']}, {'in' if about['inside'] else 'after'} {about['collective']})"
            )
        else:
            causes.append(f"rank {rank} does not answer")
    last = max(answer["step"] for answer in answers.values())
    others = [answer for rank, answer in answers.items() if rank not in stalled]
    waiting = sorted({answer["collective"] for answer in others if answer["inside"]})
    if waiting:
        causes.append(f"the others wait in {', '.join(waiting)}")
    return (
        f"error: no progress for {seconds / 60:g} minutes (--stall_minutes) after update {last:,}: "
        f"{'; '.join(causes)}. Start the same command again to resume"
    )


def _behind(answers: dict[int, dict]) -> list[int]:
    """The ranks that hold up the others; all where nothing tells them apart."""
    for name in ("marks", "entered"):
        least = min(answer[name] for answer in answers.values())
        behind = [rank for rank, answer in answers.items() if answer[name] == least]
        if len(behind) < len(answers):
            return behind
    busy = [rank for rank, answer in answers.items() if not answer["waits"]]
    return busy or _behind_in_validation(answers)


def _behind_in_validation(answers: dict[int, dict]) -> list[int]:
    """The ranks with the fewest batches of a validation; all where they do something else."""
    if not all(answer["doing"].startswith("in validation") for answer in answers.values()):
        return list(answers)
    fewest = min(answer["beats"] for answer in answers.values())
    return [rank for rank, answer in answers.items() if answer["beats"] == fewest]
