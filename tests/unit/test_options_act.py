"""Every option of every script acts: some module that the script imports reads it from the
configuration. What is accepted without effect stands in runtime/config/old_names.py, and is said.
Every number is finite, and has limits."""

import ast
import functools
import importlib
from pathlib import Path

import pytest

from base.knobs import about
from runtime.config.schema import Schema
from runtime.config.values import Option

ROOT = Path(__file__).resolve().parents[2]
# what modules call a configuration, or the part of it that they are given
SIGNED = {"seed", "seeds", "mean", "head_bias", "length_penalty"}  # may be negative
CALLED = {"config", "data", "decoding", "features", "knobs", "network", "options", "schedule"}


def scripts() -> list[str]:
    """Module names of the scripts that have options."""
    files = sorted([*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")])
    found = [file for file in files if "run_script(main, Config" in file.read_text()]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in found]


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def imports(file: Path) -> frozenset[Path]:
    """Files of this repository that a file imports, at its head or inside of functions."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = [ROOT / name.replace(".", "/") for name in names]
    return frozenset(path.with_suffix(".py") for path in paths if path.with_suffix(".py").is_file())


def reached(file: Path) -> set[Path]:
    """The file and all that it imports, directly or not."""
    found = {file}
    waiting = [file]
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def last_name(node: ast.AST) -> str:
    """`config` of `config` and of `run.config`."""
    return getattr(node, "attr", getattr(node, "id", ""))


@functools.cache
def reads(file: Path) -> frozenset[tuple[str, str, str]]:
    """(class around it, object, attribute) of every attribute that a file reads by its name."""
    found = set()

    def visit(node: ast.AST, around: str) -> None:
        if isinstance(node, ast.ClassDef):
            around = node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((around, last_name(node.value), node.attr))
        if isinstance(node, ast.Call) and last_name(node.func) == "getattr":
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant):
                found.add((around, last_name(owner), name.value))
        for child in ast.iter_child_nodes(node):
            visit(child, around)

    visit(parsed(file), "")
    return frozenset(found)


def without_effect(script: str, config_class: type) -> list[str]:
    """Options that no module which the script reaches reads."""
    schema = Schema(config_class)
    classes = {each.__name__ for cls in schema.sections.values() for each in cls.__mro__}
    sections = {path.rpartition(".")[2] for path in schema.sections}
    read = set()
    for file in reached(ROOT / f"{script.replace('.', '/')}.py"):
        for around, owner, name in reads(file):
            if owner in CALLED | sections or (owner == "self" and around in classes):
                read.add(name)
    return [path for path in schema.knobs if path.rpartition(".")[2] not in read]


@pytest.mark.parametrize("script", scripts())
def test_every_option_acts(script):
    assert without_effect(script, importlib.import_module(script).Config) == []


def accepted(option: Option, value: str) -> bool:
    """Whether an option takes a number, in each place where it holds several."""
    try:
        option.read([value] * (option.length or 1) if option.many else value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("script", scripts())
def test_every_number_has_limits(script):
    numbers = {
        path: option
        for path, option in Schema(importlib.import_module(script).Config).knobs.items()
        if option.kind in (int, float) and not option.choices
    }
    for path, option in numbers.items():
        signed = path.rpartition(".")[2] in SIGNED
        refused = ["inf", "-inf", "nan", "1e400"] if signed else ["inf", "-1e-9", "nan", "1e400"]
        assert not [text for text in refused if accepted(option, text)], path
        huge = accepted(option, "9" * 40)
        assert not huge or option.kind is float, path


@pytest.mark.parametrize("script", scripts())
def test_an_option_that_a_script_states_again_keeps_its_limits(script):
    *inner, config_class = importlib.import_module(script).Config.__mro__[-2::-1]
    for ancestor in inner:
        for name, stated in getattr(ancestor, "__dataclass_fields__", {}).items():
            before, now = about(stated), about(config_class.__dataclass_fields__[name])
            assert before.low is None or now.low >= before.low, name
            assert before.high is None or now.high <= before.high, name


def test_an_option_that_nothing_reads_is_found():
    from dataclasses import dataclass

    import VE
    from base.knobs import knob

    @dataclass
    class Config(VE.Config):
        forgotten: int = knob(1, "nothing reads it")
        eos: str = knob("[SEP]", "another object has an attribute of this name")

    assert without_effect("VE", Config) == ["forgotten", "eos"]
