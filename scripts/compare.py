"""One page that compares the runs below a folder: scores, curves in one chart, options that differ.

    python scripts/compare.py output
    python scripts/compare.py output/main output/mine --page comparison.html

Every folder with a config.yaml counts, trainings under way included; the page stands in the first
folder (index.html) and links the report of each run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import UserError
from base.writing import write_text
from evaluation.report.runs import find_runs, runs_page
from runtime.config.cli import knob, run_script


@dataclass
class Config:
    """What to compare."""

    POSITIONAL: ClassVar = "folders"

    folders: list[Path] = knob([Path("output")], "folders that runs are looked for in")
    page: Path | None = knob(None, "the HTML page; none = index.html in the first folder")


def main(config: Config) -> None:
    root = config.folders[0]
    runs = []
    for folder in config.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name the output_dir of a run, or one above")
        runs += find_runs(folder)
    target = config.page or root / "index.html"
    title = "Runs in " + ", ".join(map(str, config.folders))
    write_text(target, runs_page(runs, target.parent, title))
    print(f"{len(runs)} runs compared: {target}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
