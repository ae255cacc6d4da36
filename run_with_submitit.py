"""Start any script of this repository on Slurm; it is requeued after a preemption or the time limit and goes on.

    python run_with_submitit.py SCRIPT.py --nodes N --ngpus G --partition P --timeout M … -- ARGS of the script

    SIMLA, 4 x 8 GPUs   python run_with_submitit.py Pretrain.py --name simla --nodes 4 --ngpus 8 --partition gpu \\
                            -- --config configs/Pretrain/simla.yaml
    CLIP-rocket         python run_with_submitit.py --nodes 4 --ngpus 8 --name cl2l --model CL2L_R50_CL2L …
    look first          … --dry-run prints the batch file and submits nothing

Without SCRIPT.py it is main.py. What this launcher does not know it hands to the script, so `--` is needed only where
both know a flag. A process per GPU; the script writes to the job folder unless ARGS name another --output_dir.

Slurm sends SIGUSR1 ahead of the time limit (SIGTERM ahead of a preemption); the script then saves at its next step and
exits with status 75, upon which the batch file requeues the job: same job, same folder, `--resume auto`. A job that was
cancelled stays cancelled, and any other failure stays a failure. docs/SLURM.md tells more; a Slurm to try it on:
bash scripts/dev/local_slurm.sh start.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from base.errors import UserError

ROOT = Path(__file__).resolve().parent
EXIT_REQUEUE = 75  # of runtime.interrupt, which would bring torch to the login node
USR1, TERM = 128 + 10, 128 + 15  # status of a process that the signal met before it listened
OTHERS_WAIT_S = 300  # after the first process of a job ended, the others are ended too

# In the batch file ahead of srun. The address is the one Slurm itself reaches the node by: its name need not resolve.
# Slurm signals the script itself only when it ends the job: a cancelled one must not come back, and a preempted one
# Slurm requeues on its own.
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
    if [ "$(cat REQUEUES 2>/dev/null | grep -c "^job $SLURM_JOB_ID ")" -ge LIMIT ]; then
        echo "job $SLURM_JOB_ID was requeued LIMIT times (--max_requeues); submit it again to go on" >&2
        return
    fi
    echo "job $SLURM_JOB_ID asked to go on, $(date '+%F %T')" >> REQUEUES
    scontrol requeue "$SLURM_JOB_ID"
}}
trap 'finish $?' EXIT"""


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, with `script`, and the words that go to the script."""
    script, argv = (argv[0], argv[1:]) if argv and argv[0].endswith(".py") else ("main.py", argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    form = argparse.ArgumentParser(
        usage="python run_with_submitit.py [SCRIPT.py] [options] [--] [ARGS of the script]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --work is the script's, not ours
    )
    add = form.add_argument
    add("--nodes", type=int, default=8, help="nodes [8]")
    add("--ngpus", type=int, default=8, help="GPUs of a node, with a process each; 0: CPU only [8]")
    add("--tasks", type=int, help="processes of a node [one per GPU; 1 on the CPU]")
    add("--timeout", type=int, default=2800, metavar="MINUTES", help="time limit of a stretch of the job [2800]")
    add("--name", help="of the job, and of its folder output/NAME; called again with it, the run goes on")
    add("--job_dir", "--job-dir", help="folder of logs and results; %%j is the job's number [output/NAME or slurm/%%j]")
    add("--partition", help="partition, or several a,b")
    add("--constraint", help="features that nodes must have")
    add("--use_volta32", action="store_true", help="short for --constraint volta32gb")
    add("--mem", type=float, metavar="GB", help="memory of a node [40 per GPU; on the CPU what the partition gives]")
    add("--cpus", type=int, help="CPU cores of a process, its loader workers included [10; on the CPU 1]")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--exclude", metavar="NODES", help="nodes to avoid")
    add("--comment", help="comment of the job")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any further option of sbatch; repeatable")
    add("--signal_delay", "--signal-delay", type=int, default=120, metavar="SECONDS", help="time to save in [120]")
    add("--max_requeues", "--max-requeues", type=int, default=30, help="times the job may ask to go on [30]")
    add("--dry_run", "--dry-run", action="store_true", help="print the batch file, submit nothing")
    options, unknown = form.parse_known_args(argv[:cut])
    options.script = script
    if options.nodes < 1 or options.ngpus < 0 or options.timeout < 1 or (options.tasks or 1) < 1:
        raise UserError("--nodes, --tasks and --timeout start at 1, --ngpus at 0")
    if options.tasks is None:
        options.tasks = max(1, options.ngpus)
    return options, unknown + argv[cut + 1 :]


def find_script(name: str) -> Path:
    """The script in the caller's folder, else in this repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path.resolve()
    known = sorted(path.name for path in ROOT.glob("*.py") if path.name != Path(__file__).name)
    raise UserError(f"{name}: no such script; there are {', '.join(known)}")


def job_folder(options: argparse.Namespace) -> Path:
    """Where the job's logs and results go; may hold %j, which Slurm and the batch file fill in."""
    default = f"output/{options.name}" if options.name else "output/slurm/%j"
    return Path(options.job_dir or default).absolute()


