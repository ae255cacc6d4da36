"""Pretrain.py on a node that dies while a checkpoint is written: `dying_trainer STEP FLAGS`.

Rank 1 is killed when it is about to give its part of the checkpoint of STEP its name.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    dies_at = f"{int(sys.argv.pop(1)):08d}"
    replace = os.replace

    def replace_or_die(source, target) -> None:
        own_part = Path(target).name == "rank_00001.pt" and dies_at in str(target)
        if own_part and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    sys.argv[0] = str(ROOT / "Pretrain.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
