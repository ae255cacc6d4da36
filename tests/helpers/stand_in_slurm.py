"""Stand-ins for Slurm's programs, in front of those on PATH."""

import os
import shlex
from pathlib import Path


def stand_in_slurm(folder: Path, monkeypatch) -> Path:
    """The folder that sbatch keeps batch files in, as 1.sh, 2.sh …, numbering the jobs 101, 102 …;
    what its file `running` holds, squeue says of a job."""
    folder.mkdir()
    keep = f'n=$(ls {folder} | grep -c "[0-9].sh$"); n=$((n + 1)); cp "$1" {folder}/$n.sh'
    programs = {
        "sbatch": f"{keep}; echo Submitted batch job $((100 + n))",
        "srun": "",
        "squeue": f'[ "$2" != -j ] || cat {folder}/running 2>/dev/null',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def lines(file: Path) -> tuple[set[str], list[str]]:
    """Options of sbatch in a batch file, and the words of its srun."""
    text = file.read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in text if line.startswith("#SBATCH")}
    return options, shlex.split(next(line for line in text if line.startswith("srun ")))
