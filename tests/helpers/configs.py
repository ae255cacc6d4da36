"""Configurations of the tests."""

from pathlib import Path
from typing import TypeVar

from runtime.config.cli import parse

C = TypeVar("C")


NEEDED = {"Classification": ["--train_data", "photos"]}  # options without which a script refuses


def load(cls: type[C], path: str | Path, *flags: str) -> C:
    """The configuration that a YAML file holds; what it does not name keeps its default."""
    return parse(cls, ["--config", str(path), *flags])
