"""Runs of main.py with configs/main/debug.yaml on a handful of images, as one would start them by
hand."""

import json
from pathlib import Path

from tests.helpers.processes import run_script

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"images_per_s", "step_s", "data_wait", "memory_gb"}


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
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [str(flag) for flag in more]
    for name, value in values.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def finish(processes: int, flags: list[str], expect: int = 0) -> str:
    """Run main.py to the end; the output, after checking the exit status."""
    return run_script("main.py", flags, processes, expect)


def lines(folder: Path) -> list[dict]:
    """The lines of log.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found]
