"""docs/ARCHITECTURE.md against the source: its files exist, and each route to a loss is walked. Every
training script has the same loop."""

import ast
import importlib
import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/ARCHITECTURE.md").read_text()
MOST = 5  # functions from the script to the arithmetic
NETWORKS = {"model", "student", "network"}  # what a training step calls its wrapped network
SYSTEMS = """SIMLA ALBEF Retrieval VQA VE NLVR Grounding CLIP CL2L SiamLIP BYOLIP BarLIP SwALIP
    SwALIPV1 SLIP SimCLR SigLIP ALIGN COYO-ViT NXTP""".split()


@dataclass(frozen=True)
class Step:
    """A function of a route: `name`, or `Class.name`, in a file."""

    file: str
    function: str

    @property
    def owner(self) -> str | None:
        return self.function.rpartition(".")[0] or None

    @property
    def name(self) -> str:
        return self.function.rpartition(".")[2]


def routes() -> list[tuple[str, list[Step]]]:
    """(system and loss, functions) of every row of the table."""
    found = []
    for line in PAGE.splitlines():
        if "→" not in line:
            continue
        system, loss, route = (cell.strip() for cell in line.strip("|").split("|"))
        steps, file = [], None
        for entry in route.split("→"):
            named, _, function = entry.strip().strip("`").rpartition(": ")
            file = named or file
            steps.append(Step(file, function))
        found.append((f"{system}: {loss}", steps))
    return found


ROUTES = routes()


@cache
def definition(step: Step) -> ast.FunctionDef | None:
    """The function in the syntax tree of its file."""
    scope = ast.parse((ROOT / step.file).read_text()).body
    if step.owner:
        classes = [n for n in scope if isinstance(n, ast.ClassDef) and n.name == step.owner]
        scope = classes[0].body if classes else []
    return next((n for n in scope if isinstance(n, ast.FunctionDef) and n.name == step.name), None)


def calls(caller: ast.FunctionDef, called: Step) -> bool:
    """Whether the body calls something of that name, or the network where that is its forward."""
    wanted = NETWORKS if called.name == "forward" else {called.name}
    for node in ast.walk(caller):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else None
            name = function.id if isinstance(function, ast.Name) else name
            if name in wanted:
                return True
    return False


@pytest.mark.parametrize("title, steps", ROUTES, ids=[title for title, _ in ROUTES])
def test_a_route_is_walked(title, steps):
    assert 2 <= len(steps) <= MOST
    for step in steps:
        assert (ROOT / step.file).is_file(), step.file
        assert definition(step) is not None, f"{step.file} has no {step.function}"
    for caller, called in itertools.pairwise(steps):
        assert calls(definition(caller), called), f"{caller.function} does not call {called}"
    methods = [step for step in steps if step.owner]
    for one, next_one in itertools.pairwise(methods):  # a method calls its own object's
        first, second = (getattr(imported(step), step.owner) for step in (one, next_one))
        assert issubclass(second, first) or issubclass(first, second), (one, next_one)


def imported(step: Step):
    return importlib.import_module(step.file.removesuffix(".py").replace("/", "."))


def test_every_system_has_a_route():
    named = {word for title, _ in ROUTES for word in title.partition(":")[0].split(", ")}
    assert set(SYSTEMS) <= named


def test_a_broken_route_is_noticed():
    assert definition(Step("main.py", "no_such_function")) is None
    assert not calls(definition(Step("main.py", "total_loss")), Step("main.py", "train_step"))


def test_every_file_that_is_named_exists():
    named = re.findall(r"`([\w./*]+(?:/|\.py))(?:: [\w.]+)?`", PAGE)
    assert len(named) > 30
    for path in named:
        assert list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), path


# the loop of every training script, and what comes before it where a run was killed in a
# validation; between these lines stands what is the script's own
LOOP = """
if run.validation_due(run.step):
run.keep_best(..., run.step)
set_learning_rate(optimizer, plan.lr(step))
losses = train_step(model, ...)
grad_norm = precision.step(optimizer, model.parameters())
run.log_step(step + 1, **losses, grad_norm=grad_norm)
if run.validation_due(step + 1):
run.keep_best(..., step + 1)
run.save_if_due(step + 1)
run.leave_if_interrupted(step + 1)
""".strip().splitlines()
TRAINING = sorted(p.name for p in ROOT.glob("*.py") if "def train_step(" in p.read_text())


def loop_lines(script: str) -> list[str]:
    """Statements of the training loop as `LOOP` writes them."""
    text = (ROOT / script).read_text().replace("start.precision", "precision")
    head = r"\n    for step in range\(run\.step, plan\.total\):\n"
    [(before, loop)] = re.findall(
        rf"\n(    if run\.validation_due\(run.*?)?{head}(.*?)\n    \S", text, re.S
    )
    lines = ast.unparse(ast.parse(f"if True:\n{before}\n{loop}")).splitlines()
    lines = [re.sub(r"train_step\(model, .*\)", "train_step(model, ...)", line) for line in lines]
    return [re.sub(r"keep_best\(.*, ", "keep_best(..., ", line).strip() for line in lines]


@pytest.mark.parametrize("script", TRAINING)
def test_every_training_script_has_the_same_loop(script):
    expected = LOOP
    if script == "Pretrain.py":  # it validates nothing
        expected = [line for line in LOOP if "validation" not in line and "best" not in line]
    assert [line for line in loop_lines(script) if line in LOOP] == expected


def test_every_training_script_is_looked_at():
    assert len(TRAINING) == 9
