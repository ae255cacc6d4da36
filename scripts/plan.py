"""What a recipe will need and cost on GPUs that are not here: memory, time, traffic, data, money.

    python scripts/plan.py Pretrain.py --config configs/Pretrain/simla.yaml --gpus 64 --gpu h100
    python scripts/plan.py main.py --config configs/main/cc12m_r50_cl2l.yaml --search
    python scripts/plan.py Recognition.py --config … --gpu 312,2.0,80 --json

Runs the recipe's own model, wrappers, optimizer and training step on fake tensors: no GPU, no data
and no weights are needed, and nothing is computed. Flags that plan.py does not know go to the
recipe, such as --batch_size 128. Times are lower bounds; docs/PLAN.md says how to read them.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.advice import ends_with_advice

ROOT = Path(__file__).resolve().parents[1]
GPUS = 1 << 17  # at most: the simulated group lists its ranks


def arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """plan.py's own options, and those of the recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("script", help="training script, such as Pretrain.py")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs (%(default)s)")
    parser.add_argument(
        "--gpu", default="h100", help="h100, h200, a100, …, or TFLOPS,TB/S,GB (%(default)s)"
    )
    parser.add_argument(
        "--network", type=float, default=400.0, help="Gbit/s of a GPU between nodes (%(default)s)"
    )
    parser.add_argument("--samples", type=float, help="samples of the training set, such as 4.1e6")
    parser.add_argument("--price", type=float, help="price of a GPU-hour")
    parser.add_argument(
        "--search", action="store_true", help="find the batch size and features that are fastest"
    )
    parser.add_argument(
        "--no-graphs", action="store_true", help="leave out graph breaks and recompilations"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_known_args(argv)


def in_full(word: str) -> str:
    """A word of the command line, with the full path where it names a file of the caller's folder."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    named = Path(value)
    return f"{flag}{equals}{named.resolve()}" if named.suffix and named.is_file() else word


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    options, recipe = arguments(argv)
    recipe = [in_full(word) for word in recipe]
    os.chdir(ROOT)  # recipes name files of the repository
    with contextlib.redirect_stdout(sys.stderr):  # what the recipe itself says at its start
        found = plan(options, recipe)
    print(found)
    return 0


def plan(options: argparse.Namespace, recipe: list[str]) -> str:
    """The text to print. Raises UserError for an unknown card, script or option."""
    from base.errors import UserError
    from runtime.gpus import parse_gpu
    from scripts.planning.graphs import capture
    from scripts.planning.report import Request, figures, text
    from scripts.planning.search import search
    from scripts.planning.simulate import load_script, read_config, simulate

    if not 1 <= options.gpus <= GPUS:
        raise UserError(f"--gpus {options.gpus}: give 1 or more, at most {GPUS:,}")
    for name in ("network", "samples", "price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: give a finite number above 0")
    network = options.network * 1e9 / 8
    gpu = parse_gpu(options.gpu)
    request = Request(gpu, options.gpus, network, options.price, options.samples)
    script = load_script(options.script)
    if options.search:
        found = search(script, recipe, request)
        return json.dumps(found.figures(), indent=2) if options.json else found.text()
    config = read_config(script, recipe)
    result = figures(simulate(script, config, options.gpus), request)
    if not options.no_graphs:
        result["graphs"] = vars(capture(script, read_config(script, recipe)))
    return json.dumps(result, indent=2) if options.json else text(result, options.price)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake tensors now and then abort the interpreter's own way out
