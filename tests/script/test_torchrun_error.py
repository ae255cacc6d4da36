"""Under torchrun a mistake is said twice: in one line by the script, and at the end of torchrun's
report of the failed process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_torchruns_report_ends_with_the_sentence():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *torchrun,
        "Pretrain.py",
        "--config",
        "configs/Pretrain/debug.yaml",
        "--queu_size",
        "3",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sentence = "error: --queu_size: unknown key; did you mean --queue-size?"
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if sentence in line]
    assert lines[0] == sentence
    assert lines[-1].strip() == f"traceback : {sentence}"
    assert len(lines) == 2
