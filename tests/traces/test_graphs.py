"""What torch.compile captures of each method: one graph, which two more steps do not compile again."""

from unittest import mock

import pytest

from models.dual_encoder import factory
from scripts.planning.graphs import Graphs, capture
from scripts.planning.simulate import load_script, read_config
from tests.helpers.traces import ONE_BLOCK, STEPS, call_in_worker


def captured(command: str) -> Graphs:
    name, *argv = command.split()
    script = load_script(name)
    with mock.patch.dict(factory.VITS, ONE_BLOCK):
        return capture(script, read_config(script, argv))


class Captured:
    """`captured` of one command, as a function without arguments."""

    def __init__(self, command: str):
        self.command = command

    def __call__(self) -> Graphs:
        return captured(self.command)


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


SLOW = ("simla", "vqa", "barlip", "align")


@pytest.mark.parametrize(
    "name", ["ve", "nxtp", "vit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_one_graph(name):
    found = call_in_worker(Captured(STEPS[name]))
    assert not found.breaks, found.breaks
    assert found.graphs == 1 and found.recompiled == 0


def test_texts_that_see_noise_share_weights_with_those_that_do_not():
    """CL2L: in bf16 a weight is cast once for both, and again where the second's GELU is
    recomputed."""
    found = call_in_worker(Captured(f"{STEPS['cl2l']} --text_dropout_prob 0.05"))
    assert not found.breaks, found.breaks
    assert found.graphs == 1 and found.recompiled == 0


def test_a_break_is_seen():
    found = call_in_worker(captured_with_a_break)
    assert found.graphs > 1 and sum(found.breaks.values()) >= 1
