"""A configuration as plain values: to a dictionary or file and back, and what differs."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.files import write_text
from runtime.config.draft import Draft, Source
from runtime.config.values import show
from runtime.config.yaml import to_yaml

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in plain Python (numbers, text, lists, dicts), for checkpoints and logs."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_dict(cls: type[C], values: Mapping[str, Any], name: str = "saved configuration") -> C:
    """The opposite of `to_dict`; `name` is what mistakes are blamed on."""
    draft = Draft(cls)
    draft.put_all(values, Source(f"{name}: {{}}".format))
    return draft.finish()


def load(cls: type[C], path: str | Path) -> C:
    """The configuration that a YAML file holds; what it does not name keeps its default."""
    draft = Draft(cls)
    draft.read_file(Path(path))
    return draft.finish()


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
            help = f.metadata.get("help", "").replace("\n", " ")
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
