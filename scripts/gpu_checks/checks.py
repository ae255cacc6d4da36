"""Checks of each method on a device: against the CPU, and each feature against the plain step."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path

import torch
import torch.distributed as dist

from base import distributed
from runtime.parallel import knows_fsdp
from scripts.gpu_checks.report import Report
from scripts.gpu_checks.runs import (
    Run,
    difference,
    first_losses,
    random_batches,
    without_randomness,
)
from scripts.gpu_checks.whole_runs import run_to_end
from scripts.planning.methods import STEPS

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"fp32": 2e-3, "bf16": 6e-2, "fp16": 2e-2}  # relative, of losses and gradient norms
COMPILED = {  # compiling all takes a quarter hour; options besides: see check_compiled_pooling
    "simla": "",
    "ve": "",
    "nxtp": "",
    "cl2l": " --image_size 32",
    "align": "",
    "vit": "",
}


def check_methods(
    report,
    pool: Executor,
    names: Sequence[str],
    compiled: Sequence[str],
    device: torch.device,
) -> None:
    """Every method in a process of the pool; those that compile, which take longest, first."""
    order = sorted((n for n in names if n in STEPS), key=lambda name: name not in compiled)
    work = [pool.submit(method_report, name, device, name in compiled) for name in order]
    for done in as_completed(work):
        report.take(done.result())


def method_report(name: str, device: torch.device, compiled: bool) -> Report:
    """The checks of one method."""
    report = Report()
    check_method(report, name, STEPS[name], device, compiled)
    return report


def check_method(
    report, name: str, command: str, device: torch.device, compiled: bool = False
) -> None:
    """One method: device against CPU, then each feature against the plain step."""
    with without_randomness():
        expected = Run(command, torch.device("cpu"), "fp32").losses()
        for precision, limit in TOLERANCE.items():
            if precision == "fp16" and device.type != "cuda":
                continue  # loss scaling is CUDA's alone

            def on_device(precision=precision) -> float:
                found = Run(command, device, precision).losses()
                if precision == "fp32":
                    return difference(found, expected)
                # small batch norms amplify the rounding in gradients, and so in later steps
                return difference(found, first_losses(expected))

            report.check(f"{name}: {device.type} {precision} as CPU fp32", on_device, limit)

        def checkpointed() -> float:
            run = Run(command, device, "fp32", activation_checkpointing=True)
            return difference(run.losses(), expected)

        report.check(f"{name}: checkpointing as plain", checkpointed, TOLERANCE["fp32"])
    if device.type == "cuda":
        check_on_cuda(report, name, command, device)
        if compiled:
            check_compiled(report, name, command + COMPILED[name], device)


def check_compiled(report, name: str, command: str, device: torch.device) -> None:
    """Compiled code, as eager on the same device."""

    def compiled() -> float:
        with without_randomness():
            expected = Run(command, device, "fp32").losses()
            return difference(Run(command, device, "fp32", compile=True).losses(), expected)

    report.check(f"{name}: compiled as eager", compiled, TOLERANCE["fp32"])


def check_on_cuda(report, name: str, command: str, device: torch.device) -> None:
    """What needs a GPU: host waits, loss scaling."""

    def waits() -> float:
        with random_batches():
            return without_host_waits(Run(command, device, "bf16"))

    report.check(f"{name}: no host wait in bf16", waits, 0.0)
    report.check(f"{name}: fp16 finds a scale", lambda: steps_without_update(command, device), 10)


def without_host_waits(run: Run) -> float:
    """0 after a step in which the host does not wait for the GPU. Raises RuntimeError where it does."""
    run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def steps_without_update(command: str, device: torch.device, most: int = 20) -> int:
    """Steps that loss scaling skips before the first update; `most` where there is none."""
    run = Run(command, device, "fp16")
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    with random_batches():
        for number in range(most):
            run.step()
            after = [p for p in run.model.parameters() if p.requires_grad]
            if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                return number
    return most


def check_sharding(report, device: torch.device) -> None:
    """FSDP2 in a group of one process, as plain."""
    command = STEPS["ve"]

    def sharded() -> float:
        with without_randomness():
            expected = Run(command, device, "fp32").losses()
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                return difference(Run(command, device, "fp32", parallel="fsdp").losses(), expected)
            finally:
                distributed.shutdown()

    title = "FSDP2 on one process as plain"
    if knows_fsdp():
        report.check(title, sharded, TOLERANCE["fp32"])
    else:
        report.note(f"skip  {title:<44} torch before 2.7")


def check_resume(report, device: torch.device) -> None:
    """Classification.py, killed after a checkpoint and started again, logs the losses of a run that
    nothing disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        report.check(
            "killed and resumed as undisturbed",
            lambda: resumed_difference(Path(folder), device),
            TOLERANCE["fp32"],
        )


def resumed_difference(folder: Path, device: torch.device) -> float:
    from dataset.digitscenes.build import Request, build

    request = Request(train=64, val=24, test=24, size=32, seed=0)
    build(folder / "data", request, say=lambda *_: None)
    straight, killed = folder / "straight", folder / "killed"
    run_to_end(training(folder / "data", straight, device))
    command = training(folder / "data", killed, device)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, **silent)
    try:
        wait_for(killed / "checkpoint_00000002.pt", process)
    finally:
        process.kill()
        process.wait()
    run_to_end(command)
    expected, found = logged(straight), logged(killed)
    if expected.keys() != found.keys():
        raise RuntimeError(f"{len(found)} steps logged, not {len(expected)}")
    return difference(found, expected)


def training(data: Path, out: Path, device: torch.device) -> list[str]:
    """Command line of a short run with a checkpoint every second step."""
    words = f"""--config configs/Classification/debug.yaml --data-root {data} --output-dir {out}
    --train-data {data}/coyo_labeled/train.jsonl --val-data {data}/coyo_labeled/val.jsonl
    --classes {data}/coyo_labeled/classes.txt --device {device.type} --eval-every 100
    --scheduler.warmup 2"""
    return [sys.executable, "Classification.py", *words.split(), "--scheduler.epochs", "30 steps"]


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300.0) -> None:
    """Until the file is there. Raises RuntimeError where the process ends first."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no {path.name} was written")
        time.sleep(0.02)


def logged(folder: Path) -> dict[str, float]:
    """The loss of each step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {f"loss {line['step']}": line["loss"] for line in lines if "loss" in line}
