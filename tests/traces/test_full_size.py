"""Peak memory and launches of the full-size recipes do not grow by accident: tests/traces/full_size.py."""

import pytest

from tests.traces.full_size import RECIPES, measure, stored


def test_every_recipe_is_stored():
    assert stored().keys() == RECIPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_not_above_the_stored_figures(name):
    limits, found = stored()[name], measure(name)
    assert found["peak_bytes"] <= limits["peak_bytes"] * 1.005
    assert found["launches"] <= limits["launches"] * 1.01
