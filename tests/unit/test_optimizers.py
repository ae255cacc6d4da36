"""Muon, timm's optimizers, learning rates by layer and by tower."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from base.errors import UserError
from models.dual_encoder.base import names_by_decay
from runtime.optim.build import (
    Optimizer,
    Precision,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from runtime.optim.layer_decay import layer_scales
from runtime.optim.muon import is_hidden_matrix
from tests.helpers.clip_toys import toy

CPU = torch.device("cpu")
NEW = ["muon", "timm/lion", "timm/nadamw", "timm/adafactor"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps: int, seed: int) -> None:
    precision = Precision("fp32", CPU)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        set_learning_rate(optimizer, 0.01)
        precision.backward(model(torch.randn(6, 4, generator=generator)).square().mean())
        precision.step(optimizer, model.parameters())


@pytest.mark.parametrize("opt", NEW)
def test_resume_is_exact(opt):
    config = Optimizer(opt=opt, lr=0.01)
    straight = small()
    optimizer = build_optimizer(straight, config)
    train(straight, optimizer, 3, seed=1)
    options = dcp.StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(dcp.get_state_dict(straight, optimizer, options=options))
    train(straight, optimizer, 3, seed=2)
    resumed = small()
    other = build_optimizer(resumed, config)
    dcp.set_model_state_dict(resumed, saved[0], options=options)
    dcp.set_optimizer_state_dict(resumed, other, saved[1], options=options)
    train(resumed, other, 3, seed=2)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not torch.equal(small().state_dict()["0.weight"], straight.state_dict()["0.weight"])


@pytest.mark.parametrize("opt", NEW)
def test_a_bad_step_and_all_after_it_leave_the_weights_alone(opt):
    model, precision = small(), Precision("fp32", CPU)
    optimizer = build_optimizer(model, Optimizer(opt=opt, lr=0.1))
    history = []
    for scale in (1.0, float("nan"), 1.0):
        precision.backward(model(torch.ones(2, 4)).sum() * scale)
        precision.step(optimizer, model.parameters())
        history.append([p.detach().clone() for p in model.parameters()])
    for first, second, third in zip(*history, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("opt", ["muon", "lamb", "adamw"])
def test_loss_scaling_leaves_out_a_step_on_the_device(opt):
    """Weights and moments after a good, a bad and a good update are those of the two good ones."""
    found = []
    for scales in ((1.0, float("inf"), 2.0), (1.0, 2.0)):
        model, precision = small(), Precision("fp32", CPU)
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = build_optimizer(model, Optimizer(opt=opt, lr=0.1))
        for scale in scales:
            precision.scaler.scale(model(torch.ones(2, 4)).sum() * scale).backward()
            precision.step(optimizer, model.parameters())
        assert optimizer._step_supports_amp_scaling  # or the scaler reads found_inf on the host
        states = [optimizer.state[p] for p in model.parameters()]
        found.append([*model.parameters(), *(v for state in states for v in state.values())])
    for left_out, undisturbed in zip(*found, strict=True):
        assert left_out.isfinite().all() and torch.equal(left_out, undisturbed)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "muon"])
def test_a_resumed_state_is_where_the_weights_are(opt):
    """Checkpoints are read into host memory; no kernel of a GPU takes a count of updates there."""
    model = small()
    saved = build_optimizer(model, Optimizer(opt=opt))
    train(model, saved, 1, seed=1)
    resumed = build_optimizer(small().to("meta"), Optimizer(opt=opt))
    resumed.load_state_dict(saved.state_dict())
    found = {value.device.type for state in resumed.state.values() for value in state.values()}
    assert found == {"meta"}


def test_muon_updates_hidden_matrices_and_adamw_the_rest():
    model = toy("CLIP_VITB16_CLIP")
    optimizer = build_optimizer(model, Optimizer(opt="muon", lr=0.01))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    assert (
        "visual.blocks.0.attn.qkv.weight" in by_muon
        and "transformer.resblocks.0.mlp.c_fc.weight" in by_muon
    )
    rest = set(names.values()) - by_muon
    assert {
        "token_embedding.weight",
        "positional_embedding",
        "visual.patch_embed.proj.weight",
    } <= rest
    assert "logit_scale" in rest and "visual.norm.weight" in rest


@pytest.mark.parametrize(
    ("model", "tables"),
    [
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table"),
        ("levit_128s", "attention_biases"),
        ("mvitv2_tiny", "rel_pos_h"),
    ],
)
def test_tables_of_relative_positions_are_no_matrices(model, tables):
    """A row is looked up by distance, as one of an embedding: of timm's towers Muon takes only what
    multiplies, and neither AdamW's rule decays a table, as timm's does not."""
    import timm

    with torch.device("meta"):
        tower = timm.create_model(model, num_classes=0)
    multiplied = {m.weight for m in tower.modules() if isinstance(m, nn.Linear)}
    named = dict(tower.named_parameters())
    assert any(tables in name and parameter.ndim == 2 for name, parameter in named.items())
    assert {p for name, p in named.items() if is_hidden_matrix(name, p)} == multiplied
    decayed = {*parameter_groups(tower, Optimizer())[1]["params"]}
    assert decayed == {named[name] for name in names_by_decay(tower)[0]} >= multiplied
    assert not any(named[name] in decayed for name in tower.no_weight_decay() if name in named)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize("found_inf", [None, torch.zeros(())])
def test_muon_is_that_of_torch(found_inf, monkeypatch):
    """Three updates of every hidden matrix, wide, tall and square; two of a shape at a time. In
    float32, as ours computes on the CPU."""
    monkeypatch.setattr("runtime.optim.muon.TOGETHER", 2 * 64 * 64)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # what torch until 2.14 calls
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # what 2.15 asks `to` for
    model = toy("CLIP_VITB16_CLIP")
    optimizer = build_optimizer(model, Optimizer(opt="muon", lr=0.01, weight_decay=1.0))
    optimizer.found_inf = found_inf
    reference = copy.deepcopy(model)
    own, others = dict(model.named_parameters()), dict(reference.named_parameters())
    hidden = [p for g in optimizer.param_groups if g["muon"] for p in g["params"]]
    names = [name for name, p in own.items() if any(p is q for q in hidden)]
    alone = torch.optim.Muon(
        [others[name] for name in names],
        lr=0.01,
        weight_decay=1.0,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name in names:
            gradient = torch.randn(own[name].shape, generator=generator)
            own[name].grad, others[name].grad = gradient, gradient.clone()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        alone.step()
    shapes = {tuple(own[name].shape) for name in names}
    assert any(o > i for o, i in shapes) and any(o < i for o, i in shapes) and len(names) > 6
    for name in names:
        torch.testing.assert_close(own[name], others[name], rtol=0, atol=1e-6, msg=name)


def test_unknown_optimizers():
    with pytest.raises(UserError, match="did you mean muon"):
        Optimizer(opt="muom")
    with pytest.raises(UserError, match=r"timm has no such optimizer; did you mean lion"):
        build_optimizer(small(), Optimizer(opt="timm/lionn"))
    with pytest.raises(UserError, match="timm/adahessian needs second derivatives"):
        build_optimizer(small(), Optimizer(opt="timm/adahessian"))


def test_timm_has_the_options_that_it_knows():
    config = Optimizer(lr=0.3, betas=(0.5, 0.6), eps=0.7, momentum=0.8)
    for opt, expected in {
        "timm/sgd": {"lr": 0.3, "momentum": 0.8},
        "timm/lion": {"lr": 0.3, "betas": (0.5, 0.6)},
        "timm/nadamw": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.7},
    }.items():
        group = build_optimizer(small(), replace(config, opt=opt)).param_groups[0]
        assert {name: group[name] for name in expected} == expected, opt


def test_timm_keeps_three_betas_and_says_what_waits(capsys):
    group = build_optimizer(small(), Optimizer(opt="timm/adan", betas=(0.5, 0.5))).param_groups[0]
    assert group["betas"] == (0.98, 0.92, 0.99)
    assert not capsys.readouterr().out
    build_optimizer(small(), Optimizer(opt="timm/adamp"))
    assert "timm/adamp: each update waits for the GPU" in capsys.readouterr().out


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr("runtime.optim.build.is_sharded", lambda tensor: True)
    for opt in ("muon", "timm/lion"):
        with pytest.raises(UserError, match="fsdp shards them; use --parallel"):
            build_optimizer(small(), Optimizer(opt=opt))


def test_layer_decay_is_that_of_mae():
    """Two blocks: 0.5^3 for what feeds them, 0.5^2 and 0.5 for the blocks, 1 behind them."""
    model = toy("CLIP_VITB16_CLIP")
    scales = layer_scales([name for name, _ in model.named_parameters()], 0.5)
    expected = {
        "visual.cls_token": 0.125,
        "visual.pos_embed": 0.125,
        "visual.patch_embed.proj.weight": 0.125,
        "visual.blocks.0.norm1.weight": 0.25,
        "visual.blocks.1.mlp.fc2.bias": 0.5,
        "visual.norm.weight": 1,
        "token_embedding.weight": 0.125,
        "positional_embedding": 0.125,
        "transformer.resblocks.0.ln_1.weight": 0.25,
        "transformer.resblocks.1.ln_1.weight": 0.5,
        "ln_final.weight": 1,
        "image_projector.weight": 1,
        "logit_scale": 1,
    }
    assert {name: scales[name] for name in expected} == expected
    groups = parameter_groups(model, Optimizer(layer_decay=0.5))
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1}
    with pytest.raises(UserError, match="no numbered blocks"):
        layer_scales(["weight"], 0.5)


@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(
            {
                "visual.conv1.weight": 1,
                "visual.layer1.0.conv1.weight": 1,
                "visual.attnpool.positional_embedding": 1,
                "positional_embedding": 0.125,
                "transformer.resblocks.1.ln_1.weight": 0.5,
            },
            id="a ResNet beside a text transformer has no blocks",
        ),
        pytest.param(
            {
                "network.visual.conv1.weight": 0.0625,
                "network.visual.transformer.resblocks.0.ln_1.weight": 0.125,
                "network.visual.transformer.resblocks.2.ln_1.weight": 0.5,
                "network.token_embedding.weight": 0.25,
                "network.transformer.resblocks.0.ln_1.weight": 0.5,
                "network.logit_scale": 1,
            },
            id="open_clip's towers are as deep as they are",
        ),
        pytest.param(
            {
                "network.vision_model.pre_layrnorm.weight": 0.125,
                "network.vision_model.encoder.layers.1.layer_norm1.weight": 0.5,
                "network.text_model.embeddings.token_embedding.weight": 0.25,
                "network.text_model.encoder.layers.0.layer_norm1.weight": 0.5,
                "network.text_projection.weight": 1,
            },
            id="so are those of transformers",
        ),
        pytest.param(
            {
                "patch_embed.backbone.conv1.weight": 0.125,
                "patch_embed.backbone.stages.2.conv1.weight": 0.125,
                "blocks.1.norm1.weight": 0.5,
                "head.weight": 1,
            },
            id="stages of a stem feed the blocks",
        ),
    ],
)
def test_layer_decay_counts_each_tower_by_itself(expected):
    assert layer_scales(expected, 0.5) == expected


def test_towers_have_learning_rates_of_their_own():
    model = toy("CLIP_VITB16_CLIP")
    groups = parameter_groups(model, Optimizer(lr_scales=["image=0.1", "text=0.5"]))
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert {v for k, v in scale.items() if k.startswith("visual.")} == {0.1}
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
    assert {v for k, v in scale.items() if k.startswith(text)} == {0.5}
    assert scale["image_projector.weight"] == scale["logit_scale"] == 1
    with pytest.raises(UserError, match="this model has image, text, "):
        parameter_groups(model, Optimizer(lr_scales=["audio=1"]))


def test_nothing_left_to_train():
    with pytest.raises(UserError, match="nothing is left to train"):
        build_optimizer(small().requires_grad_(False), Optimizer())
