"""YAML files of a configuration: read with limits and lines, written with comments."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from base.errors import UserError, brief
from base.knobs import about
from base.limits import NESTED_LEVELS, YAML_BYTES, YAML_VALUES
from base.reading import read_text
from base.writing import write_text


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Any]:
    """The mapping that a YAML file holds, and its node tree. UserError."""
    text = read_text(path, limit=YAML_BYTES)
    try:
        values, node = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected lines of key: value, got {brief(values)}")
    return dict(values or {}), node


def parse_yaml(text: str) -> tuple[Any, Any]:
    """YAML 1.2 (1e-4 is a number, `no` is text) as plain values, and the node tree with lines.

    Raises ValueError, its message starting with the line, where it is not YAML, a key stands twice,
    it nests deeper than NESTED_LEVELS or holds more than YAML_VALUES values, aliases written out.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with warnings.catch_warnings():  # a file that says %YAML 1.1 has 1e-4 as text: so be it
            warnings.simplefilter("ignore")
            yaml = YAML(typ="safe", pure=True)
            yaml.Composer = _bounded(yaml.Composer)
            node = yaml.compose(text)
            if _size(node, 0, {}) > YAML_VALUES:
                raise ValueError(f"its aliases stand for more than {YAML_VALUES:,} values")
            return None if node is None else yaml.constructor.construct_document(node), node
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f"line {mark.line + 1}: " if mark else ""
        problem = str(getattr(error, "problem", error)).replace("\n", " ")
        raise ValueError(line + problem[:200]) from None
    except RecursionError:
        raise ValueError(f"nested deeper than {NESTED_LEVELS} levels") from None


def _bounded(composer: type) -> type:
    """ruamel's composer, which ends at YAML_VALUES nodes: each takes 0.1 ms and a kilobyte."""

    class Bounded(composer):
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes += 1
            if self.nodes > YAML_VALUES:
                raise ValueError(f"more than {YAML_VALUES:,} values")
            return super().compose_node(parent, index)

    return Bounded


def _size(node: Any, depth: int, sizes: dict[int, int]) -> int:
    """Values that a node stands for, its aliases written out. `sizes`: of the nodes seen so far."""
    if depth > NESTED_LEVELS:
        raise ValueError(f"nested deeper than {NESTED_LEVELS} levels")
    if id(node) not in sizes:
        children = []
        if isinstance(getattr(node, "value", None), list):
            for each in node.value:
                children += each if isinstance(each, tuple) else [each]  # a key and its value
        sizes[id(node)] = 1 + sum(_size(child, depth + 1, sizes) for child in children)
    return sizes[id(node)]


def line_of(node: Any, key: str) -> int | None:
    """Line, from 1, of the dotted `key` in a node tree of `parse_yaml`."""
    if getattr(node, "id", None) != "mapping":
        return None
    for name, inner in node.value:
        if name.value == key:
            return name.start_mark.line + 1
        if key.startswith(f"{name.value}."):
            return line_of(inner, key[len(name.value) + 1 :]) or name.start_mark.line + 1
    return None


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in JSON's types (paths are text), for checkpoints and logs."""
    return json.loads(json.dumps(asdict(config), default=str))


def save(config: Any, path: str | Path) -> None:
    """Write every knob as YAML, its meaning as a comment. The file is replaced as a whole or not at
    all."""
    write_text(path, "\n".join(yaml_lines(to_dict(config), config)) + "\n")


def yaml_lines(values: Mapping[str, Any], config: Any = None, indent: str = "") -> list[str]:
    """Nested plain values as YAML, a line each, with the help of the knobs of `config` as comments."""
    lines = []
    knobs = getattr(config, "__dataclass_fields__", {})
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = yaml_lines(value, getattr(config, key, None), indent + "  ")
            lines += [f"{indent}{key}:", *inner]
        else:
            help = about(knobs[key]).help.replace("\n", " ") if key in knobs else ""
            lines.append(f"{indent}{key}: {to_yaml(value)}" + (f"  # {help}" if help else ""))
    return lines


def to_yaml(value: Any) -> str:
    """Plain values (numbers, text, lists) as YAML on one line."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_yaml, value)) + "]"
    if isinstance(value, float) and math.isinf(value):
        return f"{value:+}".replace("inf", ".inf")
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z/]([\w ./-]*[\w./-])?", value, re.ASCII)
    if plain and value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "none"):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
