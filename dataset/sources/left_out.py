"""Entries of a list that cannot be used: left out within a budget, counted and named."""

import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from base.distributed import rank
from base.errors import UserError
from base.reading import read_json
from base.writing import write_json

BUDGET = 0.01  # fraction of a list's entries that may be unusable
LISTED = 3  # of them that are named
HOPELESS = 1000  # a list that begins with so many is of another kind: not read to its end


class LeftOut:
    """The unusable entries of one list. `total` counts all entries, whoever reads them; UserError
    where too many are unusable."""

    def __init__(self, name: str | Path):
        self.name = str(name)
        self.total = 0
        self.count = 0
        self.first: list[str] = []

    @property
    def names_more(self) -> bool:
        """Whether the next fault will be shown, so that it is worth being located."""
        return len(self.first) < LISTED

    def add(self, fault: str) -> None:
        """Leave an entry out. fault: where it stands, what is wrong, and what to do about it."""
        self.count += 1
        if self.names_more:
            self.first.append(fault)
        if self.count == self.total == HOPELESS:
            self.check()

    def check(self) -> None:
        """UserError where more is left out than the budget allows."""
        if self.count <= BUDGET * self.total:
            return
        most = f"{self.count:,} of {self.total:,} entries are unusable, more than {BUDGET:.0%}"
        raise UserError(self.first[0] + (f" ({most})" if self.count > 1 else ""))

    def keep(self, cached: Path) -> None:
        """Note what was left out beside the file that was made of the list. UserError as `check`."""
        self.check()
        if self.count:
            about = {"name": self.name, "total": self.total, "count": self.count}
            write_json(_beside(cached), {**about, "first": self.first})

    def kept_behind(self, rows: Iterable[dict], cached: Path) -> Iterator[dict]:
        """The rows that `cached` is being made of, then `keep`: the note is there before the file, so
        that a kill in between hides nothing."""
        yield from rows
        self.keep(cached)


def refuse_left_out(cached: Path) -> None:
    """UserError where something was left out of the list that a file was made of."""
    if has_left_out(cached):
        raise UserError(f"{_noted(cached).first[0]}; an evaluation needs every entry of its list")


def report_left_out(cached: Path) -> None:
    """Say, once a run, what `keep` has noted beside a file."""
    is_worker = multiprocessing.parent_process() is not None
    if rank() != 0 or is_worker or cached in _SAID or not has_left_out(cached):
        return
    _SAID.add(cached)
    try:
        found = _noted(cached)
        listed = "\n  ".join(found.first)
        counts = f"{found.count:,} of {found.total:,}"
        text = f"{found.name}: {counts} entries are unusable and left out:\n  {listed}"
    except UserError as error:
        text = str(error)
    print(text, file=sys.stderr, flush=True)


def has_left_out(cached: Path) -> bool:
    """Whether something was left out of the list that a file was made of."""
    return _beside(cached).is_file()


_SAID: set[Path] = set()


def _noted(cached: Path) -> LeftOut:
    """What `keep` has noted beside a file. UserError where the note is damaged."""
    try:
        about = read_json(_beside(cached), dict)
        found = LeftOut(about["name"])
        found.total = int(about["total"])
        found.count = int(about["count"])
        found.first = [str(fault) for fault in about["first"]]
        if not found.first:
            raise ValueError("no fault is named")
    except (UserError, LookupError, TypeError, ValueError):
        damaged = f"{_beside(cached)}: damaged; delete {cached} and it, both are made again"
        raise UserError(damaged) from None
    return found


def _beside(cached: Path) -> Path:
    return cached.with_suffix(".left_out.json")
