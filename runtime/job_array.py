"""Work on many shards, shared by the tasks of a Slurm array, by machines, or done here.

    items = list_shards(...)                       # 1. the same list in every task
    if config.sharing.slurm:
        submit_array(config.sharing, len(items), folder)
        return
    own = own_range(config.sharing, len(items))    # 2. a task does its range of them
    ...                                            #    and passes over what is finished
    if is_whole(config.sharing):
        need_all(done, config.data, "shards")      # 3. the results together

A task that was killed starts again, by itself (Slurm requeues it) or by the same command, behind
what it has finished. Imports no torch: it runs on the login node.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.knobs import knob
from runtime.slurm import (
    build_executor,
    further_options,
    has_slurm,
    need_idle,
    requeueing,
    submit_command,
)

WARNED_S = 60  # seconds ahead of the time limit at which a task is ended and requeued
REQUEUES = 30  # of a task
# The number of one of its tasks is that of the array, too: requeued by it, all tasks would be.
TASK = '"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"'
NAMED = 10  # missing ranges that an error lists


@dataclass
class Sharing:
    """How the shards are shared."""

    slurm: int = knob(0, "tasks of a Slurm job array to submit; 0: work on this machine", low=0)
    cpus: int = knob(8, "cores of a task of the array", low=1)
    minutes: int = knob(240, "time limit of a task, which is requeued until it is done", low=1)
    sbatch: list[str] = knob([], "further options KEY=VALUE of sbatch, as partition=cpu mem=16G")
    range: str = knob("", "this part of the shards alone, as 0/4, 1/4, 2/4, 3/4 on four machines")
    merge: bool = knob(False, "only check that every range is done, and report the whole")


def is_whole(sharing: Sharing) -> bool:
    """Whether this process answers for all shards, not for a range of them."""
    return sharing.merge or not (sharing.range or "SLURM_ARRAY_TASK_ID" in os.environ)


def own_range(sharing: Sharing, count: int) -> range:
    """The items of `count` that this task does: none where it merges. UserError."""
    if sharing.merge:
        return range(0)
    number = 0
    tasks = 1
    if sharing.range:
        number, tasks = _numbers(sharing.range)
    elif "SLURM_ARRAY_TASK_ID" in os.environ:
        number, tasks = _array_task()
    return range(count * number // tasks, count * (number + 1) // tasks)


def _numbers(text: str) -> tuple[int, int]:
    number, slash, tasks = text.partition("/")
    if not (slash and number.isdecimal() and tasks.isdecimal() and int(number) < int(tasks)):
        raise UserError(f"--range {text}: expected NUMBER/RANGES, from 0/4 to 3/4 for four ranges")
    return int(number), int(tasks)


def _array_task() -> tuple[int, int]:
    """Number of this task of a Slurm array, from 0, and how many there are."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    default = {"STEP": "1"}
    values = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", default.get(name)) for name in names]
    task, first, last, step, count = (int(value or 0) for value in values)
    if not count:
        raise UserError("SLURM_ARRAY_TASK_COUNT is not set; name the range: --range NUMBER/RANGES")
    if last and (last - first) // step + 1 != count:
        raise UserError("--array of sbatch has gaps; number the tasks without, as --array=0-15")
    return (task - first) // step, count


def need_all(done: Sequence[bool], name: str, kind: str) -> None:
    """Raise UserError that names the ranges that are not done."""
    missing = missing_ranges(done)
    if not missing:
        return
    shown = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more ranges" if len(missing) > NAMED else ""
    raise UserError(
        f"{name}: {kind} {shown}{more} of 0-{len(done) - 1} are missing; start the same command "
        "again (without --merge): it does these alone"
    )


def missing_ranges(done: Sequence[bool]) -> list[range]:
    """Runs of numbers whose item is not done, in order."""
    found: list[range] = []
    for number, is_done in enumerate(done):
        if is_done:
            continue
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def submit_array(sharing: Sharing, count: int, folder: Path) -> None:
    """Submit this very command as an array of tasks, and one that merges after them. UserError.

    count: items to share; folder: where results go, the logs into folder/slurm."""
    check_submission(sharing)
    script = Path(sys.argv[0])
    folder = folder.absolute()
    need_idle(folder)
    logs = folder / "slurm"
    requeues = shlex.quote(str(logs / "requeues.log"))
    words = [sys.executable, "-u", str(script.absolute()), *sys.argv[1:], "--slurm", "0"]
    tasks = max(1, min(sharing.slurm, count))
    options = task_options(sharing, script.stem)
    options["setup"] = requeueing(requeues, REQUEUES, TASK)
    executor = build_executor(folder, options)
    executor.parameters["map_count"] = tasks
    array = submit_command(executor, shlex.join(words))
    (logs / "job").write_text(f"{array}\n")
    options = task_options(sharing, f"{script.stem}-merge")
    options["setup"] = requeueing(requeues, REQUEUES)
    more = options["additional_parameters"]
    more.pop("array", None)  # --sbatch array=0-63%8 is of the tasks
    more["dependency"] = f"afterany:{array}"  # if a task fails, the merge says what is missing
    try:
        merge = submit_command(build_executor(folder, options), shlex.join([*words, "--merge"]))
    except UserError as error:
        raise UserError(
            f"job {array} is submitted, but not the one that merges after it: {error}; when job {array} "
            "has ended, start the same command with --merge in place of --slurm"
        ) from None
    (logs / "job").write_text(f"{array},{merge}\n")
    print(
        f"job {array}: {script.name} in {tasks} tasks; job {merge} merges them -> {folder}",
        f"  follow  tail -F {logs}/{array}_*_log.out",
        f"  result  {logs}/{merge}_0_log.out",
        f"  state   squeue -j {array},{merge}",
        f"  stop    scancel {array} {merge}   (submitted again, it resumes)",
        sep="\n",
    )


def check_submission(sharing: Sharing) -> None:
    """Raise UserError where an array cannot be submitted, or would not do what was asked for."""
    if sharing.range or sharing.merge:
        raise UserError(
            "--slurm gives each task its range and merges: leave out --range and --merge"
        )
    if "RANK" in os.environ:
        raise UserError("--slurm starts the processes itself: use python instead of torchrun")
    if not has_slurm():
        raise UserError(
            "--slurm: sbatch and srun are not on this machine; without --slurm the work is done "
            f"here, and --range 0/{sharing.slurm} to {sharing.slurm - 1}/{sharing.slurm} share it "
            "among machines by hand (then once --merge)"
        )


def task_options(sharing: Sharing, name: str) -> dict:
    """Options of sbatch for one task, in submitit's spelling."""
    return {
        "job_name": name,
        "time": sharing.minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": sharing.cpus,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's default is refused where clusters check wckeys
        "srun_args": [f"--cpus-per-task={sharing.cpus}"],
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR1@{WARNED_S}",
            **further_options(sharing.sbatch),
        },
    }
