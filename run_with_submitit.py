"""Run any script of this repository on Slurm, requeued after a preemption or the time limit.

    python run_with_submitit.py SCRIPT.py --nodes N --ngpus G --partition P … -- ARGS of the script

    SIMLA, 4 x 8 GPUs   python run_with_submitit.py Pretrain.py --name simla --nodes 4 --ngpus 8 \\
                            --partition gpu -- --config configs/Pretrain/simla.yaml
    CLIP-rocket         python run_with_submitit.py --nodes 4 --ngpus 8 --model CL2L_R50_CL2L …
    look first          … --dry-run prints the batch file and submits nothing

Without SCRIPT.py it is main.py. Options that the launcher does not know go to the script, so `--`
is needed only where both know a flag; what the script would refuse ends here. Each GPU gets one
process; the script writes to the job folder unless ARGS name another --output_dir.

Slurm sends SIGUSR1 ahead of the time limit (SIGTERM ahead of a preemption). The script saves at its
next step and exits with status 75, and the batch file requeues the job: same job, same folder,
`--resume auto`. A cancelled job stays cancelled, any other failure stays a failure. More is in
docs/SLURM.md; to try it: bash scripts/dev/local_slurm.sh start.
"""

import argparse
import importlib
import math
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from base.errors import UserError
from base.names import nearest
from runtime.slurm import (
    build_executor,
    has_slurm,
    in_shell,
    job_folder,
    need_idle,
    sbatch_options,
    submit_command,
)

ROOT = Path(__file__).resolve().parent
LEAST = {"nodes": 1, "tasks": 1, "timeout": 1, "cpus": 1}  # smallest values of the numbers
LEAST |= {"ngpus": 0, "mem": 0, "signal_delay": 0, "max_requeues": 0}


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
    add_job_options(form)
    add_slurm_options(form)
    options, unknown = form.parse_known_args(argv[:cut])
    options.script = script
    check_spelling(unknown, script, [name.lstrip("-") for name in form._option_string_actions])
    words = unknown + argv[cut + 1 :]
    check_words(["--output_dir", str(job_folder(options)), *words], script)
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name} {value:g}: give {least} or more")
    if options.signal_delay >= 60 * options.timeout:
        raise UserError(
            f"--timeout {options.timeout} (minutes): Slurm would warn {options.signal_delay} seconds "
            "before its end, at the start; give a larger --timeout, or a smaller --signal_delay"
        )
    if options.tasks is None:
        options.tasks = max(1, options.ngpus)
    return options, words


def check_spelling(words: list[str], script: str, launcher: list[str]) -> None:
    """Raise UserError for a word that is nearly an option of the launcher and none of the script:
    passed on, it would end the job after its time in the queue."""
    for word in words:
        flag = word.partition("=")[0]
        meant = nearest(flag.lstrip("-"), launcher, cutoff=0.8)
        if flag.startswith("--") and meant and flag.replace("_", "-") not in script_flags(script):
            raise UserError(
                f"{flag}: no option of the launcher or of {script}; did you mean --{meant}? "
                "What is meant for the script all the same goes behind --"
            )


def check_words(words: list[str], script: str) -> None:
    """Raise UserError for what a script of this repository would refuse after its time in the queue."""
    path = find_script(script)
    if path.parent != ROOT or "\n    run_script(main" not in path.read_text():
        return  # any other might do its work when it is imported
    from runtime.config.ahead import check_ahead

    try:
        check_ahead(importlib.import_module(path.stem).Config, words)
    except UserError as error:
        raise UserError(f"{script}: {error}") from None


