"""Step time, memory and MFU of whole recipes beside plan.py's figures, and plan.py's constants."""

import gc
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.gpus import GPUS, Gpu, gpu_by_device_name
from runtime.options import COMPILE_MODES
from runtime.simulate import bounds as b
from scripts.gpu_checks.report import Report
from scripts.gpu_checks.runs import Run, random_batches
from scripts.gpu_checks.workers import workers
from scripts.planning.simulate import load_script, read_config, simulate

ROOT = Path(__file__).resolve().parents[2]
FULL_SIZE = {
    "SIMLA": "Pretrain --config configs/Pretrain/simla.yaml",
    "CL2L R50": "main --config configs/main/cc12m_r50_cl2l.yaml",
    "ALIGN B7": "main --config configs/main/align_coyo700m.yaml",
    "ViT-L/16 384": "Classification --config configs/Classification/vit_l16_i1k_downstream.yaml",
    "NXTP": "Recognition --config configs/Recognition/g3m.yaml",
}
SMALL = {  # stand-ins for a run without a GPU
    "CL2L debug": "main --config configs/main/debug.yaml",
    "ViT debug": "Classification --config configs/Classification/debug.yaml",
}
MEMORY_ERROR = 0.1  # relative, of the predicted peak of all tensors


@dataclass(frozen=True)
class Measured:
    """One recipe, eager or compiled; seconds a step, bytes at the peak (0 on a CPU)."""

    name: str
    mode: str
    seconds: float
    bound: float
    peak: int
    planned_peak: int
    mfu: float

    def row(self) -> str:
        cells = [
            self.name,
            self.mode,
            f"{self.seconds * 1e3:.1f}",
            f"{self.bound * 1e3:.1f}",
            f"{self.seconds / self.bound:.2f}",
            f"{self.peak / 1e9:.1f}" if self.peak else "–",
            f"{self.planned_peak / 1e9:.1f}",
            f"{self.mfu:.0%}",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| recipe | mode | ms a step | bound, ms | ratio | peak, GB | planned, GB | MFU |\n"
    "|---|---|---|---|---|---|---|---|"
)


def card_of(device: torch.device) -> Gpu:
    """The card's figures; the H100's where the table has none, or for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return gpu_by_device_name(name) or GPUS["h100"]


@dataclass(frozen=True)
class Plan:
    """What plan.py says of a recipe on a card: seconds a step at the least, bytes at the peak."""

    eager: float
    compiled: float
    peak: int
    flops: float


def recipes_for(device: torch.device) -> dict[str, str]:
    """The full-size recipes, on a CPU small ones."""
    return FULL_SIZE if device.type == "cuda" else SMALL


def modes_for(device: torch.device) -> tuple[str, ...]:
    """How recipes can run. Compiled code is measured on a GPU alone, by default or in another of
    `compile_mode`."""
    return ("eager", "compiled", *COMPILE_MODES[1:]) if device.type == "cuda" else ("eager",)


def start_plans(pool: Executor, device: torch.device, names: Sequence[str]) -> dict[str, Future]:
    """Plan the recipes in processes of the pool."""
    gpu, recipes = card_of(device), recipes_for(device)
    return {name: pool.submit(plan, recipes[name], gpu) for name in names}


def plan(command: str, gpu: Gpu) -> Plan:
    """A recipe on one card, in bf16."""
    script, *argv = command.split()
    module = load_script(script)
    trace = simulate(module, read_config(module, argv)).trace
    bound = b.bounds(trace, gpu, "bf16", 1, 50e9)
    return Plan(bound.eager, bound.compiled, trace.peak, trace.flops)


def measure(
    name: str, command: str, mode: str, device: torch.device, plan: Plan, turn: Path, after: Path
) -> tuple[Report, list[Measured]]:
    """A recipe in bf16 (mode: see modes_for); beside `turn`, where the time of its step is spent.

    The network is drawn while others have the GPU; it is ours once the file `after` is there, and
    `turn` gives it to the next.
    """
    report, found = Report(), []

    def work() -> float:
        features = {"compile": mode != "eager"}
        if mode in COMPILE_MODES:
            features["compile_mode"] = mode
        run = Run(command, device, "bf16", move=False, **features)
        while not after.exists():
            time.sleep(0.05)
        run.move()
        measured = measure_steps(name, mode, run, device, plan)
        found.append(measured)
        report.note(measured.row())
        if device.type == "cuda":
            write_profile(run, turn.with_name(f"{Path(command).stem}.{mode}.txt"))
        return 0.0

    try:
        with random_batches():
            report.attempt(f"{name}, {mode}", work)
        gc.collect()
        torch.cuda.empty_cache()
    finally:
        turn.touch()
    return report, found


def measure_steps(name: str, mode: str, run: Run, device: torch.device, plan: Plan) -> Measured:
    """Steps after the first ones: on a GPU ten, else two."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        run.step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(run.step, device, 10 if on_gpu else 2)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    least = plan.eager if mode == "eager" else plan.compiled
    mfu = plan.flops / seconds / card_of(device).half
    return Measured(name, mode, seconds, least, peak, plan.peak, mfu)


