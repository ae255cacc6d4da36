"""A configuration as plain values: to a dictionary or file, and what differs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from base.knobs import about
from base.writing import write_text
from runtime.config.values import show
from runtime.config.yaml import to_yaml


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in JSON's types (paths are text), for checkpoints and logs."""
    return json.loads(json.dumps(asdict(config), default=str))


def save(config: Any, path: str | Path) -> None:
    """Write every knob as YAML, its meaning as a comment. The file is replaced as a whole or not at
    all."""
    write_text(path, "\n".join(_yaml_lines(config, "")) + "\n")


def _yaml_lines(config: Any, indent: str) -> list[str]:
    lines = []
    plain = to_dict(config)
    for f in fields(config):
        if is_dataclass(getattr(config, f.name)):
            lines += [f"{indent}{f.name}:", *_yaml_lines(getattr(config, f.name), indent + "  ")]
        else:
            help = about(f).help.replace("\n", " ")
            comment = f"  # {help}" if help else ""
            lines.append(f"{indent}{f.name}: {to_yaml(plain[f.name])}{comment}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two results of `to_dict`: lines such as `lr: 0.0001 -> 0.0002`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {show(before)} -> {show(after)}")
    return lines
