"""Whole runs of every script on a device, by command: small recipes on DigitScenes."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from runtime.builtin_data import make_digitscenes

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/digitscenes"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
SECONDS = 400  # for one command; compiled code takes a minute or two
SHARDED = "--parallel fsdp --checkpoint_format sharded --async_save true"
TRAINING = {  # folder of the run: script and options
    "pretrain": "Pretrain.py --config configs/Pretrain/debug.yaml",
    "pretrain_fsdp": f"Pretrain.py --config configs/Pretrain/debug.yaml {SHARDED}",
    "pretrain_compiled": "Pretrain.py --config configs/Pretrain/debug.yaml --compile true",
    "retrieval": "Retrieval.py --config configs/Retrieval/debug.yaml",
    "vqa": "VQA.py --config configs/VQA/debug.yaml",
    "ve": "VE.py --config configs/VE/debug.yaml --activation_checkpointing true",
    "nlvr": "NLVR.py --config configs/NLVR/debug.yaml",
    "text_assignment": "NLVR.py --config configs/NLVR/debug_assignment.yaml",
    "grounding": "Grounding.py --config configs/Grounding/debug.yaml",
    "cl2l": "main.py --config configs/main/debug.yaml",
    "cl2l_compiled": "main.py --config configs/main/debug.yaml --compile true --image_size 32",
    "barlip": "main.py --config configs/main/debug.yaml --model CL2L_VITT8_BARLIP",
    "align": "main.py --config configs/main/debug_align.yaml",
    "clip_muon": "main.py --config configs/main/debug.yaml --model CLIP_VITT8_CLIP --opt muon",
    "vit": "Classification.py --config configs/Classification/debug.yaml --deterministic true",
    "vit_fsdp": f"Classification.py --config configs/Classification/debug.yaml {SHARDED} "
    "--offload true --profile 2 --ema_decay 0",
    "nxtp": "Recognition.py --config configs/Recognition/debug.yaml",
    "nxtp_fsdp": f"Recognition.py --config configs/Recognition/debug.yaml {SHARDED}",
}
GRAPHS = {  # those of compiled code that CUDA graphs replay: on a GPU alone
    f"{name}_graphs": f"{command} --compile true --compile_mode reduce-overhead"
    for name, command in {
        "pretrain": TRAINING["pretrain"],
        "retrieval": TRAINING["retrieval"],
        "ve": TRAINING["ve"],
        "cl2l": f"{TRAINING['cl2l']} --image_size 32",
        "vit": TRAINING["vit"],
        "nxtp": TRAINING["nxtp"],
    }.items()
}
EVALUATIONS = {  # of a run above
    "zeroshot": "eval_zeroshot.py --config configs/eval_zeroshot/debug.yaml --checkpoint {runs}/cl2l "
    "--output_dir {out}",
    "knn": "eval_knn.py --config configs/eval_knn/debug.yaml --checkpoint {runs}/vit "
    "--output_dir {out}",
    "embeddings": "scripts/embed.py --checkpoint {runs}/cl2l --out {out} --workers 0 "
    f"--data {DATA}/pretrain_val.json --root {DATA}",
}


def check_scripts(
    report, device: torch.device, names: Sequence[str], jobs: int, folder: Path
) -> None:
    """Those of the runs: every script trains, saves, resumes and evaluates; each command in a process of its own."""
    make_digitscenes(DATA)
    shutil.rmtree(folder, ignore_errors=True)
    precision = "bf16" if device.type == "cuda" else "fp32"
    words = f"--device {device.type} --precision {precision}"
    training = TRAINING | (GRAPHS if device.type == "cuda" else {})
    with ThreadPoolExecutor(jobs) as pool:
        trained = {
            pool.submit(train_and_resume, f"{command} {words}", folder / name): name
            for name, command in training.items()
            if name in names
        }
        _note(report, trained)
        evaluated = {
            pool.submit(evaluate, f"{command} {words}".format(runs=folder, out=folder / name)): name
            for name, command in EVALUATIONS.items()
            if name in names
        }
        _note(report, evaluated)


def _note(report, futures: dict) -> None:
    """A check for each command, as they end."""
    for done in as_completed(futures):
        report.check(f"{futures[done]}: whole run", done.result, 0.0)


def train_and_resume(command: str, folder: Path) -> float:
    """The run to step 4, then to its end from the checkpoint; raises RuntimeError where a loss is
    not finite or a step is missing."""
    words = [*LAUNCHER, *command.split(), "--output_dir", str(folder)]
    run_to_end([*words, "--max_steps", "4"])
    run_to_end(words)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    if not losses or max(losses) < 5 or not all(map(math.isfinite, losses.values())):
        raise RuntimeError(f"losses by step: {losses}")
    return 0.0


def evaluate(command: str) -> float:
    """An evaluation to its end."""
    run_to_end([*LAUNCHER, *command.split()])
    return 0.0


def run_to_end(words: list[str]) -> None:
    """Raises RuntimeError with the end of the command's output where it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        output = (done.stdout + done.stderr)[-6000:]
        raise RuntimeError(f"{' '.join(words[1:])} ended with {done.returncode}\n{output}")