def write_profile(run: Run, path: Path) -> None:
    """The kernels and operations that take most of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run.step()
        torch.cuda.synchronize()
    averages = found.key_averages()
    table = averages.table(sort_by="self_cuda_time_total", row_limit=50, max_name_column_width=90)
    path.write_text(table)


def timed(work: Callable, device: torch.device, times: int) -> float:
    """Mean seconds of `work()`, the GPU's included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def measure_recipes(
    report, device: torch.device, names: Sequence[str], plans: dict[str, Future], options
) -> list[Measured]:
    """Every recipe in each mode, one after the other; memory must be what plan.py predicts."""
    found: list[Measured] = []
    if device.type != "cuda":
        report.note("bounds and constants below are an H100's: a CPU shows that the measures run")
    report.note(HEAD)
    turns = options.out.parent / "turns"
    shutil.rmtree(turns, ignore_errors=True)
    turns.mkdir()
    after = turns
    with workers(options.jobs) as pool:
        work = []
        for mode, name in itertools.product(options.modes, names):
            command, turn = recipes_for(device)[name], turns / f"{name.replace('/', '-')}.{mode}"
            plan = plans[name].result()
            work.append(pool.submit(measure, name, command, mode, device, plan, turn, after))
            after = turn
        for done in as_completed(work):
            lines, measured = done.result()
            report.take(lines)
            found += measured
    for m in found:
        if m.peak and m.mode == "eager":
            error = abs(m.peak / m.planned_peak - 1)
            report.check(f"{m.name}: memory as planned", lambda error=error: error, MEMORY_ERROR)
    return found


def fit_constants(report, device: torch.device, measured: list[Measured]) -> list[str]:
    """Lines that name what plan.py assumes and what this device attains."""
    gpu, on_gpu = card_of(device), device.type == "cuda"
    size, values = (8192, 2**29) if on_gpu else (512, 2**22)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.zeros(values, dtype=torch.bfloat16, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)
    for work in (lambda: x @ x, lambda: target.copy_(source), lambda: one.add_(1)):
        timed(work, device, 3)  # warm
    compute = 2 * size**3 / timed(lambda: x @ x, device, 20) / gpu.half
    bandwidth = 4 * values / timed(lambda: target.copy_(source), device, 20) / gpu.bandwidth
    launch = timed(lambda: one.add_(1), device, 5000)
    lines = [
        f"attained  {gpu.attained:.2f} in plan.py, {compute:.2g} measured",
        f"BANDWIDTH {b.BANDWIDTH:.2f} in plan.py, {bandwidth:.2g} measured",
        f"LAUNCH    {b.LAUNCH * 1e6:.1f} us in plan.py, {launch * 1e6:.1f} us measured",
    ]
    if measured:
        ratio = statistics.median(m.seconds / m.bound for m in measured)
        lines.append(f"steps take {ratio:.2f} times their bounds (median)")
    for line in lines:
        report.note(line)
    return lines


def write_section(device: torch.device, measured: list[Measured], lines: list[str]) -> None:
    """The measurements as a section of docs/BENCHMARKS.md."""
    from benchmarks.table import with_section

    page = ROOT / "docs/BENCHMARKS.md"
    title = f"Recipes on one {torch.cuda.get_device_name(device)}, bf16"
    rows = "\n".join(m.row() for m in measured)
    body = f"{HEAD}\n{rows}\n\n" + "\n".join(f"- {line}" for line in lines)
    body += f"\n\ntorch {torch.__version__}. Bounds and planned memory: scripts/plan.py.\n\n"
    page.write_text(with_section(page.read_text(), title, body + "    bash scripts/gpu_check.sh"))
