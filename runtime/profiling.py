"""A trace of some updates by torch's profiler, to be opened in Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from base.distributed import World

SETTLING = 5  # updates before the first traced one: compilation, allocator and loader settle


class StepProfiler:
    """Traces `steps` updates of a process and writes folder/trace_rank<R>.json.gz; with steps=0 it
    does nothing.

        profiler = StepProfiler(steps=3, folder=run.folder, world=world)
        for ...: ...; profiler.update()      # after every update

    While it traces, updates are slower than they are.
    """

    def __init__(self, steps: int, folder: Path, world: World):
        self.steps = steps
        self.target = folder / f"trace_rank{world.rank}.json.gz"
        self.left = SETTLING + steps
        self.profiler = None
        if not steps:
            return
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=SETTLING - 1, warmup=1, active=steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, record_shapes=True)
        self.profiler.start()

    def update(self) -> Path | None:
        """Count an update. After the last traced one writes the trace and returns its path."""
        if self.profiler is None:
            return None
        if torch.cuda.is_available() and self.left == 1:
            torch.cuda.synchronize()  # the last kernels belong to the trace
        self.profiler.step()
        self.left -= 1
        return self.finish() if self.left == 0 else None

    def finish(self) -> Path | None:
        """Write what there is: a run may end before. None where nothing was traced."""
        profiler = self.profiler
        self.profiler = None
        if profiler is None:
            return None
        profiler.stop()
        if self.left >= self.steps:  # not one traced update
            return None
        profiler.export_chrome_trace(str(self.target))
        return self.target
