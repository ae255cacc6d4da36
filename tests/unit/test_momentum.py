"""Momentum pairs: which parameters follow which, and how."""

import copy

import pytest
import torch
from torch import nn

from base.errors import UserError
from models.fusion.momentum import MomentumPairs


def model_with_pair() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.encoder[2].weight = model.encoder[0].weight  # tied
    model.head = nn.Linear(3, 2)
    model.encoder_m = copy.deepcopy(model.encoder).requires_grad_(False)
    for parameter in model.encoder.parameters():
        nn.init.normal_(parameter)
    return model


def test_update_is_the_moving_average_of_parameters_alone():
    model = model_with_pair()
    before = [p.clone() for p in model.encoder_m.parameters()]
    online = [p.clone() for p in model.encoder.parameters()]
    model.encoder[1].running_mean += 1
    pairs = MomentumPairs(model, momentum=0.9)
    assert len(pairs.teacher) == 5  # the tied matrix once
    pairs.update()
    for teacher, old, new in zip(model.encoder_m.parameters(), before, online, strict=True):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * new)
    assert all(torch.equal(p, q) for p, q in zip(model.encoder.parameters(), online, strict=True))
    assert model.encoder_m[1].running_mean.abs().sum() == 0


def test_copy():
    model = model_with_pair()
    model.encoder[1].running_mean += 1
    MomentumPairs(model).copy()
    assert torch.equal(model.encoder_m[1].running_mean, model.encoder[1].running_mean)
    for teacher, online in zip(
        model.encoder_m.parameters(), model.encoder.parameters(), strict=True
    ):
        assert torch.equal(teacher, online)


def test_found_inside_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert (
        len(MomentumPairs(Wrapper(torch.compile(model_with_pair(), backend="eager"))).teacher) == 5
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no momentum copy"):
        MomentumPairs(nn.Linear(2, 2))
    model = model_with_pair()
    model.head_m = nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"weight .4, 3. has no counterpart"):
        MomentumPairs(model)
    with pytest.raises(UserError, match="momentum"):
        MomentumPairs(model_with_pair(), momentum=1.5)
