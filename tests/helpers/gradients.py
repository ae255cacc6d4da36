"""Gradients of two networks that should be the same, measured by their own size."""

import torch
from torch import Tensor


def distance(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """Norm of the difference as a part of the norm of theirs, or of `least` where that is larger."""
    difference = (ours.double() - theirs.double()).norm()
    return float(difference) / max(float(theirs.double().norm()), least, 1e-30)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], part: float) -> None:
    """Every gradient agrees up to a part of its norm.

    Gradients that are zero in exact arithmetic (such as of a bias in front of a norm) are rounding
    noise of the large ones: less than a thousandth of the largest norm counts as that.
    """
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(float(value.norm()) for value in theirs.values())
    assert least > 0, "all gradients are zero"
    for name, value in theirs.items():
        error = distance(ours[name], value, least)
        assert error < part, f"gradient of {name} differs by {error:.1e} of its norm"


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}
