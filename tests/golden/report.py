"""Comparisons with the originals' numbers, and the table of the worst error of each quantity that
pytest prints.

`python -m tests.golden.report [pytest arguments]` runs the golden tests and prints the table as
Markdown.
"""

import sys
from pathlib import Path

import torch

RECORDS: list[tuple[str, str, float]] = []  # (case, quantity, relative error)


def record(case: str, quantity: str, error: float) -> None:
    """Note one comparison with the originals' numbers."""
    RECORDS.append((case, quantity, float(error)))


def relative_error(ours, theirs, scale: float = 0.0) -> float:
    """max |ours - theirs| / max |theirs| of tensors or numbers (absolute where theirs is all zero).

    scale: the least divisor, for values that are zero in exact arithmetic and hold rounding noise.
    """
    ours = torch.as_tensor(ours).detach().double()
    theirs = torch.as_tensor(theirs).detach().double()
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {tuple(ours.shape)}, the original's is {tuple(theirs.shape)}")
    if not theirs.numel():
        return 0.0
    divisor = max(float(theirs.abs().max()), scale)
    return float((ours - theirs).abs().max()) / (divisor if divisor > 0 else 1.0)


def compare(case: str, quantity: str, ours, theirs, tolerance: float, scale: float = 0.0) -> None:
    """Record the relative error of a tensor or number and assert that it lies below the
    tolerance."""
    error = relative_error(ours, theirs, scale)
    record(case, quantity, error)
    assert error < tolerance, (
        f"{case}: {quantity} differs from the original by {error:.2e} (allowed {tolerance:.0e})"
    )


def same(case: str, quantity: str, ours, theirs) -> None:
    """Assert that integers, text or images are exactly the original's, and record the fraction that
    is not."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape, (
            f"{case}: {quantity}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
        wrong = float((ours != theirs).double().mean()) if theirs.numel() else 0.0
    else:
        wrong = float(ours != theirs)
    record(case, quantity, wrong)
    assert wrong == 0, (
        f"{case}: {quantity} is {str(ours)[:300]}, the original's is {str(theirs)[:300]}"
    )


def compare_levels(case: str, quantity: str, ours, theirs, level, most: int = 1) -> None:
    """Images of rounded grey levels: assert that pixels differ by whole levels, at most `most`;
    records the fraction.

    ours, theirs: float, any normalisation; level: what one of 255 grey levels is there, a number or
    per channel.
    """
    assert ours.shape == theirs.shape, (
        f"{case}: {quantity}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    )
    levels = (ours.double() - theirs.double()) / level
    record(
        case, f"{quantity}, pixels of another level", float((levels.abs() > 0.5).double().mean())
    )
    remainder = float((levels - levels.round()).abs().max())
    assert remainder < 0.01, (
        f"{case}: {quantity} differs from the original by parts of a grey level, {remainder:.1e}"
    )
    worst = float(levels.abs().max().round())
    assert worst <= most, (
        f"{case}: {quantity} differs from the original by {worst:.0f} grey levels (allowed {most})"
    )


def compare_gradients(
    case: str, model: torch.nn.Module, norms: dict, tensors: dict, tolerance: float
) -> None:
    """Gradient norms of every parameter (None: it has no gradient) and the gradients stored in full
    as `grad.<name>`.

    Gradients that are zero in exact arithmetic (key biases), or nearly, are rounding noise of the
    large ones and measured by those.
    """
    parameters = dict(model.named_parameters())
    without = {name for name, norm in norms.items() if norm is None}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    same(case, "parameters with a gradient", sorted(trained | without), sorted(norms))
    noise = 1e-4 * max(norm for norm in norms.values() if norm)
    for name, norm in norms.items():
        if norm is None:
            assert parameters[name].grad is None, f"{case}: {name} should have no gradient"
            continue
        compare(case, "gradient norms", parameters[name].grad.norm(), norm, tolerance, noise)
    for key in [key for key in tensors if key.startswith("grad.")]:
        ours = parameters[key.removeprefix("grad.")].grad
        compare(case, "gradients", ours, tensors[key], tolerance)


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
