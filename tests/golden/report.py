"""The table of the golden cases: each comparison records its relative error here, and pytest prints the worst of each.

`python -m tests.golden.report [pytest arguments]` runs the golden tests and prints the table as Markdown.
"""

import sys
from pathlib import Path

import torch

RECORDS: list[tuple[str, str, float]] = []  # (case, quantity, relative error)


def record(case: str, quantity: str, error: float) -> None:
    """Note one comparison with the originals' numbers."""
    RECORDS.append((case, quantity, float(error)))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |ours - theirs| / max |theirs| (absolute where theirs is all zero)."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {tuple(ours.shape)}, the original's is {tuple(theirs.shape)}")
    scale = theirs.abs().max() if theirs.numel() else torch.tensor(1.0)
    return float((ours - theirs).abs().max() / (scale if scale > 0 else 1.0)) if theirs.numel() else 0.0


def compare(case: str, quantity: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Record the relative error of a tensor and assert that it lies below the tolerance."""
    error = relative_error(ours, theirs)
    record(case, quantity, error)
    assert error < tolerance, f"{case}: {quantity} differs from the original by {error:.2e} (allowed {tolerance:.0e})"


def table() -> list[str]:
    """Markdown lines: case, quantity, comparisons made, worst relative error."""
    worst: dict[tuple[str, str], list[float]] = {}
    for case, quantity, error in RECORDS:
        worst.setdefault((case, quantity), []).append(error)
    lines = ["| case | quantity | comparisons | max relative error |", "|---|---|---|---|"]
    for (case, quantity), errors in sorted(worst.items()):
        lines.append(f"| {case} | {quantity} | {len(errors)} | {max(errors):.1e} |")
    return lines


if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]]))
