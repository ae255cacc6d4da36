"""Real dimensions with recipe weights: the features of clip-rocket's and SLIP's networks."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.dual_encoder.factory import build_dual
from tests.golden.clip_cases import close, config_of, recipe_state
from tests.golden.test_clip_openai import recipe_tensor_plain
from tests.helpers.golden import golden_file

ROCKET = [
    "CL2L_R50_CL2L+separate-proj",
    pytest.param(
        "CL2L_VITS16MOCO_BARLIP+separate-proj+separate-proj-child", marks=pytest.mark.slow
    ),
    pytest.param("CL2L_VITB16_SIAMLIP+separate-proj", marks=pytest.mark.slow),
    "CL2L_VITS32_CL2L+embed-dim512+transformer-layers6",
]


def with_recipe(config, seed: int):
    """The model, built without spending time on initial values."""
    with torch.device("meta"):
        model = build_dual(config)
    shapes = {k: [list(v.shape), str(v.dtype)] for k, v in model.state_dict().items()}
    model.load_state_dict(recipe_state(shapes, seed, half=False), assign=True)
    return model.eval()


@pytest.mark.parametrize("name", ROCKET)
def test_rocket(name):
    meta = json.loads(golden_file("clip_rocket", "full_size", "cases.json").read_text())
    outputs = load_file(golden_file("clip_rocket", "full_size", "outputs.safetensors"))
    case = meta["cases"][name]
    model = with_recipe(config_of(case["model"], case["flags"]), meta["seed"])
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    images = [
        recipe_tensor_plain(n, (2, 3, 224, 224), meta["seed"])
        for n in ("image", "image_local.0", "image_local.1")
    ]
    batch = {
        "image": images[0],
        "image_local": torch.stack(images[1:], 1),
        "text_ids": outputs["text"],
    }
    with torch.no_grad():
        out = model(features_only=True, **batch)
    for key in [k for k in outputs if k.startswith(f"{name}/eval.")]:
        stem, _, index = key.split("/eval.")[1].partition(".")
        actual = out[stem][:, int(index)] if index else out[stem]
        close(
            actual[:, :256] if actual.ndim == 2 else actual,
            outputs[key],
            f"full_{name} eval {stem}",
        )


def test_slip():
    meta = json.loads(golden_file("clip_rocket", "slip", "cases.json").read_text())
    outputs = load_file(golden_file("clip_rocket", "slip", "outputs.safetensors"))
    name = "full_SLIP_VITS16"
    model = with_recipe(config_of("SLIP_VITS16", [], embed_dim=512), meta["seed"])
    assert list(model.state_dict()) == list(meta["cases"][name]["state"])
    assert sum(p.numel() for p in model.parameters()) == meta["cases"][name]["parameters"]
    images = [
        recipe_tensor_plain(n, (2, 3, 224, 224), meta["seed"]) for n in ("image", "aug1", "aug2")
    ]
    batch = {
        "image": images[0],
        "image_local": torch.stack(images[1:], 1),
        "text_ids": outputs[f"{name}/text"],
    }
    with torch.no_grad():
        out = model(features_only=True, **batch)
    for key in ("image_embed", "text_embed", "aug1_embed", "aug2_embed", "logit_scale"):
        close(out[key], outputs[f"{name}/eval.{key}"], f"{name} eval {key}")
