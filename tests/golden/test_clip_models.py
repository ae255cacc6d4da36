"""Forward values, losses, gradients and buffers of clip-rocket's and SLIP's networks with recorded
weights."""

import pytest
import torch

from evaluation.zeroshot import class_scores
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.dual_encoder.losses import normalize
from tests.golden.clip_cases import close, close_sums, config_of, recipe_state, toy_vit, views_of
from tests.golden.report import same
from tests.helpers.clip_toys import with_total
from tests.helpers.golden import golden_file, golden_json, golden_root, golden_tensors, recorded

BEHIND_BATCH_NORM = 1e-4


def load(folder: str) -> tuple[dict, dict, dict]:
    meta = golden_json("clip_rocket", folder, "cases.json")
    inputs = golden_tensors("clip_rocket", folder, "inputs.safetensors")
    outputs = golden_tensors("clip_rocket", folder, "outputs.safetensors")
    scale = meta["image_scale"]
    return (
        meta,
        {k: v.float() * scale if v.dtype == torch.int8 else v for k, v in inputs.items()},
        outputs,
    )


def batch_of(inputs: dict, local: list[str]) -> dict:
    image_local = torch.stack([inputs[k] for k in local], 1)
    return {"image": inputs["image"], "image_local": image_local, "text_ids": inputs["text"]}


def check_outputs(out: dict, outputs: dict, prefix: str, tolerance: float) -> None:
    expected = {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)}
    for key, value in expected.items():
        stem, _, index = key.partition(".")
        close(out[stem][:, int(index)] if index else out[stem], value, prefix + key, tolerance)


