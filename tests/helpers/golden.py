"""Numbers recorded from the originals, read from $QUINTET_GOLDEN or ../shared/golden beside the
checkout.

A case is `NAME.json` (what was run, and scalar results) and, where it has tensors,
`NAME.safetensors`. Tests read shapes, names and ids from these files, so that any other set of the
same format can stand in their place.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # conftest.py imports this: the process that hands tests out needs no PyTorch
    import torch

BESIDE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden_root() -> Path | None:
    """Folder with one sub-folder per system, or None where the numbers are not at hand.

    $QUINTET_GOLDEN wins alone: where it is set and no folder, the test run ends with an error.
    """
    chosen = os.environ.get("QUINTET_GOLDEN")
    if not chosen:
        return BESIDE_CHECKOUT if BESIDE_CHECKOUT.is_dir() else None
    if not Path(chosen).is_dir():
        raise pytest.UsageError(
            f"QUINTET_GOLDEN={chosen} is not a folder: correct it, or unset it to use none"
        )
    return Path(chosen)


def golden_file(*parts: str) -> Path:
    """Path of one golden file; skips the calling test, with the reason, where it is not at hand."""
    root = golden_root()
    if root is None:
        pytest.skip(
            "golden numbers not found: set QUINTET_GOLDEN to the folder that holds them",
            allow_module_level=True,
        )
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"golden case {'/'.join(parts)} is not in {root}", allow_module_level=True)
    return path


def golden_json(*parts: str):
    """Content of one golden JSON file."""
    return json.loads(golden_file(*parts).read_text(encoding="utf-8"))


def golden_tensors(*parts: str) -> "dict[str, torch.Tensor]":
    """Content of one golden safetensors file; float16 tensors hold exact values and come back as
    float32."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(golden_file(*parts))
    return {
        name: value.float() if value.dtype == torch.float16 else value
        for name, value in stored.items()
    }


def golden(system: str, case: str) -> "tuple[dict, dict[str, torch.Tensor]]":
    """`(meta, tensors)` of one case; no tensors where the case is JSON only."""
    meta = golden_json(system, f"{case}.json")
    if not golden_root().joinpath(system, f"{case}.safetensors").exists():
        return meta, {}
    return meta, golden_tensors(system, f"{case}.safetensors")


def recorded(*parts: str, within: str = "") -> list:
    """Parameters for `pytest.mark.parametrize`: the keys, or the indices of the list, of one golden
    JSON file.

    within: a key of the file whose content is meant. Where the file is missing, one parameter that
    is skipped.
    """
    try:
        content = golden_json(*parts)
    except pytest.skip.Exception as missing:
        return [pytest.param(None, marks=pytest.mark.skip(reason=str(missing)), id="missing")]
    content = content[within] if within else content
    return list(content) if isinstance(content, dict) else list(range(len(content)))


def decode_image(stored: "torch.Tensor") -> "torch.Tensor":
    """Golden 4-D images are uint8 and mean `(x - 128) / 64` in float32."""
    return (stored.float() - 128) / 64
