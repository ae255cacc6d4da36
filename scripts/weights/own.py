"""Weights under the names they have here, which are the originals'."""

from pathlib import Path

from base.writing import write_text
from runtime.checkpoint import export_safetensors
from runtime.config.yaml import yaml_lines
from scripts.weights.source import Source, Written


def write_own(source: Source, folder: Path, use: str, task: str) -> Written:
    """model.safetensors and, of a run, its config.yaml, which the scripts read beside it."""
    export_safetensors(source.weights, folder / "model.safetensors")
    if "config" in source.about:
        lines = yaml_lines(source.about["config"])
        write_text(folder / "config.yaml", "\n".join(lines) + "\n")
    return Written("quintet", task, OWN_EXAMPLE + f"# scripts of this project: python {use}\n")


OWN_EXAMPLE = """
from safetensors import safe_open

with safe_open("model.safetensors", framework="pt") as file:
    print(len(file.keys()), "tensors")
"""
