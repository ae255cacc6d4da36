"""Parameter groups, and steps that never let a NaN through."""

import pytest
import torch
from torch import nn

from base.errors import UserError
from models.dual_encoder.base import names_by_decay
from runtime.optim.build import (
    NonFinite,
    Optimizer,
    Precision,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)

CPU = torch.device("cpu")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.temp = nn.Parameter(torch.ones([]))
        self.dense = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.dense.weight
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_of(model, group):
    return {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}


def test_vectors_tokens_and_temperature_are_not_decayed():
    model = Tiny()
    plain, decayed = parameter_groups(model, Optimizer())
    assert names_of(model, plain) == {"pos_embed", "temp", "dense.bias", "norm.weight", "norm.bias"}
    assert names_of(model, decayed) == {"dense.weight"}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)


class Pixels(nn.Module):
    """As timm's TNT."""

    def __init__(self):
        super().__init__()
        self.pixel_pos = nn.Parameter(torch.zeros(1, 3, 4))
        self.dense = nn.Linear(4, 4, bias=False)

    def no_weight_decay(self):
        return {"pixel_pos"}


def test_what_a_tower_of_timm_lists_is_not_decayed():
    model = nn.Sequential(Pixels(), nn.Linear(4, 4, bias=False))
    plain, decayed = parameter_groups(model, Optimizer())
    assert names_of(model, plain) == {"0.pixel_pos"} == set(names_by_decay(model)[1])
    assert names_of(model, decayed) == {"0.dense.weight", "1.weight"}
    assert len(parameter_groups(model, Optimizer(decay_everything=True))) == 1
    assert "0.pixel_pos" in names_by_decay(model, original=True)[0]


def test_decay_everything_is_the_originals_rule():
    model = Tiny()
    _, decayed = parameter_groups(model, Optimizer(decay_everything=True))
    assert names_of(model, decayed) == {"dense.weight", "pos_embed", "temp"}


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_bad_step_and_all_after_it_leave_the_weights_alone(opt):
    model = nn.Linear(4, 1)
    optimizer, precision = (
        build_optimizer(model, Optimizer(opt=opt, lr=0.1)),
        Precision("fp32", CPU),
    )
    history = []
    for scale in (1.0, 1.0, float("nan"), 1.0):
        precision.backward(model(torch.ones(2, 4)).sum() * scale)
        precision.step(optimizer, model.parameters())
        history.append(model.weight.detach().clone())
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2]) and torch.equal(history[1], history[3])
    with pytest.raises(NonFinite, match="step 13"):
        precision.check(first_step=10)


@pytest.mark.parametrize(("clip", "change"), [(0.5, 0.5), (None, 6.0), (0.0, 6.0)])
def test_clipping_bounds_the_update_and_reports_the_norm_before_it(clip, change):
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, Optimizer(opt="sgd", lr=1.0, weight_decay=0.0))
    precision = Precision("fp32", CPU, clip=clip)
    precision.backward(model(torch.full((1, 4), 3.0)).sum())
    norm = precision.step(optimizer, list(model.parameters()))
    assert norm.item() == pytest.approx(6.0)
    assert (model.weight - before).norm().item() == pytest.approx(change, rel=1e-4)


def test_parts_may_learn_more_slowly():
    model = Tiny()
    groups = parameter_groups(model, Optimizer(lr_scales=["dense.=0.5", "norm=0"]))
    found = {name: g["lr_scale"] for g in groups for name in names_of(model, g)}
    slower = {"dense.weight": 0.5, "dense.bias": 0.5, "norm.weight": 0, "norm.bias": 0}
    assert found == {"pos_embed": 1, "temp": 1} | slower
    for wrong, words in (
        ("dense", "not NAME=FACTOR"),
        ("norm=x", "not NAME=FACTOR"),
        ("norm=inf", "not NAME=FACTOR"),
        ("x=1", "model has pos_embed"),
    ):
        with pytest.raises(UserError, match=words):
            parameter_groups(model, Optimizer(lr_scales=[wrong]))


def test_scalars_may_learn_more_slowly():
    groups = parameter_groups(Tiny(), Optimizer(scalar_lr_scale=0.1))
    assert [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in groups] == [
        (4, 0.0, 1.0),
        (1, 0.0, 0.1),
        (1, 0.02, 1.0),
    ]


def test_groups_keep_their_own_scale_of_the_learning_rate():
    optimizer = build_optimizer(Tiny(), Optimizer())
    optimizer.param_groups[1]["lr_scale"] = 0.1
    set_learning_rate(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 0.2]


def test_fp16_on_the_cpu_says_what_to_use():
    with pytest.raises(UserError, match="bf16"):
        Precision("fp16", CPU)


def test_bf16_autocast_computes_in_bfloat16():
    precision = Precision("bf16", CPU)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.bfloat16