def command_line(options: argparse.Namespace, words: list[str]) -> str:
    """What every process runs, in the shell's spelling. ARGS come last, so that they win."""
    folder = '"$SLURM_JOB_ID"'.join(shlex.quote(part) for part in str(job_folder(options)).split("%j"))
    script = find_script(options.script)
    if options.name and script.name == "main.py":  # there it also names the run in logs
        words = ["--name", options.name, *words]
    python = shlex.join([sys.executable, "-u", str(script)])
    return f"{python} --output_dir {folder} {shlex.join(words)}".rstrip()


def sbatch_options(options: argparse.Namespace) -> dict:
    """Options of sbatch in submitit's spelling."""
    gpus, cpus = options.ngpus, options.cpus or (10 if options.ngpus else 1)
    memory = options.mem or 40 * gpus
    requeues = '"$SLURM_JOB_ID"'.join(shlex.quote(p) for p in str(job_folder(options) / "requeues.log").split("%j"))
    limit = str(options.max_requeues)
    given = {
        "job_name": options.name or Path(options.script).stem,
        "partition": options.partition,
        "time": options.timeout,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks,
        "gpus_per_node": gpus or None,
        "cpus_per_task": cpus,
        "mem": f"{round(memory * 1024)}M" if memory else None,
        "constraint": options.constraint or ("volta32gb" if options.use_volta32 else None),
        "account": options.account,
        "qos": options.qos,
        "exclude": options.exclude,
        "comment": options.comment,
        "stderr_to_stdout": True,
        "setup": BATCH.replace("REQUEUES", requeues).replace("LIMIT", limit).strip().splitlines(),
        # since Slurm 22.05, srun does not take the cores from sbatch; a status 75 must reach us from every process
        "srun_args": [f"--cpus-per-task={cpus}", f"--wait={OTHERS_WAIT_S}", "--kill-on-bad-exit=0"],
    }
    more = dict(word.removeprefix("--").partition("=")[::2] for word in options.sbatch)
    more = {key: value or True for key, value in more.items()}  # a bare option is a switch
    given["additional_parameters"] = {"requeue": True, "signal": f"USR1@{options.signal_delay}"} | more
    given = {key: value for key, value in given.items() if value is not None}
    return given | {"wckey": None}  # submitit's default is refused where clusters check wckeys


def build_executor(options: argparse.Namespace):
    """submitit's writer of batch files; it works where there is no Slurm, too."""
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(folder=job_folder(options) / "slurm")
    executor.update_parameters(**sbatch_options(options))
    return executor


def need_slurm(options: argparse.Namespace, words: list[str]) -> None:
    """Raise UserError that says how to run without Slurm, where it is absent."""
    if shutil.which("sbatch") and shutil.which("srun"):
        return
    rest = shlex.join([options.script, *words])
    one = f"torchrun --standalone --nproc_per_node={options.tasks} {rest}"
    many = f"torchrun --nnodes={options.nodes} --nproc_per_node={options.tasks} --rdzv_backend=c10d "
    many = f"{many}--rdzv_endpoint=FIRST_HOST:29500 {rest}"
    lines = ["sbatch and srun are not on this machine: there is no Slurm to submit to. The same training without:"]
    lines += [f"one machine             {one}"]
    lines += [f"on each of {options.nodes} machines    {many}"] if options.nodes > 1 else []
    lines += ["a Slurm to try it on    bash scripts/dev/local_slurm.sh start", "the batch file alone    add --dry-run"]
    raise UserError("\n  ".join(lines))


def need_idle(folder: Path) -> None:
    """Raise UserError where an earlier job still writes, or waits to write, to this folder."""
    note = folder / "slurm" / "job"
    if not note.exists():
        return
    job = note.read_text().strip()
    states = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.split()
    if states:
        raise UserError(
            f"{folder}: job {job} is {states[0].lower()} and writes there; let it end, `scancel {job}`, or choose "
            "another --name"
        )


def submit(options: argparse.Namespace, words: list[str]) -> None:
    """Hand the job to Slurm and say where to look."""
    import submitit

    folder = job_folder(options)
    need_idle(folder)
    executor, command = build_executor(options), command_line(options, words)
    submitit.core.utils.JobPaths.get_first_id_independent_folder(executor.folder).mkdir(parents=True, exist_ok=True)
    try:
        # the processes are started by srun directly, without submitit's pickles: signals reach them, and the batch
        # file, kept beside the logs, shows all of it
        job = executor._submit_command(command)
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the job: {str(error).strip()}") from None
    folder = Path(str(folder).replace("%j", job.job_id))
    (folder / "slurm" / "job").write_text(f"{job.job_id}\n")
    log = folder / "slurm" / f"{job.job_id}_0_log.out"
    print(
        f"job {job.job_id}: {options.script} on {options.nodes} x {options.tasks} processes -> {folder}",
        f"  follow  tail -F {log}",
        f"  state   squeue -j {job.job_id}",
        f"  stop    scancel {job.job_id}   (the run goes on when submitted again into this folder)",
        sep="\n",
    )


def main(argv: list[str]) -> None:
    options, words = read_arguments(argv)
    command = command_line(options, words)
    if options.dry_run:
        print(build_executor(options)._make_submission_file_text(command, "preview"))
        return
    need_slurm(options, words)
    submit(options, words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
