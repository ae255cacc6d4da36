"""The simulator against the CPU: the predicted peak of memory is the tracked peak of a real step."""

import pytest

from tests.helpers.traces import trace_of

RECIPES = {
    "VE": "VE --config configs/VE/debug.yaml",
    "CL2L": "main --config configs/main/debug.yaml",
    "SLIP": "main --config configs/main/debug.yaml --model SLIP_VITT8 --batch_size 16",
    "ALIGN": "main --config configs/main/debug_align.yaml",
    "ViT": "Classification --config configs/Classification/debug.yaml --batch_size 32",
    "checkpointed": "Classification --config configs/Classification/debug.yaml "
    "--activation_checkpointing true --batch_size 32",
}


@pytest.mark.parametrize("name", RECIPES)
def test_predicted_peak_is_the_tracked_peak(name):
    predicted, real = trace_of(RECIPES[name], 1, "cpu"), trace_of(RECIPES[name], 1, "real")
    assert predicted.peak == pytest.approx(real.peak, rel=0.01)
    assert predicted.peak_phase == real.peak_phase
    assert predicted.flops == pytest.approx(real.flops, rel=0.01)
    assert real.peak > 1.05 * real.resident  # a step needs more than what stays between steps
