"""Runs of main.py with configs/main/debug.yaml on a handful of images, as one would start them by
hand."""

from pathlib import Path

from tests.helpers.processes import run_script
from tests.helpers.runs import words_of

ROOT = Path(__file__).resolve().parents[2]


def arguments(data: Path, output: Path, *more, **changes) -> list[str]:
    """Command-line flags of the debug run on DigitScenes in `data`."""
    values = {
        "config": ROOT / "configs/main/debug.yaml",
        "metadata": data / "cc3m.npy",
        "root": data,
        "bpe-path": data / "bpe/bpe_merges.txt.gz",
        "val-folder": data / "imagefolder/val",
        "labels": data / "labels.json",
        "templates": data / "templates.json",
        "output-dir": output,
        "tensorboard": "false",
        "save-every": "100 steps",  # and at the end: a checkpoint takes as long as a step or two
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [*map(str, more), *words_of(values)]


def finish(processes: int, flags: list[str], expect: int = 0) -> str:
    """Run main.py to the end; the output, after checking the exit status."""
    return run_script("main.py", flags, processes, expect)
