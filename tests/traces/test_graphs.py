"""What torch.compile captures of each method: one graph, which two more steps do not compile again."""

import pytest

from scripts.planning.graphs import Graphs, capture
from scripts.planning.methods import STEPS
from scripts.planning.simulate import load_script, read_config
from tests.helpers.traces import call_in_worker


def captured(command: str) -> Graphs:
    name, *argv = command.split()
    script = load_script(name)
    return capture(script, read_config(script, argv))


class Captured:
    """`captured` of one command, as a function without arguments."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> Graphs:
        return captured(STEPS[self.name])


def captured_with_a_break() -> Graphs:
    """A ViT with something in it that cannot be captured."""
    import torch

    from models.layers.vit import ViT

    embed = ViT.embed

    def broken(self, *args):
        torch._dynamo.graph_break()
        return embed(self, *args)

    ViT.embed = broken
    try:
        return captured(STEPS["vit"])
    finally:
        ViT.embed = embed


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("simla", "vqa", "barlip", "align")]


@pytest.mark.parametrize("name", ["ve", "nxtp", "cl2l", "vit", *SLOW])
def test_one_graph(name):
    found = call_in_worker(Captured(name))
    assert not found.breaks, found.breaks
    assert found.graphs == 1 and found.recompiled == 0


def test_a_break_is_seen():
    found = call_in_worker(captured_with_a_break)
    assert found.graphs > 1 and sum(found.breaks.values()) >= 1
