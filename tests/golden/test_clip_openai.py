"""OpenAI's checkpoint layout: recorded state dicts, shapes inferred, features and logits."""

import pytest
import torch
from safetensors.torch import load_file

from models.layers.openai_towers import OPENAI_MODELS
from models.weights.clip import load_openai, openai_config
from tests.golden.clip_cases import close, recipe_state, recipe_tensor
from tests.golden.report import compare, same
from tests.helpers.golden import golden_file, golden_json, golden_tensors, recorded


def load() -> tuple[dict, dict]:
    meta = golden_json("clip_rocket", "openai_clip", "cases.json")
    return meta, golden_tensors("clip_rocket", "openai_clip", "outputs.safetensors")


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
    layers = config.vision_layers
    found = {
        "embed_dim": config.embed_dim,
        "image_resolution": config.image_size,
        "vision_layers": layers if isinstance(layers, int) else list(layers),
        "vision_width": config.vision_width,
        "vision_patch_size": config.patch_size or None,
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
        "transformer_width": config.text.width,
        "transformer_heads": config.text.heads,
        "transformer_layers": config.text.layers,
    }
    for quantity, theirs in arguments.items():
        same(f"openai_{name}", quantity, found[quantity], theirs)
    model = load_openai(state).eval()
    same(
        f"openai_{name}",
        "parameters",
        sum(p.numel() for p in model.parameters()),
        case["parameters"],
    )
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    same(
        f"openai_{name}",
        "keys and shapes",
        shapes,
        {key: value[0] for key, value in case["state"].items()},
    )
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


NAMES = recorded("clip_rocket", "openai_clip", "cases.json", within="cases")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_weights(name):
    meta, outputs = load()
    case = meta["cases"][name]
    check(name, released_state(case, meta["seed"]), case, outputs, meta["seed"])


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny_vit" in str(name)])
def test_stored_mixed_precision_state_dict(name):
    meta, outputs = load()
    case = meta["cases"][name]
    stored = load_file(golden_file("clip_rocket", "openai_clip", f"{name}.state.safetensors"))
    assert {"input_resolution", "context_length", "vocab_size"} <= stored.keys()
    for key, value in released_state(case, meta["seed"]).items():
        assert value.is_floating_point() == stored[key].is_floating_point()
        if key in case["state"]:
            same(
                f"openai_{name}",
                "type of the weights",
                str(stored[key].dtype),
                f"torch.{case['state'][key][1]}",
            )
            compare(f"openai_{name}", "weights", value.float(), stored[key].float(), 1e-6)
    check(name, stored, case, outputs, meta["seed"])


@pytest.mark.parametrize("name", [name for name in NAMES if "full_" in str(name)])
def test_sizes_of_the_release(name):
    case = load()[0]["cases"][name]
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in case["state"].items()}
    assert openai_config(state) == OPENAI_MODELS[name.removeprefix("full_")]
