"""What can be said of a script's options on a login node, before its job waits in a queue."""

import sys
from collections.abc import Sequence
from pathlib import Path

from base.libraries import of_library
from base.text import as_list
from runtime.builtin_data import names_digitscenes
from runtime.config.cli import read_words
from runtime.config.draft import Draft, flag
from runtime.own_tokenizers import TRAINED

WRITTEN = ("output_dir", "scratch", "cache", "code_cache", "results")
RANDOM = "random"  # weights of an image tokenizer
LISTS = ("metadata", "train_data", "train_file", "val_data")  # texts, not paths: addresses, too


def check_ahead(cls: type, words: Sequence[str]) -> None:
    """Raise UserError for options that a script with the configuration `cls` would refuse; note on
    stderr which of its files are not here, which the machine it will run on may have."""
    draft = read_words(cls, words)
    config = draft.finish()
    evaluates = getattr(config, "evaluate", False)
    if hasattr(config, "check") and not evaluates:  # then options of the checkpoint count, too
        config.check()
    if missing := missing_files(draft, evaluates):
        print(f"note: not on this machine: {', '.join(missing)}", file=sys.stderr)


def missing_files(draft: Draft, evaluates: bool) -> list[str]:
    """`--train-file data/a.json` for every file and folder that is to be read and is not here."""
    missing = []
    for name in draft.set_by:
        unread = name in WRITTEN or (evaluates and name.startswith("train"))
        unread = unread or (name == "metadata" and draft.values["dataset"] == "wds")
        for value in [] if unread else as_list(draft.values[name]):
            is_path = isinstance(value, Path) or (name in LISTS and bool(Path(value or "").suffix))
            if is_path and not (is_no_path(str(value)) or Path(value).expanduser().exists()):
                missing.append(f"{flag(name)} {value}")
    return missing


def is_no_path(value: str) -> bool:
    """Whether a value names something else: a library's network, an address or pattern of files,
    columns of a table, or what a script makes when it is missing."""
    made = value in (TRAINED, RANDOM) or names_digitscenes(value)
    return made or of_library(value) or any(mark in value for mark in ("://", "---", *"*?[{"))