@cache
def script_flags(script: str) -> set[str]:
    """The options that a script's help lists, with dashes."""
    command = [sys.executable, str(find_script(script)), "--help", "all"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    return {flag.replace("_", "-") for flag in re.findall(r"--[a-zA-Z][\w.-]*", text)}


def add_job_options(form: argparse.ArgumentParser) -> None:
    """What is started, how often, and where its results go."""
    add = form.add_argument
    add("--nodes", type=int, default=8, help="nodes [8]")
    add("--ngpus", type=int, default=8, help="GPUs of a node, with a process each; 0: CPU only [8]")
    add("--tasks", type=int, help="processes of a node [one per GPU; 1 on the CPU]")
    add(
        "--timeout",
        type=int,
        default=2800,
        metavar="MINUTES",
        help="time limit of a stretch of the job [2800]",
    )
    add("--name", help="of the job, and of its folder output/NAME; used again, the run resumes")
    add(
        "--job_dir",
        "--job-dir",
        help="folder of logs and results; %%j is the job's number [output/NAME or slurm/%%j]",
    )
    add("--signal_delay", "--signal-delay", type=int, default=120, help="seconds to save in [120]")
    add(
        "--max_requeues",
        "--max-requeues",
        type=int,
        default=30,
        help="times the job may be requeued [30]",
    )
    add("--dry_run", "--dry-run", action="store_true", help="print the batch file, submit nothing")


def add_slurm_options(form: argparse.ArgumentParser) -> None:
    """What the cluster is asked for."""
    add = form.add_argument
    add("--partition", help="partition, or several a,b")
    add("--constraint", help="features that nodes must have")
    add("--use_volta32", action="store_true", help="short for --constraint volta32gb")
    add(
        "--mem",
        type=float,
        metavar="GB",
        help="memory of a node, 0: all of it [40 per GPU; on the CPU what the partition gives]",
    )
    add(
        "--cpus",
        type=int,
        help="CPU cores of a process, its loader workers included [10; on the CPU 1]",
    )
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--exclude", metavar="NODES", help="nodes to avoid")
    add("--comment", help="comment of the job")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any further option of sbatch; repeatable",
    )


def find_script(name: str) -> Path:
    """The script in the caller's folder, else in this repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path.resolve()
    scripts = [path.name for path in ROOT.glob("*.py") if not path.is_symlink()]
    known = sorted(name for name in scripts if name != Path(__file__).name)
    raise UserError(f"{name}: no such script; there are {', '.join(known)}")


def command_line(options: argparse.Namespace, words: list[str]) -> str:
    """What every process runs, in the shell's spelling. ARGS come last, so that they win."""
    folder = in_shell(job_folder(options))
    script = find_script(options.script)
    if options.name and script.name == "main.py":  # there it also names the run in logs
        words = ["--name", options.name, *words]
    python = shlex.join([sys.executable, "-u", str(script)])
    return f"{python} --output_dir {folder} {shlex.join(words)}".rstrip()


def need_slurm(options: argparse.Namespace, words: list[str]) -> None:
    """Raise UserError that says how to run without Slurm, where it is absent."""
    if has_slurm():
        return
    command = shlex.join([options.script, *words])
    processes = f"--nproc_per_node={options.tasks}"
    meeting = "--rdzv_backend=c10d --rdzv_endpoint=FIRST_HOST:29500"
    lines = [
        "sbatch and srun are not on this machine: there is no Slurm to submit to. The same training without it:",
        f"one machine             torchrun --standalone {processes} {command}",
    ]
    if options.nodes > 1:
        nodes = options.nodes
        lines.append(
            f"on each of {nodes} machines    torchrun --nnodes={nodes} {processes} {meeting} {command}"
        )
    lines += [
        "a Slurm to try it on    bash scripts/dev/local_slurm.sh start",
        "the batch file alone    add --dry-run",
    ]
    raise UserError("\n  ".join(lines))


def submit(options: argparse.Namespace, words: list[str]) -> None:
    """Hand the job to Slurm and say where to look."""
    folder = job_folder(options)
    need_idle(folder)
    executor = build_executor(folder, sbatch_options(options))
    job = submit_command(executor, command_line(options, words))
    folder = Path(str(folder).replace("%j", job))
    (folder / "slurm" / "job").write_text(f"{job}\n")
    print(
        f"job {job}: {options.script} on {options.nodes} x {options.tasks} processes -> {folder}",
        f"  runs    {shlex.join([options.script, *words])}",
        f"  follow  tail -F {folder / 'slurm' / job}_0_log.out",
        f"  state   squeue -j {job}",
        f"  stop    scancel {job}   (submitted again with this folder, it resumes)",
        sep="\n",
    )


def main(argv: list[str]) -> None:
    options, words = read_arguments(argv)
    command = command_line(options, words)
    if options.dry_run:
        executor = build_executor(job_folder(options), sbatch_options(options))
        print(executor._make_submission_file_text(command, "preview"))
        return
    need_slurm(options, words)
    submit(options, words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
