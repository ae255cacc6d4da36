"""Step times of ours beside open_clip's and the originals', in the same run: the benchmarks of this repository."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ORIGINALS = {  # name in --peer: benchmark and its options
    "simla": "benchmarks.pretrain --system simla --batch 64",
    "albef": "benchmarks.pretrain --system albef --batch 64",
    "clip-rocket": "benchmarks.dual --batch 64",
    "coyo-align": "benchmarks.align --batch 64",
    "coyo-vit": "benchmarks.vit --batch 64",
    "nxtp": "benchmarks.recognition --cases train",
}
TENSORFLOW = ("coyo-align", "coyo-vit")
ON_A_GPU = "--repeats 2 --warmup 3 --steps 10"
ON_A_CPU = "--repeats 1 --warmup 0 --steps 1"


def parse_peers(given: Sequence[str], python: str | None) -> dict[str, Path]:
    """Checkouts by name, from NAME=PATH each. Raises UserError for an unknown name, a path that is
    no folder, or TensorFlow's originals without an interpreter."""
    found = {}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in ORIGINALS:
            names = ", ".join(ORIGINALS)
            raise UserError(f"--peer {entry}: give NAME=PATH, where NAME is one of {names}")
        if not Path(path).is_dir():
            raise UserError(f"--peer {entry}: no such folder; PATH is a checkout of {name}")
        if name in TENSORFLOW and python is None:
            raise UserError(f"--peer {name}: it needs --peer-python, one with TensorFlow")
        found[name] = Path(path).resolve()
    return found


def run_peers(report, device: torch.device, peers: dict[str, Path], python: str | None) -> None:
    """open_clip where it is installed, and every original of which there is a checkout; of the
    others a line says why they are left out."""
    beside_open_clip(report, device)
    for name, words in ORIGINALS.items():
        title = f"{name}'s step beside ours"
        if name not in peers:
            report.note(f"skip  {title:<44} no --peer {name}=PATH")
            continue
        command = [*words.split(), "--peer", str(peers[name])]
        if name in TENSORFLOW:
            command += ["--peer-python", python]
        elif device.type == "cuda" and name != "nxtp":
            command += ["--compile", "true"]
        if device.type != "cuda":
            command += ["--report", ""]  # the page has figures of quiet machines
            if "--batch" in command:
                command[command.index("--batch") + 1] = "2"
            if name == "coyo-align":  # a ghost batch is no larger than the batch
                command += ["--virtual_batch", "2"]
        report.check(title, lambda command=command: run(report, device, command), 0.0)


def beside_open_clip(report, device: torch.device) -> None:
    """CLIP ViT-B/16, ours and open_clip's in turn."""
    title = "CLIP ViT-B/16 beside open_clip"
    if importlib.util.find_spec("open_clip") is None:
        report.note(f"skip  {title:<44} open_clip_torch is not installed")
        return
    size = "--batch 128 --compile true" if device.type == "cuda" else "--batch 2 --tiny"
    command = ["benchmarks.dual", "--tokens", "77", *size.split()]
    report.check(title, lambda: run(report, device, command), 0.0)


def run(report, device: torch.device, command: list[str]) -> float:
    """Note the table that a benchmark prints. On a GPU it also becomes a section of
    docs/BENCHMARKS.md. Raises RuntimeError with the last line of one that fails."""
    size = ON_A_GPU if device.type == "cuda" else ON_A_CPU
    words = [*command, "--busy", "--device", device.type, "--precision", "bf16", *size.split()]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    report.note(done.stdout.strip())
    return 0.0
