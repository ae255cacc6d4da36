"""Check every method on a GPU against the CPU and against plan.py: see scripts/gpu_check.sh."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Report:
    """Lines of the checks so far."""

    def __init__(self):
        self.lines: list[str] = []
        self.failed = 0

    def check(self, title: str, work: Callable[[], float], limit: float) -> None:
        """work() gives a difference, which must not exceed the limit."""
        try:
            value = work()
            passed = value <= limit
            text = f"{value:.2g} (limit {limit:g})"
        except Exception as error:
            passed, text = False, f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        self.failed += not passed
        self.note(f"{'pass' if passed else 'FAIL'}  {title:<44} {text[:160]}")

    def note(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def run_checks(report: Report, names: list[str], device) -> None:
    """Numbers: every method, sharding, resuming."""
    from scripts.gpu_checks.checks import check_method, check_resume, check_sharding
    from scripts.planning.methods import STEPS

    for name in names:
        check_method(report, name, STEPS[name], device)
    check_sharding(report, STEPS["ve"], device)
    check_resume(report, device)


def run_measures(report: Report, device, peers: dict[str, Path], python: str | None) -> None:
    """Times and memory; sections of docs/BENCHMARKS.md are written on a GPU alone."""
    from scripts.gpu_checks import measures
    from scripts.gpu_checks.peers import run_peers

    measured = measures.measure_recipes(report, device)
    lines = measures.fit_constants(report, device, measured)
    run_peers(report, device, peers, python)
    if device.type == "cuda":
        measures.write_section(device, measured, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--only", help="methods, joined by commas")
    parser.add_argument("--part", choices=("all", "checks", "measures"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "output/gpu_check.md")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="checkout of an original to measure beside ours: simla, albef, clip-rocket, "
        "coyo-align, coyo-vit or nxtp; may be given several times",
    )
    parser.add_argument("--peer-python", help="interpreter with TensorFlow, for the two of COYO")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    from base.errors import UserError
    from scripts.gpu_checks.peers import parse_peers

    try:
        peers = parse_peers(options.peer, options.peer_python)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    import torch

    from scripts.planning.methods import STEPS

    if not options.cpu and not torch.cuda.is_available():
        print("error: no GPU is visible; --cpu runs the checks that need none", file=sys.stderr)
        return 2
    names = options.only.split(",") if options.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        print(f"error: --only {unknown[0]}: the methods are {', '.join(STEPS)}", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    report = Report()
    report.note(f"torch {torch.__version__} on {device}")
    if options.part != "measures":
        run_checks(report, names, device)
    if options.part != "checks":
        run_measures(report, device, peers, options.peer_python)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("# GPU check\n\n```\n" + "\n".join(report.lines) + "\n```\n")
    print(f"{report.failed} failed; {options.out}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake tensors now and then abort the interpreter's own way out
