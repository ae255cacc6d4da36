"""`--help` of many scripts for the price of one import of PyTorch:

    python -m tests.helpers.help_pages main.py scripts/plan.py benchmarks.vit

Each is started as `python SCRIPT --help` or `python -m MODULE --help` would start it, in a fork of
this process, which has imported PyTorch and nothing else. Prints JSON: `seconds` of CPU time that
the import of PyTorch took, by name the page's `status`, `out`, `err`, `seconds` and `modules`
(all that were imported when it ended), and what torch.utils.checkpoint imports: in torch 2.6 sympy.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  (the pages' scripts need it)


def help_page(name: str) -> dict:
    """Run `name --help` in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        out, err, modules = (Path(folder, part) for part in ("out", "err", "modules"))
        process = os.fork()
        if process == 0:
            run_and_leave(name, out, err, modules)
        _, status, usage = os.wait4(process, 0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "out": out.read_text(),
            "err": err.read_text(),
            "seconds": usage.ru_utime + usage.ru_stime,
            "modules": modules.read_text().split(),
        }


def run_and_leave(name: str, out: Path, err: Path, modules: Path) -> None:
    """In the fork; never returns."""
    os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY), 2)
    status = 1
    try:
        sys.argv = [name, "--help"]
        if name.endswith(".py"):
            sys.path[0] = str(Path(name).parent)
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as left:
        status = left.code or 0 if not isinstance(left.code, str) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        modules.write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    pages = {name: help_page(name) for name in sys.argv[1:]}
    found = {"seconds": time.process_time(), "pages": pages}
    importlib.import_module("torch.utils.checkpoint")
    print(json.dumps(found | {"checkpointing": list(sys.modules)}))
