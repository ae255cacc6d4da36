"""Runs of main.py with configs/main/debug.yaml on a handful of images, as one would start them by
hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *flags]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, (
        f"exit status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    )
    return done.stdout + done.stderr


def lines(folder: Path) -> list[dict]:
    """The lines of log.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found]
