"""The dual encoders: every model string, views joined or apart, text padding, noise, weight decay,
momentum model."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from base.errors import UserError
from models.dual_encoder.base import names_by_decay
from models.dual_encoder.cl2l import per_view
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import (
    BACKBONES,
    HEADS,
    build_dual,
    check_compiled_pooling,
    model_names,
    parts_of,
)
from models.layers.average import WeightAverage
from models.layers.clip_towers import TextNoise, siamlip_projector
from models.layers.openai_towers import openai_model
from tests.helpers.clip_toys import END, ToyConvNet, losses_with_total, toy, toy_batch

TRAINABLE = [f"{base}_VITB16_{head}" for base in ("CLIP", "CL2L") for head in HEADS] + [
    "SLIP_VITB16",
    "SIMCLR_VITB16",
]


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_head_trains_with_either_base(name):
    """A small step along the gradient lowers the loss, and every trainable weight has a
    gradient: the image tower's come first, so that its activations make room for the text tower's."""
    model = toy(name, separate_proj=True)
    arrived = note_towers(model)
    batch = toy_batch()
    first = losses_with_total(model, batch)
    first["loss"].backward()
    assert arrived == sorted(arrived) and arrived
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 1e-3 * parameter.grad / norm
    assert losses_with_total(model, batch)["loss"] < first["loss"]


def note_towers(model) -> list[str]:
    """The tower of every gradient, in the order in which a backward pass makes them."""
    arrived = []
    for name, parameter in model.named_parameters():
        for tower, starts in model.towers.items():
            if name.startswith(starts) and parameter.requires_grad:
                note = partial(note_tower, arrived, tower)
                parameter.register_post_accumulate_grad_hook(note)
    return arrived


def note_tower(arrived: list[str], tower: str, parameter: torch.Tensor) -> None:
    arrived.append(tower)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_builds_with_every_head(backbone):
    with torch.device("meta"):
        for head in HEADS if backbone in ("RT", "VITT8") else ("CL2L",):  # a head has no more of it
            model = build_dual(DualConfig(model=f"CL2L_{backbone}_{head}"))
            assert model.visual.num_features == model.image_projector.in_features
    assert f"CLIP_{backbone}_CLIP" in model_names()


@pytest.mark.parametrize(
    "name", ["CL2L_VITB61_CL2L", "CL2L_VITB16", "cl2l_vitb16_cl2l", "RESNET", "SLIP_R50", ""]
)
def test_unknown_model_names_the_nearest(name):
    with pytest.raises(UserError, match=r"is unknown.*VITB16.*SIAMLIP") as error:
        parts_of(name)
    if name == "CL2L_VITB61_CL2L":
        assert "did you mean CL2L_VITB16_CL2L?" in str(error.value)


def test_local_views_wanted():
    assert [
        parts_of(n)[2] for n in ("CLIP_R50_CLIP", "CLIP_R50_CL2L", "SLIP_VITB16", "CLIP_VITB16")
    ] == [0, -1, 2, 0]


def test_openai_names():
    assert openai_model("ViT-B/32") == openai_model("ViT-B-32")
    assert openai_model("ViT-L/14@336px").image_size == 336
    with pytest.raises(UserError, match="did you mean ViT-B-16"):
        openai_model("ViT-B-61")


def test_bad_projector():
    with pytest.raises(UserError, match=r"clip_proj_type 'mpl'.*linear or mlp"):
        toy(clip_proj_type="mpl")


def test_joined_views_are_the_views_apart():
    model, batch = toy(separate_proj=True).eval(), toy_batch()
    out = model(features_only=True, **batch)
    for a in range(2):
        feats = model.visual(batch["image_local"][:, a])
        torch.testing.assert_close(out["feats_image_local"][:, a], feats, rtol=1e-5, atol=1e-5)
        feats = model.text_features(batch["text_ids"][:, 1 + a])
        torch.testing.assert_close(out["feats_text_local"][:, a], feats, rtol=1e-5, atol=1e-5)


def test_views_are_apart_in_batch_norms_alone():
    """The other layers of a head see all views at once; results and statistics are the same."""
    head = siamlip_projector(16, 20, 10).double()
    apart = copy.deepcopy(head)
    feats = torch.randn(8, 3, 16, dtype=torch.float64)
    widths = []
    head[0].register_forward_hook(lambda layer, given, found: widths.append(found.shape))
    expected = torch.stack([apart(view) for view in feats.unbind(1)], 1)
    torch.testing.assert_close(per_view(head, feats), expected)
    assert widths == [(8, 3, 20)]
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value, msg=name)


def test_the_last_block_computes_the_class_token_alone():
    """The feature and its gradients are those of a tower that computes every token to the end."""
    tower, image = toy().visual.double(), toy_batch()["image"].double()
    x = tower.embed(image)
    for block in tower.blocks:
        x = block(x)
    expected = tower.norm(x)[:, 0]
    found = tower(image)
    torch.testing.assert_close(found, expected)
    weights = list(tower.parameters())
    direction = torch.randn(expected.shape, dtype=torch.float64)  # the norm of a feature is fixed
    for ours, theirs in zip(
        torch.autograd.grad((direction * found).sum(), weights),
        torch.autograd.grad((direction * expected).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_views_of_a_batch_normed_backbone_keep_their_own_statistics():
    model = toy(visual=ToyConvNet()).train()
    assert not model.join_views
    model(**toy_batch())
    assert model.visual.net[1].num_batches_tracked == 3


def test_local_views_of_another_size():
    model = toy(visual=ToyConvNet(), separate_proj=True)
    batch = toy_batch()
    batch["image_local"] = batch["image_local"][..., :12, :12]
    assert losses_with_total(model, batch)["loss"].isfinite()
    with pytest.raises(UserError, match="pixels"):
        toy()(**batch)


def test_padding_behind_the_end_token_has_no_influence():
    model, text = toy().eval(), toy_batch()["text_ids"][:, 0]
    longest = int((text == END).int().argmax(1).max()) + 1
    full, short = model.embed_text(text), model.embed_text(text[:, :longest])
    for name in full:
        torch.testing.assert_close(short[name], full[name], rtol=1e-5, atol=1e-6)


def test_text_too_long():
    with pytest.raises(UserError, match=r"13 tokens.*holds 12"):
        toy().embed_text(torch.ones(2, 13, dtype=torch.int64))


def test_views_and_captions_must_agree():
    batch = toy_batch()
    batch["text_ids"] = batch["text_ids"][:, :2]
    with pytest.raises(UserError, match=r"2 rows a sample, but 3.*num_augs"):
        toy()(**batch)


def test_no_local_views():
    batch = toy_batch(views=0)
    losses = losses_with_total(toy(), batch)
    assert losses["clip_loss"] == losses["loss"]
    flat = batch | {"text_ids": batch["text_ids"][:, 0]}
    torch.testing.assert_close(losses_with_total(toy(), flat)["loss"], losses["loss"])


def test_noise_touches_local_texts_of_training_only():
    noisy, clean, batch = toy(text_dropout_prob=0.3, text_drop_path_prob=0.3), toy(), toy_batch()
    expected = clean(features_only=True, **batch)
    for training in (True, False):
        out = noisy.train(training)(features_only=True, **batch)
        torch.testing.assert_close(out["feats_text"], expected["feats_text"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out["feats_image_local"], expected["feats_image_local"])
        same = torch.allclose(
            out["feats_text_local"], expected["feats_text_local"], rtol=1e-4, atol=1e-5
        )
        assert same != training


def test_drop_path_drops_texts_or_positions():
    x = torch.ones(40, 30, 2)
    by_text = TextNoise(drop_path=0.5).branch(x)
    by_position = TextNoise(drop_path=0.5, over_positions=True).branch(x)
    assert set(by_text.unique().tolist()) == {0.0, 2.0}
    assert (by_text == by_text[:, :1]).all() and not (by_text == by_text[:1]).all()
    assert (by_position == by_position[:1]).all() and not (by_position == by_position[:, :1]).all()


@pytest.mark.parametrize("name", TRAINABLE)
def test_bfloat16_stays_near_float32(name):
    model, batch = toy(name, separate_proj=True), toy_batch()
    expected = losses_with_total(model, batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses_with_total(model, batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)


def test_clamp_scales():
    model = toy("CL2L_VITB16_CL2L", separate_proj=True)
    model.logit_scale.data.fill_(9.0)
    model.l2l_logit_scale.data.fill_(-1.0)
    model.clamp_scales()
    torch.testing.assert_close(model.logit_scale.exp().detach(), torch.tensor(100.0))
    assert model.l2l_logit_scale == 0
    for name in ("CLIP_VITB16_CLIP", "CL2L_VITB16_CL2L", "SIMCLR_VITB16"):
        toy(name).clamp_scales()
    align = toy("ALIGN_NANO_TINY", image_size=32, temperature=0.01)
    align.after_update()
    assert align.temperature.item() == pytest.approx(0.01)
    align.temperature.data.fill_(-0.002)  # what a step of AdamW may make of it
    align.after_update()
    assert align.temperature.item() == pytest.approx(1e-3)


def test_decay_groups():
    model = toy("CLIP_VITB16_SWALIPV1", separate_proj=True)
    decay, no_decay = names_by_decay(model)
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    assert set(decay) | set(no_decay) == trainable and not set(decay) & set(no_decay)
    assert {
        "token_embedding.weight",
        "positional_embedding",
        "visual.cls_token",
        "visual.pos_embed",
    } <= set(no_decay)
    assert "token_embedding.weight" in names_by_decay(model, original=True)[0]
    words, dense = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2)
    tower = torch.nn.ModuleDict({"position_embeddings": words, "dense": dense})
    of_library = torch.nn.ModuleDict({"text_tower": tower})
    assert names_by_decay(of_library)[0] == ["text_tower.dense.weight"]


def test_the_momentum_teacher_follows():
    model = toy("CL2L_VITB16_SIAMLIP", seed=1)
    teacher = copy.deepcopy(toy("CL2L_VITB16_SIAMLIP", seed=2))
    before = teacher.text_projector.weight.clone()
    teacher.register_buffer("own", torch.tensor(1.0))
    with pytest.raises(UserError, match=r"own .* no counterpart"):
        WeightAverage([(teacher, model)])
    del teacher.own
    model.momentum_model = teacher  # where main.py has it
    WeightAverage([(teacher, model)]).update(0.9)
    torch.testing.assert_close(
        teacher.text_projector.weight, 0.9 * before + 0.1 * model.text_projector.weight
    )
    batch = toy_batch()
    guided = model(**batch)["siamlip_loss"]
    with torch.no_grad():
        targets = teacher.features(**batch)
    assert guided == model.losses(model.features(**batch), targets)["siamlip_loss"]
    guided.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    del model.momentum_model
    assert model(**batch)["siamlip_loss"] != guided


def test_prototypes_freeze():
    model = toy("CLIP_VITB16_SWALIPV1")
    losses_with_total(model, toy_batch())["loss"].backward()
    assert model.image_prototypes.weight_v.grad is not None
    model.freeze_prototypes()
    assert model.image_prototypes.weight_v.grad is None
    assert (
        not model.image_prototypes.weight_g.requires_grad
        and not model.swalip_logit_scale.requires_grad
    )


@pytest.mark.parametrize(
    "model, size, device, refused",
    [
        ("CL2L_RT_CL2L", 16, "cuda", True),
        ("CL2L_RT_CL2L", 32, "cuda", False),
        ("CL2L_RT_CL2L", 16, "cpu", False),
        ("CL2L_VITT8_CL2L", 16, "cuda", False),
    ],
)
def test_compiled_pooling_of_tiny_images(model, size, device, refused):
    """On an H200, torch 2.11, compiled gradients of a residual network at 16 px were wrong."""
    expected = pytest.raises(UserError, match="--image_size 16") if refused else nullcontext()
    with expected:
        check_compiled_pooling(DualConfig(model=model, image_size=size), torch.device(device))
