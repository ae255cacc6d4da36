"""Runs of Recognition.py with configs/Recognition/debug.yaml on a handful of images, as one would
start them."""

import contextlib
import json
from pathlib import Path

import Recognition
from runtime.config.cli import parse
from tests.helpers.processes import run_script
from tests.helpers.runs import words_of

ROOT = Path(__file__).resolve().parents[2]


def arguments(data: Path, output: Path, *more, **changes) -> list[str]:
    """Command-line flags of the debug run on DigitScenes in `data`."""
    values = {
        "config": ROOT / "configs/Recognition/debug.yaml",
        "train_list": data / "nxtp/train.jsonl",
        "val": data / "nxtp/val.list",
        "test": data / "nxtp/test.list",
        "image_root": data,
        "tokenizer": data / "nxtp/tokenizer.model",
        "output_dir": output,
        "device": "cpu",
        "save_every": "100 steps",  # and at the end: a checkpoint takes as long as a step or two
    } | changes
    return [*map(str, more), *words_of(values)]


def finish(processes: int, flags: list[str], expect: int = 0) -> str:
    """Run Recognition.py to the end; its output, after checking the exit status."""
    return run_script("Recognition.py", flags, processes, expect)


def start(flags: list[str]) -> dict:
    """The same in this process; the metrics ({} where it makes none)."""
    config = parse(Recognition.Config, flags)
    with contextlib.suppress(SystemExit):  # of --max_steps
        Recognition.main(config)
    metrics = Path(config.output_dir) / "result/metrics.json"
    return json.loads(metrics.read_text()) if metrics.exists() else {}
