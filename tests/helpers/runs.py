"""The flags that start a script, and what its run logs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMING = {"images_per_s", "step_s", "data_wait", "memory_gb"}


def words_of(values: Mapping[str, Any]) -> list[str]:
    """A command line: --name value ..., several values of a list."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def log_lines(folder: Path) -> list[dict]:
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_timing(lines: list[dict]) -> list[dict]:
    """Lines of log.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def lines(folder: Path) -> list[dict]:
    """The lines of log.jsonl without what depends on the clock."""
    return without_timing(log_lines(folder))
