"""OpenAI's checkpoint layout: recorded state dicts, shapes inferred, features and logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.layers.openai_towers import OPENAI_MODELS
from models.weights.clip import load_openai, openai_config
from tests.golden.clip_cases import close, recipe_state, recipe_tensor
from tests.helpers.golden import golden_file


def load() -> tuple[dict, dict]:
    meta = json.loads(golden_file("clip_rocket", "openai_clip", "cases.json").read_text())
    return meta, load_file(golden_file("clip_rocket", "openai_clip", "outputs.safetensors"))


def released_state(case: dict, seed: int) -> dict:
    """Recipe weights in the precision of the release, with the three scalars it carries."""
    state = recipe_state(case["state"], seed, half=False)
    half = {
        name: value.half() if case["state"][name][1] == "float16" else value
        for name, value in state.items()
    }
    return half | {
        name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")
    }


def check(name: str, state: dict, case: dict, outputs: dict, seed: int) -> None:
    arguments = case["arguments"]
    config = openai_config(state)
    assert (config.embed_dim, config.image_size) == (
        arguments["embed_dim"],
        arguments["image_resolution"],
    )
    layers = arguments["vision_layers"]
    assert config.vision_layers == (layers if isinstance(layers, int) else tuple(layers))
    assert (config.vision_width, config.patch_size or None) == (
        arguments["vision_width"],
        arguments["vision_patch_size"],
    )
    model = load_openai(state).eval()
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    assert list(model.state_dict()) == [k for k in case["state"]]
    count = len(outputs[f"{name}/encode_image"])
    image = recipe_tensor_plain("image", (count, 3, config.image_size, config.image_size), seed)
    with torch.no_grad():
        out = model(image=image, text_ids=outputs[f"{name}/text"][:count], features_only=True)
        text = model.embed_text(outputs[f"{name}/text"])["z"]
    close(out["z_image"], outputs[f"{name}/encode_image"], f"openai_{name} encode_image_val")
    close(text, outputs[f"{name}/encode_text"], f"openai_{name} encode_text_val")
    unit = out["z_image"] / out["z_image"].norm(dim=-1, keepdim=True)
    logits = out["logit_scale"] * unit @ (text / text.norm(dim=-1, keepdim=True)).T
    close(logits, outputs[f"{name}/logits_per_image"], f"openai_{name} predict_zeroshot")
    close(logits.T, outputs[f"{name}/logits_per_text"], f"openai_{name} predict_zeroshot")


def recipe_tensor_plain(name: str, shape: tuple, seed: int) -> torch.Tensor:
    """The recipe's x, before any rule."""
    return recipe_tensor(name, shape, seed) * (torch.Size(shape).numel() / shape[0]) ** 0.5


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_rn", "full_ViT-B-32"])
def test_recipe_weights(name):
    meta, outputs = load()
    case = meta["cases"][name]
    check(name, released_state(case, meta["seed"]), case, outputs, meta["seed"])


def test_stored_mixed_precision_state_dict():
    meta, outputs = load()
    stored = load_file(golden_file("clip_rocket", "openai_clip", "tiny_vit.state.safetensors"))
    assert {"input_resolution", "context_length", "vocab_size"} <= stored.keys()
    check("tiny_vit", stored, meta["cases"]["tiny_vit"], outputs, meta["seed"])


def test_sizes_of_the_release():
    meta, _ = load()
    case = meta["cases"]["full_ViT-B-32"]
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in case["state"].items()}
    assert openai_config(state) == OPENAI_MODELS["ViT-B-32"]
