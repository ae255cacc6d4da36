"""Where a process is among its collectives: torch's flight recorder, and beside it a record of our
own for backends that a version of torch does not record (gloo before torch 2.8).

Looking waits for nothing: neither for the device nor for other processes.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ENTRIES = 2000  # collectives that torch's recorder keeps, some hundred bytes each
FOLDER = "flight_recorder"  # below the output folder; `torchfrtrace FOLDER` reads it


@dataclass(frozen=True)
class LastCollective:
    """A collective that this process waits in, or has entered last.

    number: of those that the process has entered; place: among those of its group, which is alike
    on all its processes.
    """

    name: str = "none"
    number: int = 0
    place: str = ""
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.place}".strip()


@dataclass
class Own:
    """The record of base/distributed.py's own collectives."""

    name: str = "none"
    number: int = 0
    waits: bool = False


OWN = Own()


def record_in(output_folder: str | Path) -> None:
    """Turn torch's recorder on and let it write there when NCCL gives up. To call before the process
    group is made; what the user has set stays."""
    prefix = str(Path(output_folder).absolute() / FOLDER / "rank_")
    set_default = os.environ.setdefault
    set_default("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    size = set_default("TORCH_FR_BUFFER_SIZE", str(ENTRIES))
    prefix = set_default("TORCH_FR_DUMP_TEMP_FILE", prefix)
    major, minor = version("torch").split(".")[:2]
    if (int(major), int(minor)) < (2, 8):  # the names until then; later versions warn of them
        set_default("TORCH_NCCL_TRACE_BUFFER_SIZE", size)
        set_default("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix)


class entering:
    """Around a collective of our own. A class, for torch 2.6 breaks graphs at every context manager
    that a generator makes."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        import torch  # by name alone: --help imports this module, and not torch

        if torch.compiler.is_compiling():  # a count would be a new graph at every step
            return
        OWN.name = self.name
        OWN.waits = True
        OWN.number += 1

    def __exit__(self, error: type | None, *_) -> None:
        import torch

        if error is None and not torch.compiler.is_compiling():  # else it is in there still
            OWN.waits = False


def last_collective() -> LastCollective:
    """The first collective that is not finished, else the last one."""
    recorded = _recorded()
    if not recorded:
        return LastCollective(OWN.name, OWN.number, str(OWN.number), OWN.waits)
    waiting = [entry for entry in recorded if not _is_finished(entry)]
    entry = waiting[0] if waiting else recorded[-1]
    name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    place = str(entry["collective_seq_id"])
    group = entry["process_group"][-1]
    if group not in ("default_pg", "undefined", ""):
        place += f" of {group}"
    return LastCollective(name, entry["record_id"] + 1, place, bool(waiting))


def _is_finished(entry: dict) -> bool:
    return entry["state"] == "completed" or entry.get("retired", False)


def _recorded() -> list[dict]:
    """What torch has recorded, oldest first; nothing where it does not record."""
    dump = _torch_function("_dump_fr_trace_json", "_dump_nccl_trace_json")
    if dump is None:
        return []
    try:
        return json.loads(dump(True, False)).get("entries", [])
    except (RuntimeError, ValueError):
        return []


def write_record(output_folder: str | Path, rank: int) -> None:
    """Torch's record of this process, for `torchfrtrace`, which compares those of all."""
    dump = _torch_function("_dump_fr_trace", "_dump_nccl_trace")
    if dump is None:
        return
    path = Path(output_folder) / FOLDER / f"rank_{rank}"
    with contextlib.suppress(OSError, RuntimeError):  # the process is about to end anyway
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump())


def _torch_function(*names: str):
    """The first of these functions that this version of torch has."""
    from torch._C import _distributed_c10d

    found = (getattr(_distributed_c10d, name, None) for name in names)
    return next(filter(None, found), None)
