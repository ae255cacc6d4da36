"""Weights of ViTs go over to timm, transformers and TensorFlow's names and back, and the networks
then agree."""

import pytest
import torch
from torch import nn

from base.errors import UserError
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.weights.vit import (
    load_vit,
    native,
    to_timm,
    to_transformers,
    transformers_config,
    vit_kind,
)
from tests.helpers.tensorflow_vit import to_tensorflow

SIZES = {"model": "vit-mu/8", "image_size": 32, "num_classes": 7}


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def ours(**options) -> VisionClassifier:
    return shaken(VisionClassifier(ClassifierConfig(**SIZES, **options)))


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 7,
    }
    return VisionTransformer(**sizes, act_layer=lambda: nn.GELU(approximate="tanh")).eval()


def image():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_timm_both_ways():
    theirs, mine = timm_vit(), ours()
    assert theirs.load_state_dict(to_timm(mine.state_dict()))
    torch.testing.assert_close(theirs(image()), mine.logits(image()), rtol=1e-5, atol=1e-5)
    shaken(theirs)
    fresh = VisionClassifier(mine.options)
    assert not load_vit(fresh, theirs.state_dict())
    torch.testing.assert_close(theirs(image()), fresh.eval().logits(image()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_transformers_both_ways(pooled, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    mine = ours(representation_size=12 if pooled else 0)
    config = ViTConfig(**transformers_config(mine.options), num_labels=7)
    theirs = (ViTModel if pooled else ViTForImageClassification)(config).eval()
    state = to_transformers(mine.state_dict(), names=5)
    if pooled:
        state = {
            key.removeprefix("vit."): value
            for key, value in state.items()
            if not key.startswith("classifier")
        }
    assert theirs.load_state_dict(state)

    def outputs(mine):
        if pooled:
            return theirs(image()).pooler_output, mine.pre_logits(mine.features(image()))
        return theirs(image()).logits, mine.logits(image())

    torch.testing.assert_close(*outputs(mine), rtol=1e-5, atol=1e-5)
    shaken(theirs)
    fresh = VisionClassifier(mine.options)
    left_out = load_vit(fresh, theirs.state_dict())
    assert left_out.missing == (["head.weight", "head.bias"] if pooled else [])
    torch.testing.assert_close(*outputs(fresh.eval()), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path)  # under the names of the hub, whatever those are in memory
    from safetensors.torch import load_file

    saved = native(load_file(tmp_path / "model.safetensors"))
    assert (
        all(torch.equal(value, fresh.state_dict()[key]) for key, value in saved.items())
        and len(saved) > 30
    )


@pytest.mark.parametrize("width", [0, 12])
def test_every_kind_and_back_is_the_same(width):
    state = ours(representation_size=width).state_dict()
    kinds = {"tensorflow": to_tensorflow(state), "transformers": to_transformers(state)}
    if not width:
        kinds["native"] = to_timm(state)
    for kind, other in kinds.items():
        assert vit_kind(other) == kind
        back = native(other)
        assert back.keys() == state.keys() and all(
            torch.equal(back[key], state[key]) for key in state
        )


def test_exports_of_the_model_and_the_backbone_alone():
    state = ours(representation_size=12).state_dict()
    keys = to_tensorflow(state)
    model = {
        key.replace("backbone/", "layer_with_weights-0/").replace("model/layer", "layer"): v
        for key, v in keys.items()
    }
    backbone = {
        key.removeprefix("backbone/"): v for key, v in keys.items() if key.startswith("backbone/")
    }
    assert native(model).keys() == state.keys()
    assert native(backbone).keys() == {key for key in state if not key.startswith("head.")}


def test_averaged_weights_are_taken():
    state = to_tensorflow(ours().state_dict())
    slots = {f"{key}/.OPTIMIZER_SLOT/optimizer/average": value + 1 for key, value in state.items()}
    momentum = {
        f"{key}/.OPTIMIZER_SLOT/optimizer/base_optimizer/momentum": value
        for key, value in state.items()
    }
    counters = {"save_counter": torch.tensor(3), "optimizer/decay": torch.tensor(0.9)}
    whole = {
        f"{k}/.ATTRIBUTES/VARIABLE_VALUE": v
        for k, v in (state | slots | momentum | counters).items()
    }
    found = native(whole)
    assert torch.equal(found["head.bias"], state["model/layer_with_weights-1/bias"] + 1)
    own = ours().state_dict()
    both = own | {f"ema.{key}": value + 1 for key, value in own.items()}
    assert torch.equal(native(both)["head.bias"], own["head.bias"] + 1)


def test_fine_tuning_drops_pre_logits_and_resizes_positions():
    pretrained = ours(representation_size=12)
    model = VisionClassifier(ClassifierConfig(**SIZES | {"image_size": 48, "num_classes": 5}))
    left_out = load_vit(model, pretrained.state_dict())
    assert left_out.missing == ["head.weight", "head.bias"]
    assert left_out.unexpected == ["pre_logits.fc.weight", "pre_logits.fc.bias"]
    assert model.pos_embed.shape == (1, 37, 32) and model.head.weight.eq(0).all()
    for old, new in (
        (0, 0),
        (3, 5),
        (12, 30),
        (15, 35),
    ):  # corners stay corners, as COYO-ViT's zoom
        expected = pretrained.pos_embed[0, 1 + old]
        torch.testing.assert_close(model.pos_embed[0, 1 + new], expected)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, pretrained.blocks[1].mlp.fc2.weight)


def test_weights_that_do_not_fit_are_refused():
    state = ours().state_dict()
    for change, words in (
        ({"dist_token": torch.zeros(1)}, "dist_token"),
        ({"blocks.2.norm1.weight": torch.zeros(32)}, "does not fit"),
    ):
        with pytest.raises(UserError, match=words):
            load_vit(ours(), state | change)
    with pytest.raises(UserError, match="no weights of a vision transformer"):
        load_vit(ours(), {"conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="key or value projection"):
        whole = to_transformers(state)
        whole.pop("vit.encoder.layer.0.attention.attention.key.weight")
        native(whole)
    more = {"backbone/enc_layers/0/scale/kernel": torch.zeros(32, 32)}  # computes something else
    with pytest.raises(UserError, match=r"1 unexpected: backbone/enc_layers/0/scale\.weight"):
        load_vit(ours(), to_tensorflow(state) | more)
    with pytest.raises(UserError, match=r"blocks\.0\.scale\.weight: not a weight"):
        to_transformers(state | {"blocks.0.scale.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="no pre-logits layer"):
        to_timm(ours(representation_size=12).state_dict())
    with pytest.raises(UserError, match="no class token and a square"):
        load_vit(ours(), state | {"pos_embed": torch.zeros(1, 16, 32)})
