"""The rules of the house, measured: short scripts that do not repeat each other, imports that run one way.

    python scripts/dev/check_layout.py

A top-level script has at most 250 lines and shares less than 30 % of them with any other; a function has at most 80
lines (60 is the aim: longer ones are listed); models/, dataset/, runtime/ and evaluation/ import only what
docs/ARCHITECTURE.md allows; nobody calls globals().
"""

import ast
import difflib
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_SCRIPT_LINES, MAX_FUNCTION_LINES, AIM_FUNCTION_LINES, MAX_SHARED = 250, 80, 60, 0.30
MAY_IMPORT = {
    "models": {"models"},
    "dataset": {"dataset"},
    "runtime": {"runtime"},
    "evaluation": {"evaluation", "runtime"},
}


def code_lines(path: Path) -> list[str]:
    """Lines that count for the comparison: without blanks and comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def shared_part(a: list[str], b: list[str]) -> float:
    """Share of the shorter file's lines that stand in the same order in the other."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, min(len(a), len(b)))


def imported_packages(tree: ast.AST):
    """First components of all absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def check_file(path: Path, scripts: set[str]) -> tuple[list[str], list[str]]:
    """Broken rules and remarks of one file."""
    name, tree = path.relative_to(ROOT), ast.parse(path.read_text())
    broken, remarks = [], []
    allowed = MAY_IMPORT.get(name.parts[0]) if len(name.parts) > 1 else None
    if allowed is not None:
        ours = set(MAY_IMPORT) | scripts | {"scripts", "tests"}
        wrong = set(imported_packages(tree)) & ours - allowed
        broken += [f"{name} imports {package}" for package in sorted(wrong)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > AIM_FUNCTION_LINES:
                (broken if length > MAX_FUNCTION_LINES else remarks).append(f"{name}: {node.name} has {length} lines")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "globals":
            broken.append(f"{name}:{node.lineno} calls globals()")
    return broken, remarks


def main() -> int:
    scripts = sorted(ROOT.glob("*.py"))
    broken, remarks = [], []
    for path in scripts:
        count = len(path.read_text().splitlines())
        if count > MAX_SCRIPT_LINES:
            broken.append(f"{path.name} has {count} lines")
        print(f"{path.name:<22} {count:>4} lines")
    for a, b in itertools.combinations(scripts, 2):
        share = shared_part(code_lines(a), code_lines(b))
        if share >= MAX_SHARED:
            broken.append(f"{a.name} and {b.name} share {share:.0%} of their lines")
    names = {path.stem for path in scripts}
    folders = [*MAY_IMPORT, "scripts"]
    for path in scripts + [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]:
        more_broken, more_remarks = check_file(path, names)
        broken, remarks = broken + more_broken, remarks + more_remarks
    print(*(f"remark: {line}" for line in remarks), *(f"BROKEN: {line}" for line in broken), sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
