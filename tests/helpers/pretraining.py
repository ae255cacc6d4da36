"""Runs of Pretrain.py with configs/Pretrain/debug.yaml on a handful of images, as one would start
them by hand."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import Run, run_script
from tests.helpers.runs import words_of

ROOT = Path(__file__).resolve().parents[2]


def arguments(data: Path, tokenizer: Path, output: Path, **changes) -> list[str]:
    """Command-line flags of the debug run on `data`."""
    values = {
        "config": ROOT / "configs/Pretrain/debug.yaml",
        "bert_config": ROOT / "configs/bert_debug.json",
        "train_file": data / "pretrain_train.json",
        "image_root": data,
        "text_encoder": data / "tokenizer",
        "image_tokenizer_path": tokenizer,
        "output_dir": output,
        "tensorboard": "false",
        "save_every": "100 steps",  # and at the end: a checkpoint takes as long as a step or two
    } | changes
    return words_of(values)


def start(processes: int, flags: list[str]) -> Run | subprocess.Popen:
    """The run under way; several processes are those of a real torchrun."""
    if processes == 1:
        return Run("Pretrain.py", flags)
    logs = Path(flags[flags.index("--output_dir") + 1]).with_name("torchrun")  # which it may leave
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher.append(f"--log-dir={logs}")
    command = [sys.executable, *launcher, str(ROOT / "Pretrain.py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def finish(processes: int, flags: list[str], expect: int = 0) -> str:
    """Run to the end; the output, after checking the exit status."""
    return run_script("Pretrain.py", flags, processes, expect)
