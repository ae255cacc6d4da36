"""Batch files: what Slurm is asked for, and how a job is requeued.

Imports no torch: it runs on the login node.
"""

import argparse
import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.reading import is_file
from base.writing import check_folder_option

EXIT_REQUEUE = 75  # of runtime.interrupt, which would bring torch to the login node
USR1, TERM = 128 + 10, 128 + 15  # status of a process that the signal met before it listened
OTHERS_WAIT_S = 300  # after the first process of a job ended, the others are ended too
PATTERN = re.compile(r"%(\d*[AaJNbnstux%]|\d+j)")  # what Slurm fills in, in names of logs alone

# In the batch file ahead of srun. The address is the one Slurm itself reaches the node by: its name need not resolve.
# Slurm signals the script itself only when it ends the job: a cancelled one must not come back, and a preempted one
# Slurm requeues on its own. The processes may have left before that signal comes; but then the job no longer counts as
# running.
BATCH = f"""
unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR
ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM
finish() {{
    case $1 in {EXIT_REQUEUE}|{USR1}|{TERM}) ;; *) return ;; esac
    [ $ended_by_slurm = no ] || return
    case $(squeue -h -j JOB -o %T) in RUNNING|"") ;; *) return ;; esac
    if [ "$(cat REQUEUES 2>/dev/null | grep -c "^job $SLURM_JOB_ID ")" -ge LIMIT ]; then
        echo "job $SLURM_JOB_ID was requeued LIMIT times (--max_requeues); submit it again to resume" >&2
        return
    fi
    echo "job $SLURM_JOB_ID asked to be requeued, $(date '+%F %T')" >> REQUEUES
    scontrol requeue JOB
}}
trap 'finish $?' EXIT"""


def job_folder(options: argparse.Namespace) -> Path:
    """Where the job's logs and results go; may hold %j, which Slurm and the batch file fill in.
    UserError."""
    folder = options.job_dir or (f"output/{options.name}" if options.name else "output/slurm/%j")
    if "://" in folder:
        raise UserError(
            f"{folder}: Slurm's logs need a folder: leave --job_dir out, and write behind --: --output_dir {folder}"
        )
    if found := PATTERN.search(folder):
        raise UserError(
            f"{folder}: {found[0]} would be filled in for the logs alone; of Slurm's patterns, a job's "
            "folder may hold %j"
        )
    return Path(folder).absolute()


def in_shell(path: Path) -> str:
    """A path in the shell's spelling; %j is the job's number."""
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) for part in str(path).split("%j"))


def requeueing(log: str, limit: int, job: str = '"$SLURM_JOB_ID"') -> list[str]:
    """Lines of a batch file ahead of srun, for a job that is requeued at most `limit` times.

    log: a file with a line a requeue; job: what is requeued; both in the shell's spelling."""
    lines = BATCH.replace(" JOB", f" {job}").replace("LIMIT", str(limit))
    lines = lines.replace("REQUEUES", log)  # last: a folder may be called LIMIT
    return lines.strip().splitlines()


def further_options(words: Sequence[str]) -> dict[str, str | bool]:
    """Options of sbatch from KEY=VALUE; a bare KEY is a switch."""
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {key.replace("-", "_"): value or True for key, _, value in pairs}


def sbatch_options(options: argparse.Namespace) -> dict:
    """Options of sbatch in submitit's spelling."""
    gpus = options.ngpus
    cpus = options.cpus or (10 if options.ngpus else 1)
    further = further_options(options.sbatch)
    if "array" in further:
        raise UserError(
            f"--sbatch array={further['array']}: every task would be the same run; submit a job for "
            "each, with a --name of its own"
        )
    memory = options.mem
    if memory is None and gpus and not any(key.startswith("mem") for key in further):
        memory = 40 * gpus
    requeues = in_shell(job_folder(options) / "requeues.log")
    given = {
        "job_name": options.name or Path(options.script).stem,
        "partition": options.partition,
        "time": options.timeout,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks,
        "gpus_per_node": gpus or None,
        "cpus_per_task": cpus,
        "mem": None if memory is None else f"{round(memory * 1024)}M",
        "constraint": options.constraint or ("volta32gb" if options.use_volta32 else None),
        "account": options.account,
        "qos": options.qos,
        "exclude": options.exclude,
        "comment": options.comment,
        "stderr_to_stdout": True,
        "setup": requeueing(requeues, options.max_requeues),
        # since Slurm 22.05, srun does not take the cores from sbatch; a status 75 must reach us from every process
        "srun_args": [f"--cpus-per-task={cpus}", f"--wait={OTHERS_WAIT_S}", "--kill-on-bad-exit=0"],
    }
    given["additional_parameters"] = {
        "requeue": True,
        "signal": f"USR1@{options.signal_delay}",
        **further,
    }
    given = {key: value for key, value in given.items() if value is not None}
    return given | {"wckey": None}  # submitit's default is refused where clusters check wckeys


def build_executor(folder: Path, parameters: dict):
    """submitit's writer of batch files; it works where there is no Slurm, too."""
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(folder=folder / "slurm")
    executor.update_parameters(**parameters)
    return executor


def submit_command(executor, command: str) -> str:
    """Submit a batch file that starts `command` by srun; the job's number. UserError.

    The processes are started by srun directly, without submitit's pickles: signals reach them, and
    the batch file, kept beside the logs, shows all of it. A refused job leaves nothing behind."""
    import submitit

    logs = submitit.core.utils.JobPaths.get_first_id_independent_folder(executor.folder)
    made = [folder for folder in (logs, *logs.parents) if not folder.exists()]
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error
            return executor._submit_command(command).job_id
    except submitit.core.utils.FailedJobError as error:
        for file in logs.glob(".submission_file_*.sh"):
            if not file.is_symlink():  # to the batch file of a job that was taken
                file.unlink()
        with contextlib.suppress(OSError):  # another process writes there
            for folder in made:
                folder.rmdir()
        raise UserError(f"sbatch refused the job: {str(error).strip()}") from None


def has_slurm() -> bool:
    """Whether this machine can submit jobs."""
    return bool(shutil.which("sbatch") and shutil.which("srun"))


def need_idle(folder: Path) -> None:
    """Raise UserError where an earlier job still writes, or waits to write, to this folder, or where
    it cannot be made."""
    check_folder_option(str(folder).partition("%j")[0], "folder of the job")
    note = folder / "slurm" / "job"
    if not is_file(note):
        return
    job = note.read_text().strip()
    states = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True
    ).stdout.split()
    if states:
        raise UserError(
            f"{folder}: job {job} is {states[0].lower()} and writes there; let it end, `scancel {job}`, or name "
            "another folder"
        )
