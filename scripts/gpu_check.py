"""Check every method on a GPU against the CPU and against plan.py: see scripts/gpu_check.sh."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FULL_SIZE = {
    "SIMLA": "Pretrain --config configs/Pretrain/simla.yaml",
    "CL2L R50": "main --config configs/main/cc12m_r50_cl2l.yaml",
    "ALIGN B7": "main --config configs/main/align_coyo700m.yaml",
    "ViT-L/16 384": "Classification --config configs/Classification/vit_l16_i1k_downstream.yaml",
    "NXTP": "Recognition --config configs/Recognition/g3m.yaml",
}
TOLERANCE = {"fp32": 2e-3, "bf16": 6e-2}  # relative, of losses and gradient norms


@contextlib.contextmanager
def without_randomness() -> Iterator[None]:
    """No dropout, fixed images and the likeliest negatives: equal on every device."""
    import torch
    import torch.nn.functional as F

    from scripts.planning import steps

    attention = F.scaled_dot_product_attention

    def certain(query, key, value, attn_mask=None, dropout_p=0.0, **options):
        return attention(query, key, value, attn_mask, 0.0, **options)

    def seeded(*shape):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    with (
        mock.patch.object(F, "dropout", lambda x, *args, **kwargs: x),
        mock.patch.object(F, "scaled_dot_product_attention", certain),
        mock.patch.object(torch.Tensor, "exponential_", lambda x, *args: x.fill_(1.0)),
        mock.patch.object(torch, "rand", lambda *s, **o: torch.full(s, 0.5, **o)),
        mock.patch.object(steps, "pixels", seeded),
        mock.patch.object(steps, "images", lambda *s: seeded(*s) / 128.0 - 1.0),
    ):
        yield


class Run:
    """A method's model, optimizer and step on a device."""

    def __init__(self, command: str, device, precision: str, **features):
        import torch

        from base.distributed import World
        from runtime.optim.build import Precision, build_optimizer
        from runtime.parallel import Features, parallelize
        from scripts.planning.simulate import load_script
        from scripts.planning.steps import setup_of

        name, *argv = command.split()
        script = load_script(name)
        self.config = read_plain(script, argv)
        self.config.precision = precision
        torch.manual_seed(0)
        self.setup = setup_of(script, self.config)
        for network in self.setup.frozen:
            network.to(device)
        world = World(0, 1, 0, device)
        self.model = parallelize(self.setup.model, world, Features(**features)).train()
        self.optimizer = build_optimizer(self.model, self.config.optimizer, self.setup.decayed)
        self.precision = Precision(precision, device, self.config.optimizer.clip_grad_norm)

    def step(self) -> dict:
        return self.setup.step(self.model, self.optimizer, self.precision)

    def losses(self) -> dict[str, float]:
        """Losses and gradient norms of two steps."""
        found = {}
        for number in range(2):
            for name, value in self.step().items():
                if name.startswith("loss") or name.endswith(("_loss", "grad_norm")):
                    found[f"{name} {number}"] = float(value)
        return found


def read_plain(script, argv: list[str]):
    """The recipe with its features off: every check turns on its own."""
    from scripts.planning.simulate import read_config

    config = read_config(script, argv)
    config.activation_checkpointing, config.parallel = False, "ddp"
    return config


def difference(a: dict[str, float], b: dict[str, float]) -> float:
    """Largest relative difference of figures of one name."""
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-2) for name in b)


def first_losses(figures: dict[str, float]) -> dict[str, float]:
    """The losses before any update."""
    return {n: v for n, v in figures.items() if n.endswith(" 0") and "grad_norm" not in n}


class Report:
    """Lines of the checks so far."""

    def __init__(self):
        self.lines: list[str] = []
        self.failed = 0

    def check(self, title: str, work, limit: float) -> None:
        """work() gives a difference, which must not exceed the limit."""
        try:
            value = work()
            passed = value <= limit
            text = f"{value:.2g} (limit {limit:g})"
        except Exception as error:
            passed, text = False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        self.failed += not passed
        self.note(f"{'pass' if passed else 'FAIL'}  {title:<44} {text}")

    def note(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def check_method(report: Report, name: str, command: str, device) -> None:
    """One method: device against CPU, then each feature against the plain step."""
    import torch

    with without_randomness():
        expected = Run(command, torch.device("cpu"), "fp32").losses()
        for precision, limit in TOLERANCE.items():

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
        check_on_cuda(report, name, command, device, expected)


def check_on_cuda(report: Report, name: str, command: str, device, expected: dict) -> None:
    """What needs a GPU: compiled code and host waits."""
    import torch

    def compiled() -> float:
        with without_randomness():
            return difference(Run(command, device, "fp32", compile=True).losses(), expected)

    def waits() -> float:
        run = Run(command, device, "bf16")
        run.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return 0.0

    report.check(f"{name}: compiled as eager", compiled, TOLERANCE["fp32"])
    report.check(f"{name}: no host wait in bf16", waits, 0.0)


def check_sharding(report: Report, command: str, device) -> None:
    """FSDP2 in a group of one process, as plain."""
    import torch.distributed as dist

    def sharded() -> float:
        with without_randomness():
            expected = Run(command, device, "fp32").losses()
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                return difference(Run(command, device, "fp32", parallel="fsdp").losses(), expected)
            finally:
                dist.destroy_process_group()

    report.check("FSDP2 on one process as plain", sharded, TOLERANCE["fp32"])


def measure(report: Report, name: str, command: str, device, steps: int = 10) -> None:
    """Step time, memory and MFU of a full-size recipe in bf16, eager and compiled, and its bounds."""
    import torch

    from runtime.gpus import GPUS, gpu_by_device_name
    from runtime.simulate import bounds as b
    from scripts.planning.simulate import load_script, read_config, simulate

    script, *argv = command.split()
    module = load_script(script)
    trace = simulate(module, read_config(module, argv)).trace
    gpu = gpu_by_device_name(torch.cuda.get_device_name(device)) or GPUS["h100"]
    bound = b.bounds(trace, gpu, "bf16", 1, 50e9)
    for compile in (False, True):
        run = Run(command, device, "bf16", compile=compile)
        for _ in range(3):
            run.step()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            run.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / steps
        peak, least = torch.cuda.max_memory_allocated(), bound.compiled if compile else bound.eager
        report.note(
            f"      {name:<14} {'compiled' if compile else 'eager':<9} {seconds * 1e3:8.1f} ms "
            f"(bound {least * 1e3:.1f}), {peak / 1e9:5.1f} GB (plan {trace.peak / 1e9:.1f}), "
            f"MFU {trace.flops / seconds / gpu.half:.0%}"
        )
        del run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--only", help="methods, joined by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "output/gpu_check.md")
    options = parser.parse_args()
    os.chdir(ROOT)
    import torch

    from scripts.planning.methods import STEPS

    if not options.cpu and not torch.cuda.is_available():
        print("error: no GPU is visible; --cpu runs the checks that need none", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    report = Report()
    report.note(f"torch {torch.__version__} on {device}")
    names = options.only.split(",") if options.only else list(STEPS)
    for name in names:
        check_method(report, name, STEPS[name], device)
    check_sharding(report, STEPS["ve"], device)
    if not options.cpu:
        for name, command in FULL_SIZE.items():
            measure(report, name, command, device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("# GPU check\n\n```\n" + "\n".join(report.lines) + "\n```\n")
    print(f"{report.failed} failed; {options.out}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