def built(meta: dict, case: dict, compat: str = "original"):
    model = build_dual(
        config_of(case["model"], case["flags"], meta["config"], compat=compat),
        toy_vit(meta["config"]),
    )
    assert list(model.state_dict()) == list(case["state"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: v[0] for k, v in case["state"].items()
    }
    assert [k for k, _ in model.named_parameters()] == case["parameters_in_order"]
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == case["frozen"]
    model.load_state_dict(recipe_state(case["state"], meta["config"]["seed"], half=True))
    return model


@pytest.mark.parametrize("name", recorded("clip_rocket", "models", "cases.json", within="cases"))
def test_rocket(name):
    meta, inputs, outputs = load("models")
    case = meta["cases"][name]
    model = built(meta, case)
    batch = batch_of(inputs, views_of(inputs))
    tolerance = BEHIND_BATCH_NORM if case.get("buffers_after_train") else 1e-5
    with torch.no_grad():
        model.eval()
        whole = model(features_only=True, **batch)
        check_outputs(whole, outputs, f"{name}/eval.", 1e-5)
        image, text = model.embed_image(batch["image"]), model.embed_text(inputs["text_eval"])
        found = {
            f"{key}_{side}": v
            for side, out in (("image", image), ("text", text))
            for key, v in out.items()
        }
        # what training alone needs is no embedding of ours, but a feature
        several = batch["image"][:1].expand(len(inputs["text_eval"]), -1, -1, -1)
        others = model(image=several, text_ids=inputs["text_eval"], features_only=True)
        for side in ("image", "text"):
            prefix = f"{name}/encode_{side}_val."
            for key in [key.removeprefix(prefix) for key in outputs if key.startswith(prefix)]:
                features = whole if side == "image" else others
                ours = found[key] if key in found else features[key]
                close(ours, outputs[prefix + key], f"{name}/encode_{side}_val {key}")
        classifier = {key: normalize(text[key]) for key in ("z", "h") if key in text}
        scores = class_scores(image, classifier)
        similarities = {f"{key}_sim": scores[key] for key in classifier}
        check_outputs(similarities, outputs, f"{name}/predict_zeroshot.", 1e-5)
    model.train()
    out = model(features_only=True, **batch)
    check_outputs(out, outputs, f"{name}/train.", tolerance)
    if "losses" not in case:
        return
    losses = with_total(model.losses(out), model.config)
    assert set(losses) == set(case["losses"])
    for key, expected in case["losses"].items():
        close(losses[key], expected, f"{name} {key}", tolerance)
    losses["loss"].backward()
    check_gradients(name, model, case)


def check_gradients(name, model, case) -> None:
    largest = max(expected[1] for expected in case["grad_sum_norm"].values() if expected)
    for key, expected in case["grad_sum_norm"].items():
        grad = model.get_parameter(key).grad
        if expected is None:
            assert grad is None, f"{name}: {key} should have no gradient"
            continue
        # biases in front of a norm have no gradient but rounding noise
        close_sums(grad, expected, f"{name} gradient of {key}", 1e-4, noise=1e-3 * largest)
    for key, expected in case["buffers_after_train"].items():
        buffer = model.get_buffer(key)
        close_sums(buffer.double(), expected, f"{name} buffer {key}", 1e-5)


def stored_states() -> list[str]:
    """The cases whose whole state dict is recorded."""
    root = golden_root()
    files = sorted((root / "clip_rocket" / "models").glob("*.state.safetensors")) if root else []
    return [file.name.removesuffix(".state.safetensors") for file in files]


@pytest.mark.parametrize("name", stored_states())
def test_stored_state_dict_loads(name):
    meta, inputs, outputs = load("models")
    model = built(meta, meta["cases"][name])
    recipe = {key: value.clone() for key, value in model.state_dict().items()}
    stored = golden_tensors("clip_rocket", "models", f"{name}.state.safetensors")
    losers = meta["cases"][name]["overwritten_aliases"]
    for key, value in recipe.items():
        if key not in losers and value.is_floating_point():
            close(value, stored[key], f"{name} weights {key}", 1e-6)
    model.load_state_dict(stored)
    with torch.no_grad():
        out = model.eval()(features_only=True, **batch_of(inputs, views_of(inputs)))
    check_outputs(out, outputs, f"{name}/eval.", 1e-5)


def toy_slip() -> list:
    return [
        name
        for name in recorded("clip_rocket", "slip", "cases.json", within="cases")
        if "full" not in str(name)
    ]


@pytest.mark.parametrize("name", toy_slip())
def test_slip(name):
    meta, inputs, outputs = load("slip")
    case, toy = meta["cases"][name], meta["config"]
    config = config_of(
        f"{name}_VITB16",
        [],
        toy,
        ssl_mlp_dim=toy["mlp"],
        ssl_emb_dim=toy["sem"],
        ssl_temp=toy["tau"],
    )
    model = build_dual(config, toy_vit(toy))
    assert list(model.state_dict()) == list(case["state"])
    recipe = recipe_state(case["state"], meta["seed"], half=True)
    model.load_state_dict(recipe)
    file = golden_file("clip_rocket", "slip").joinpath(f"{name}.state.safetensors")
    if file.exists():
        for key, value in golden_tensors("clip_rocket", "slip", file.name).items():
            close(recipe[key], value, f"{name} weights {key}", 1e-6)
    batch = batch_of(inputs, ["aug1", "aug2"])
    tolerance = BEHIND_BATCH_NORM if case["buffers_after_train"] else 1e-5
    with torch.no_grad():
        check_outputs(model.eval()(features_only=True, **batch), outputs, f"{name}/eval.", 1e-5)
        embedded = model.embed_image(inputs["aug1" if name == "SIMCLR" else "image"])
        close(
            embedded.get("z", embedded["feats"]),
            outputs[f"{name}/encode_image"],
            f"{name} encode_image",
        )
    out = model.train()(features_only=True, **batch)
    check_outputs(out, outputs, f"{name}/train.", tolerance)
    losses = with_total(model.losses(out), model.config)
    assert set(losses) == set(case["losses"])
    for key, expected in case["losses"].items():
        close(losses[key], expected, f"{name} {key}", tolerance)
    losses["loss"].backward()
    check_gradients(name, model, case)


def flags_of(name: str) -> tuple[str, list[str]]:
    """`MODEL+flag+cl2l-txt-proj-typelinear` -> model string and flags; a flag's value, if any,
    follows its name."""
    known = sorted(
        (field.replace("_", "-") for field in DualConfig.__dataclass_fields__),
        key=len,
        reverse=True,
    )
    model, *words = name.split("+")
    flags = []
    for word in words:
        stem = next(field for field in known if word.startswith(field))
        flags.append(f"--{stem}")
        if word != stem:
            flags.append(word.removeprefix(stem))
    return model, flags


@pytest.mark.parametrize("name", recorded("clip_rocket", "state_keys", "summary.json"))
def test_state_keys(name):
    expected = golden_json("clip_rocket", "state_keys", f"{name}.json")
    summary = golden_json("clip_rocket", "state_keys", "summary.json")[name]
    with torch.device("meta"):
        model = build_dual(config_of(*flags_of(name)))
    actual = {
        k: [list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in model.state_dict().items()
    }
    case = f"clip_rocket {name}"
    same(case, "keys in order", list(actual), list(expected))
    same(case, "shapes and types", actual, expected)
    same(case, "number of keys", len(actual), summary["keys"])
    same(case, "parameters", sum(p.numel() for p in model.parameters()), summary["parameters"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    same(case, "trained parameters", trained, summary["trainable"])
