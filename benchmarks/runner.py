"""What every benchmark does: options, taking turns in fresh processes, and the check of the load.

Sides are {name in the table: "MODULE:FUNCTION" for benchmarks.child}. They take turns, so that a
change of the machine's speed disturbs all alike.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base.errors import UserError
from runtime.config.cli import knob

ROOT = Path(__file__).resolve().parents[1]
IDLE_LOAD = 0.3  # cores that other work may use where times by the clock count
OURS = "ours"  # name of our side in every table
PEER = "original"


@dataclass
class Options:
    """Options of every benchmark."""

    tiny = False  # an option of those that have a network
    device: str = knob("auto", "auto (CUDA where present), cpu or cuda")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(3, "measurements of each side", low=1, aliases=("rounds",))
    busy: bool = knob(False, "measure although other work is running; the table says so")
    wait: float = knob(0.0, "minutes to wait until no other work is running", low=0)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")


@dataclass
class PeerOptions(Options):
    """Options of a benchmark of networks, beside which an original's code can run."""

    tiny: bool = knob(False, "a tiny network, printed only: shows that the benchmark runs")
    peer: str | None = knob(None, "checkout of the original to measure beside ours")
    peer_python: str | None = knob(None, "interpreter for the original; none = this one")


@dataclass
class TrainOptions(PeerOptions):
    """Options of a benchmark of training steps."""

    precision: str = knob("fp32", "type of the forward pass", choices=("fp32", "bf16", "fp16"))
    warmup: int = knob(1, "steps before the clock starts, in each measurement", low=0)
    steps: int = knob(2, "timed steps of a measurement; their median counts", low=1)
    batch: int = knob(4, "samples a step", low=2)
    compile: bool = knob(False, "torch.compile")
    activation_checkpointing: bool = knob(False, "recompute blocks in the backward pass")


def device_of(options: Options) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where present."""
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return options.device


def check_peer(options: PeerOptions, file: str, name: str, tensorflow: bool = False) -> None:
    """UserError if --peer is given and is no checkout of `name`, which has `file`."""
    if not options.peer:
        return
    if not (Path(options.peer) / file).is_file():
        raise UserError(f"--peer {options.peer}: no {file} there; it takes a checkout of {name}")
    if tensorflow and not options.peer_python:
        raise UserError(
            "--peer needs --peer-python, an interpreter with TensorFlow 2.12, tensorflow-addons "
            "and, for ALIGN, transformers 4.38"
        )


# ---- load
def busy_seconds() -> float:
    """CPU seconds that all work of the machine has used since it started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    idle, waiting_for_disks = ticks[3:5]
    return (sum(ticks) - idle - waiting_for_disks) / os.sysconf("SC_CLK_TCK")


def current_load(seconds: float = 2.0) -> float:
    """Cores in use now. Unlike the load average, it forgets at once the measurement before."""
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds


def idle_load(options: Options) -> float:
    """The load, once no other work is running. UserError if it still is after `wait` minutes,
    unless --busy allows it."""
    deadline = time.monotonic() + 60 * options.wait
    while (load := current_load()) >= IDLE_LOAD and not options.busy:
        if time.monotonic() > deadline:
            raise UserError(
                f"other work is running (load {load:.1f}, idle is below {IDLE_LOAD}): wait "
                "(--wait MINUTES), or measure anyway with --busy"
            )
    return load


# ---- turns
def run_side(name: str, function: str, options: Options, processes: int = 0, **more) -> dict:
    """What the function makes, in a fresh process, of the options, the resolved `device`, its name
    as `side`, and `more`; `spent`, the CPU seconds of all its processes; `others`, the cores that
    other work used meanwhile. UserError with its last words if it fails.

    processes: that torchrun starts; 0 = one without it. benchmarks.peers run by --peer-python."""
    given = {**asdict(options), "device": device_of(options), "side": name, **more}
    python = function.startswith("benchmarks.peers.") and given["peer_python"]
    command = [python or sys.executable, "-m", "benchmarks.child", function]
    if processes:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command[2:2] = [*launcher, "-m"]
    command.append(json.dumps(given, default=str))
    threads = str(options.threads)
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env |= {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    begin, busy = os.times(), busy_seconds()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    end, busy = os.times(), busy_seconds() - busy
    if done.returncode:
        error = done.stderr.strip()[-3000:]
        raise UserError(f"{name} failed (exit {done.returncode}):\n{error}")
    spent = sum(end[2:4]) - sum(begin[2:4])  # of child processes
    others = max(0.0, (busy - spent) / (end.elapsed - begin.elapsed))
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "spent": spent, "others": others}


def take_turns(options: Options, sides: dict[str, str], **more) -> dict[str, list[dict]]:
    """All measurements {the side's name: [results]}, ours first, each with the `load` before it.
    They run in the order of `sides`, every second `turn` in reverse, and share the folder
    `exchange`."""
    order = list(sides)
    results = {name: [] for name in sorted(order, key=lambda name: name != OURS)}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for name in order:
                load = idle_load(options)
                given = {"exchange": folder, "turn": turn, **more}
                result = run_side(name, sides[name], options, **given)
                results[name].append({**result, "load": load})
                figures = {n: round(v, 3) for n, v in result.items() if isinstance(v, int | float)}
                print(f"{name} {turn + 1}/{options.repeats}: {figures}", flush=True)
            order.reverse()
    return results
