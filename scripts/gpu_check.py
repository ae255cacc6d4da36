"""Check every method on a GPU against the CPU and against plan.py: see scripts/gpu_check.sh."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.advice import ends_with_advice

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("checks", "scripts", "measures")


def run_measures(report, device, recipes: list[str], plans: dict, options) -> None:
    """Times and memory; sections of docs/BENCHMARKS.md are written on a GPU alone."""
    from scripts.gpu_checks import measures
    from scripts.gpu_checks.peers import run_peers

    measured = measures.measure_recipes(report, device, recipes, plans, options)
    lines = measures.fit_constants(report, device, measured)
    if device.type == "cuda":
        measures.write_section(device, measured, lines)
    if not options.no_peers:
        run_peers(report, device, options.peers, options.peer_python)


def run_parts(report, device, recipes: list[str], options) -> None:
    """What was asked for. Plans of the recipes are made meanwhile, in processes of their own: they
    need no GPU."""
    from scripts.gpu_checks import checks, measures, whole_runs
    from scripts.gpu_checks.workers import workers

    parts = PARTS if options.part == "all" else options.part.split(",")
    with workers(options.jobs) as pool:
        plans = measures.start_plans(pool, device, recipes) if "measures" in parts else {}
        if "checks" in parts:
            checks.check_methods(report, pool, options.only, options.compiled, device)
            checks.check_sharding(report, device)
            checks.check_resume(report, device)
        if "scripts" in parts:
            folder = options.out.parent / "runs"
            whole_runs.check_scripts(report, device, options.only, options.jobs, folder)
        if "measures" in parts:
            run_measures(report, device, recipes, plans, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--only", help="methods and whole runs, joined by commas")
    parser.add_argument("--compiled", help="methods to check compiled, too, joined by commas")
    parser.add_argument("--recipes", help="recipes to measure, joined by commas")
    parser.add_argument(
        "--modes",
        help="how to measure them: eager,compiled (the default), blocks, reduce-overhead, max-autotune",
    )
    parser.add_argument(
        "--part", default="all", help=f"all, or some of {', '.join(PARTS)}, joined by commas"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(8, (os.cpu_count() or 1) // 2)),
        help="processes that check at once (%(default)s); measures run one at a time",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "output/gpu_check/report.md")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="checkout of an original to measure beside ours: simla, albef, clip-rocket, "
        "coyo-align, coyo-vit or nxtp; may be given several times",
    )
    parser.add_argument("--peer-python", help="interpreter with TensorFlow, for the two of COYO")
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    return parser.parse_args()


def chosen(flag: str, given: str | None, known) -> list[str]:
    """The names that an option lists, or all. Raises UserError for an unknown one."""
    from base.errors import UserError

    names = given.split(",") if given else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag} {unknown[0]}: known are {', '.join(known)}")
    return names


@ends_with_advice
def main() -> int:
    options = arguments()
    from base.errors import UserError
    from scripts.gpu_checks.peers import parse_peers
    from scripts.gpu_checks.report import Report

    os.chdir(ROOT)
    import torch

    from scripts.gpu_checks import checks, measures, whole_runs
    from scripts.planning.methods import STEPS

    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    options.peers = parse_peers(options.peer, options.peer_python)
    chosen("--part", None if options.part == "all" else options.part, PARTS)
    usual = {**STEPS, **whole_runs.TRAINING, **whole_runs.EVALUATIONS}
    options.only = chosen("--only", options.only or ",".join(usual), {**usual, **whole_runs.GRAPHS})
    options.compiled = chosen("--compiled", options.compiled, checks.COMPILED)
    modes = measures.modes_for(device)
    options.modes = chosen("--modes", options.modes or ",".join(modes[:2]), modes)
    recipes = chosen("--recipes", options.recipes, measures.recipes_for(device))
    if not options.cpu and not torch.cuda.is_available():
        raise UserError("no GPU is visible; --cpu runs the checks that need none")
    options.out = options.out.absolute()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    report.note(f"torch {torch.__version__} on {device}, {options.jobs} checks at once")
    run_parts(report, device, recipes, options)
    print(f"{report.failed} failed; {options.out}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake tensors now and then abort the interpreter's own way out
