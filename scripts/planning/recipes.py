"""Plan every recipe that trains on one GPU: a table, and exit code 1 where one fails.

python -m scripts.planning.recipes                       # all, in about ten minutes of one CPU core
python -m scripts.planning.recipes configs/main --gpu a100
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError, first_line
from runtime.advice import ends_with_advice
from runtime.gpus import Gpu, parse_gpu
from scripts.planning.report import Request, figures
from scripts.planning.simulate import load_script, read_config, simulate
from scripts.planning.steps import ROOT, SETUPS

HEAD = "| recipe | batch | eager, ms | compiled, ms | peak, GB | of the card | host waits | CPU s |"


def recipes(folders: list[Path]) -> list[Path]:
    """The YAML files in these folders whose folder is named after a script that trains."""
    found = {path for folder in folders for path in folder.rglob("*.yaml")}
    return sorted(path for path in found if path.parent.name in SETUPS)


def row(recipe: Path, gpu: Gpu) -> str:
    """A recipe's line of the table; raises what its simulation raises."""
    started = time.process_time()
    script = load_script(recipe.parent.name)
    config = read_config(script, ["--config", str(recipe)])
    f = figures(simulate(script, config), Request(gpu, 1, 50e9, None, None))
    memory, seconds = f["memory"], f["seconds"]
    waits = sum(wait["times"] for wait in f["host_waits"])
    cells = [
        f"{recipe.parent.name}/{recipe.name}",
        str(f["global_batch"]),
        f"{seconds['eager'] * 1e3:,.1f}",
        f"{seconds['fused'] * 1e3:,.1f}",
        f"{memory['peak'] / 1e9:.2f}",
        f"{memory['fraction']:.0%}" + " does not fit" * (not memory["fits"]),
        str(waits),
        f"{time.process_time() - started:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def lines(folders: list[Path], gpu: Gpu) -> Iterator[tuple[bool, str]]:
    """(whether it is planned, its line) of every recipe."""
    for recipe in recipes(folders):
        try:
            yield True, row(recipe, gpu)
        except Exception as error:
            name = f"{recipe.parent.name}/{recipe.name}"
            yield False, f"| {name} | FAILED: {type(error).__name__}: {first_line(error)} |"


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="of recipes (configs)")
    parser.add_argument("--gpu", default="h100", help="as of plan.py (%(default)s)")
    options = parser.parse_args(argv)
    folders = [folder.resolve() for folder in options.folders] or [ROOT / "configs"]
    os.chdir(ROOT)  # recipes name files of the repository
    gpu = parse_gpu(options.gpu)
    if not recipes(folders):
        names = ", ".join(map(str, folders))
        raise UserError(f"no recipe of a script that trains in {names}")
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n", flush=True)
    failed = 0
    for planned, line in lines(folders, gpu):
        failed += not planned
        print(line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake tensors now and then abort the interpreter's own way out
