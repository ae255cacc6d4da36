"""Ends a run on several processes in which one of them stalls, and says which one."""

import json
import os
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from base.distributed import World

EXIT_STALLED = 70  # EX_SOFTWARE of sysexits.h
ANSWER_SECONDS = 10.0  # in which the other ranks must say where they are
TORCH = os.path.dirname(torch.__file__) + os.sep


class Watchdog:
    """A thread that notices when this process has finished no update for `minutes`.

    A collective holds up every process where one stalls, so all of them notice. Each leaves in the
    launcher's store where it is; the first that has all answers prints one line, then all end with
    EXIT_STALLED. Watching begins with the first finished update, for the first may compile, and
    pauses during validations and saves, which only the limit of the process group bounds. minutes:
    0 = never. On a single process it does nothing.
    """

    def __init__(self, world: World, minutes: float):
        self.world, self.seconds = world, 60 * minutes
        self.enabled = world.size > 1 and minutes > 0 and dist.is_initialized()
        self.thread: threading.Thread | None = None
        self.main_thread = threading.get_ident()
        self.ended = threading.Event()
        self.watching = False
        self.step = 0  # updates finished
        self.marks = 0  # counts `mark`: the rank that stalls has made the fewest
        self.doing = ""
        self.since = 0.0  # time of the last mark

    def mark(self, doing: str) -> None:
        """The training loop continues with `doing`."""
        self.marks += 1
        self.doing, self.since, self.watching = doing, time.monotonic(), self.thread is not None

    def update(self, step: int) -> None:
        """Update `step` is finished. The first one starts the thread."""
        self.step = step
        if self.enabled and self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.mark("between two updates")

    def pause(self) -> None:
        """Until the next mark anything may take its time."""
        self.watching = False

    def stop(self) -> None:
        """The loop has ended."""
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(min(5.0, self.seconds / 10)):
            if self.watching and time.monotonic() - self.since > self.seconds:
                try:
                    self._report()
                finally:
                    os._exit(EXIT_STALLED)  # the main thread waits in a collective without end

    def _report(self) -> None:
        """Tell the others where this rank is; print what all tell, unless another rank has."""
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        file, line = self._place()
        own = {"marks": self.marks, "step": self.step, "doing": self.doing}
        own |= {"place": f"{os.path.basename(file)}:{line}", "waits": file.startswith(TORCH)}
        store.set(str(self.world.rank), json.dumps(own))
        deadline, answers = time.monotonic() + ANSWER_SECONDS, {}
        while len(answers) < self.world.size and time.monotonic() < deadline:
            time.sleep(0.2)
            for rank in set(range(self.world.size)) - answers.keys():
                if store.check([str(rank)]):
                    answers[rank] = json.loads(store.get(str(rank)))
        if store.add("said", 1) == 1:
            print(
                stall_message(answers, self.world.size, self.seconds), file=sys.stderr, flush=True
            )
        time.sleep(1.0)  # nobody takes the store away while another still asks

    def _place(self) -> tuple[str, int]:
        """File and line that the main thread is in."""
        frame = sys._current_frames()[self.main_thread]
        summary = traceback.extract_stack(frame)[-1]
        return summary.filename, summary.lineno or 0


def stall_message(answers: dict[int, dict], size: int, seconds: float) -> str:
    """One line that names the ranks that stall, with their last update and where they are.

    They do not answer at all, or are behind the others, or are the ones that do not wait inside of
    torch.
    """
    behind = min(answer["marks"] for answer in answers.values())
    stalled = [rank for rank in range(size) if rank not in answers]
    if not stalled:
        stalled = [rank for rank, answer in answers.items() if answer["marks"] == behind]
        busy = [rank for rank in stalled if not answers[rank]["waits"]]
        stalled = busy if len(stalled) == size and busy else stalled
    causes = []
    for rank in sorted(stalled):
        if rank in answers:
            about = answers[rank]
            causes.append(
                f"rank {rank} stalls {about['doing']} (last update {about['step']:,}, at {about['place']})"
            )
        else:
            causes.append(f"rank {rank} does not answer")
    last = max(answer["step"] for answer in answers.values())
    return (
        f"error: no update for {seconds / 60:g} minutes (--stall_minutes) after update {last:,}: "
        f"{'; '.join(causes)}. Start the same command again to resume"
    )
