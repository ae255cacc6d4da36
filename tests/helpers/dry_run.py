"""Scripts of scripts/*.sh without the work."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def dry_run(folder: Path, script: str, *options: str, **variables: str):
    """scripts/`script` where python and torchrun only write down what they were called with.

    Returns the finished process and the calls, a line each; PYTHONDONTWRITEBYTECODE, where they
    see it, ends a line.
    """
    (folder / "scripts").mkdir(exist_ok=True)
    for name in (script, "setup.sh"):
        shutil.copyfile(ROOT / "scripts" / name, folder / "scripts" / name)
    (folder / "requirements.txt").write_text("torch\n")
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/.installed-requirements.txt").write_text("torch\n" * 2)
    (folder / "calls").write_text("")
    for name in ("python", "torchrun"):
        program = folder / ".venv/bin" / name
        call = f'printf " %q" {name} "$@"; echo "${{PYTHONDONTWRITEBYTECODE:+ PYTHONDONTWRITEBYTECODE}}"'
        program.write_text(f'#!/bin/bash\n{{ {call}; }} >> "{folder}/calls"\n')
        program.chmod(0o755)
    (folder / "stamps.deb").write_text("")
    environment = os.environ | {"STAMPS": str(folder / "stamps.deb")} | variables
    command = ["bash", f"scripts/{script}", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done, (folder / "calls").read_text()
