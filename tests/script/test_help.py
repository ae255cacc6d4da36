"""`--help` of every script and benchmark: a page, no warning, and no library that it does not need."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# of the CPU time that PyTorch's own import takes, for a script of the repository's root
SHARE = 0.3
HEAVY = {
    "fairscale",
    "ftfy",
    "nltk",
    "PIL.Image",
    "sentencepiece",
    "sklearn",
    "sympy",
    "textaugment",
    "textblob",
    "timm",
    "torchvision",
    "transformers",
    "webdataset",
}


def commands() -> list[str]:
    """All that a user starts: scripts by path, those in packages and benchmarks by module."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")]
    files = [path for path in files if not path.is_symlink()]  # scripts' old names
    started = [path.relative_to(ROOT) for path in files if '"__main__"' in path.read_text()]
    modules = re.findall(r"python -m (benchmarks\.\w+)", (ROOT / "docs/BENCHMARKS.md").read_text())
    names = set(modules)
    for path in started:
        in_package = (ROOT / path).with_name("__init__.py").is_file()
        names.add(".".join(path.with_suffix("").parts) if in_package else str(path))
    return sorted(names)


def fault_of(name: str, page: dict, found: dict) -> str | None:
    """What is wrong with a page, if anything."""
    if page["status"] != 0:
        return f"exit status {page['status']}: {page['err'][-500:]}"
    if "--" not in page["out"]:
        return f"names no option: {page['out'][:200]!r}"
    if page["err"]:
        return f"writes to stderr: {page['err'][:500]}"
    if "/" in name or not name.endswith(".py"):
        return None
    heavy = HEAVY.intersection(page["modules"]).difference(found["checkpointing"])
    if heavy:
        return f"imports {', '.join(sorted(heavy))}"
    # a busy or slow machine takes longer for both; with PyTorch's 2.3 s the page stays below 3 s
    share = page["seconds"] / found["seconds"]
    return f"takes {share:.2f} of the time of `import torch`" if share > SHARE else None


def test_every_help_page():
    names = commands()
    assert len(names) > 30 and {"main.py", "scripts/plan.py", "benchmarks.vit"} <= set(names)
    command = [sys.executable, "-m", "tests.helpers.help_pages", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "", "importing PyTorch warns"
    found = json.loads(done.stdout)
    faults = {
        name: fault
        for name, page in found["pages"].items()
        if (fault := fault_of(name, page, found))
    }
    assert not faults, "\n".join(f"{name} --help {fault}" for name, fault in faults.items())
