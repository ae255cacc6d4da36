"""Evaluation and the loss of answers on 1, 2 and 3 processes."""

import pytest
import torch

from base.distributed import ALONE, World
from dataset.tasks.grounding import Target
from evaluation.grounding import point_all
from evaluation.predict import over_split
from tests.helpers.processes import spawn

TOTAL = 5


def predictions(rank: int, size: int) -> list[torch.Tensor]:
    world = World(rank, size, rank, torch.device("cpu"))
    own = list(range(TOTAL * rank // size, TOTAL * (rank + 1) // size))
    batches = [{"x": torch.tensor([float(i)]), "label": torch.tensor([0])} for i in own]
    return over_split(
        lambda x: (x[:, None] * torch.tensor([1.0, 2.0]), x.long()), batches, own, TOTAL, world
    )


def check(rank: int, size: int) -> None:
    scores, numbers = predictions(rank, size)
    assert numbers.tolist() == list(range(TOTAL)) and numbers.dtype == torch.int64
    assert scores.tolist() == [[float(i), 2.0 * i] for i in range(TOTAL)]


@pytest.mark.parametrize("size", [1, 2, 6])
def test_every_sample_is_counted_once(size):
    """Six processes for five samples: one has nothing to do."""
    if size == 1:
        check(0, 1)
    else:
        spawn(check, size, size)


def pointed(world: World) -> list:
    """What two maps point to."""
    boxes = [[[0, 0, 4, 4], [4, 4, 4, 4]], [[0, 0, 3, 8]]]
    targets = [Target(i, "val", of_image[-1], 8, 8) for i, of_image in enumerate(boxes)]
    return point_all(torch.eye(4).reshape(1, 4, 4).repeat(2, 1, 1), targets, boxes, world)


def check_pointing(rank: int, expected: list) -> None:
    assert pointed(World(rank, 3, rank, torch.device("cpu"))) == expected


def test_three_processes_point_for_two_expressions():
    """The last has none."""
    alone = pointed(ALONE)
    assert [(found.box, found.chance) for found in alone] == [(0, 0.5), (0, 1.0)]
    spawn(check_pointing, 3, alone)
