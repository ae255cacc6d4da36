"""Numbers recorded from the originals, read from $QUINTET_GOLDEN or ../shared/golden beside the checkout."""

import json
import os
from pathlib import Path

import pytest
import torch

BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_root() -> Path | None:
    """Folder with one sub-folder per system, or None where the numbers are not at hand."""
    for root in (os.environ.get("QUINTET_GOLDEN"), BESIDE_CHECKOUT):
        if root and Path(root).is_dir():
            return Path(root)
    return None


def golden_file(*parts: str) -> Path:
    """Path of one golden file; skips the calling test, with the reason, where it is not at hand."""
    root = golden_root()
    if root is None:
        pytest.skip("golden numbers not found: set QUINTET_GOLDEN to the folder that holds them")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"golden case {'/'.join(parts)} is not in {root}")
    return path


def golden(system: str, case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """`(meta, tensors)` of one case; float16 tensors hold exact values and come back as float32."""
    meta = json.loads(golden_file(system, f"{case}.json").read_text())
    tensor_file = golden_root() / system / f"{case}.safetensors"
    tensors = {}
    if tensor_file.exists():
        from safetensors.torch import load_file

        tensors = {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(tensor_file).items()}
    return meta, tensors


def decode_image(stored: torch.Tensor) -> torch.Tensor:
    """Golden 4-D pictures are uint8 and mean `(x - 128) / 64` in float32."""
    return (stored.float() - 128) / 64
