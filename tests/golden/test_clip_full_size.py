"""Real dimensions with recipe weights: the features of clip-rocket's and SLIP's networks."""

import pytest
import torch

from models.dual_encoder.factory import build_dual
from tests.golden.clip_cases import close, config_of, recipe_state
from tests.golden.report import compare, same
from tests.golden.test_clip_openai import recipe_tensor_plain
from tests.helpers.golden import golden_json, golden_tensors, recorded

EVERYDAY = 100_000_000  # parameters; larger networks are left to -m slow
SHAPE = (2, 3, 224, 224)  # of the recorded images


def rocket_cases() -> list:
    """Names of the recorded networks."""
    names = recorded("clip_rocket", "full_size", "cases.json", within="cases")
    cases = (
        golden_json("clip_rocket", "full_size", "cases.json")["cases"]
        if isinstance(names[0], str)
        else {}
    )
    large = [name for name in cases if cases[name]["parameters"] > EVERYDAY]
    return [pytest.param(name, marks=pytest.mark.slow) if name in large else name for name in names]


def with_recipe(config, seed: int):
    """The model, built without spending time on initial values."""
    with torch.device("meta"):
        model = build_dual(config)
    shapes = {k: [list(v.shape), str(v.dtype)] for k, v in model.state_dict().items()}
    model.load_state_dict(recipe_state(shapes, seed, half=False), assign=True)
    return model.eval()


@pytest.mark.parametrize("name", rocket_cases())
def test_rocket(name):
    meta = golden_json("clip_rocket", "full_size", "cases.json")
    outputs = golden_tensors("clip_rocket", "full_size", "outputs.safetensors")
    case = meta["cases"][name]
    model = with_recipe(config_of(case["model"], case["flags"]), meta["seed"])
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    names = ("image", "image_local.0", "image_local.1")
    images = [recipe_tensor_plain(name, SHAPE, meta["seed"]) for name in names]
    batch = {
        "image": images[0],
        "image_local": torch.stack(images[1:], 1),
        "text_ids": outputs["text"],
    }
    with torch.no_grad():
        out = model(features_only=True, **batch)
    compare(
        f"clip_rocket full_{name}",
        "mean of features",
        out["feats_image"].abs().mean(),
        case["feats_absmean"],
        1e-5,
    )
    for key in [k for k in outputs if k.startswith(f"{name}/eval.")]:
        stem, _, index = key.split("/eval.")[1].partition(".")
        actual = out[stem][:, int(index)] if index else out[stem]
        close(
            actual[:, :256] if actual.ndim == 2 else actual,
            outputs[key],
            f"full_{name} eval {stem}",
        )


def slip_cases() -> list:
    return [
        name
        for name in recorded("clip_rocket", "slip", "cases.json", within="cases")
        if "full_" in str(name)
    ]


@pytest.mark.parametrize("name", slip_cases())
def test_slip(name):
    meta = golden_json("clip_rocket", "slip", "cases.json")
    outputs = golden_tensors("clip_rocket", "slip", "outputs.safetensors")
    expected = meta["cases"][name]
    width = expected["state"]["image_projection"][0][1]
    model = with_recipe(config_of(name.removeprefix("full_"), [], embed_dim=width), meta["seed"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    same(
        name, "keys and shapes", shapes, {key: value[0] for key, value in expected["state"].items()}
    )
    same(name, "parameters", sum(p.numel() for p in model.parameters()), expected["parameters"])
    images = [recipe_tensor_plain(n, SHAPE, meta["seed"]) for n in ("image", "aug1", "aug2")]
    batch = {
        "image": images[0],
        "image_local": torch.stack(images[1:], 1),
        "text_ids": outputs[f"{name}/text"],
    }
    with torch.no_grad():
        out = model(features_only=True, **batch)
    prefix = f"{name}/eval."
    for key in [key for key in outputs if key.startswith(prefix)]:
        close(
            out[key.removeprefix(prefix)], outputs[key], f"{name} eval {key.removeprefix(prefix)}"
        )
