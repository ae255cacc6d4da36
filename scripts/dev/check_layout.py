"""The rules of the repository's layout, measured: short scripts, short functions, imports that run
one way, no circle.

    python scripts/dev/check_layout.py

A top-level script has at most 250 lines and shares less than 35 % of them with any other (the
training loop is theirs together). A function has at most 80 lines; those above 60 are listed.
Imports run from scripts to evaluation, runtime, dataset and models, and from these to base; inside
models from weights to the families to layers, and no family imports another. No two files import
each other, directly or by a detour, and nobody calls globals().
"""

import argparse
import ast
import difflib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_SCRIPT_LINES, MAX_FUNCTION_LINES, AIM_FUNCTION_LINES, MAX_SHARED = 250, 80, 60, 0.35
MAY_IMPORT = {
    "base": {"base"},
    "models": {"models", "base"},
    "dataset": {"dataset", "base"},
    "runtime": {"runtime", "base"},
    "evaluation": {"evaluation", "runtime", "base"},
}
FLOORS = {
    "layers": 0,
    "fusion": 1,
    "dual_encoder": 1,
    "classification": 1,
    "recognition": 1,
    "weights": 2,
}
FOLDERS = [*MAY_IMPORT, "benchmarks", "scripts"]


def code_lines(path: Path) -> list[str]:
    """Lines that count for the comparison: without blanks and comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def shared_fraction(a: list[str], b: list[str]) -> float:
    """Fraction of the shorter file's lines that stand in the same order in the other."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, min(len(a), len(b)))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all absolute imports; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def check_imports(name: Path, modules: list[str], ours: set[str]) -> Iterator[str]:
    """Imports of one file that run the wrong way."""
    folder = name.parts[0]
    for module in modules:
        first, *rest = module.split(".")
        if len(name.parts) > 1 and folder in MAY_IMPORT and first in ours - MAY_IMPORT[folder]:
            yield f"{name} imports {module}"
        inside = folder == "models" and first == "models" and len(name.parts) > 2 and rest
        if not inside or not {name.parts[1], rest[0]} <= set(FLOORS):
            continue
        if name.parts[1] != rest[0] and FLOORS[rest[0]] >= FLOORS[name.parts[1]]:
            yield f"{name} imports {module}: weights -> families -> layers"


def check_functions(name: Path, tree: ast.AST) -> tuple[list[str], list[str]]:
    """Broken rules and remarks about the functions of one file."""
    broken = []
    remarks = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > AIM_FUNCTION_LINES:
                line = f"{name}: {node.name} has {length} lines"
                (broken if length > MAX_FUNCTION_LINES else remarks).append(line)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "globals":
            broken.append(f"{name}:{node.lineno} calls globals()")
    return broken, remarks


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Import circles, each as one line."""
    found = []
    done = set()
    path = []

    def visit(module: str) -> None:
        if module in path:
            found.append("circle: " + " -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                visit(other)
            path.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)
    return found


def check_scripts(scripts: list[Path]) -> list[str]:
    """Broken rules of the top-level scripts: length, and lines they share."""
    broken = []
    for path in scripts:
        count = len(path.read_text().splitlines())
        print(f"{path.name:<22} {count:>4} lines")
        if count > MAX_SCRIPT_LINES:
            broken.append(f"{path.name} has {count} lines")
    for a, b in itertools.combinations(scripts, 2):
        fraction = shared_fraction(code_lines(a), code_lines(b))
        if fraction > MAX_SHARED:
            broken.append(f"{a.name} and {b.name} share {fraction:.0%} of their lines")
    return broken


def main() -> int:
    scripts = sorted(path for path in ROOT.glob("*.py") if not path.is_symlink())
    files = scripts + [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = {path: path.relative_to(ROOT) for path in files}
    modules = {".".join(name.with_suffix("").parts): path for path, name in names.items()}
    ours = {*FOLDERS, "tests", *(path.stem for path in scripts)}
    broken = check_scripts(scripts)
    remarks = []
    graph = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        imports = list(dict.fromkeys(imported_modules(tree)))
        graph[module] = {other for other in imports if other in modules and other != module}
        broken += check_imports(names[path], imports, ours)
        more_broken, more_remarks = check_functions(names[path], tree)
        broken += more_broken
        remarks += more_remarks
    broken += circles(graph)
    print(*(f"remark: {line}" for line in remarks), sep="\n")
    print(*(f"BROKEN: {line}" for line in dict.fromkeys(broken)), sep="\n")
    return bool(broken)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
