"""Forward values, losses, gradients and buffers of clip-rocket's and SLIP's networks with recorded
weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.dual_encoder.base import names_by_decay, zeroshot_similarities
from models.dual_encoder.factory import build_dual
from tests.golden.clip_cases import close, config_of, recipe_state, sum_and_norm, toy_vit
from tests.helpers.golden import golden_file

ROCKET = """clip_linear clip_mlp_detach cl2l_separate cl2l_separate_linear_local cl2l_shared cl2l_mlp_shared
    cl2l_separate_droppath1 cl2l_separate_dropout1 barlip barlip_child siamlip siamlip_child siamlip_child_nobn swalip
    swalipv1 swalipv1_noshare_learn""".split()
BEHIND_BATCH_NORM = 1e-4


def load(folder: str) -> tuple[dict, dict, dict]:
    meta = json.loads(golden_file("clip_rocket", folder, "cases.json").read_text())
    inputs = load_file(golden_file("clip_rocket", folder, "inputs.safetensors"))
    outputs = load_file(golden_file("clip_rocket", folder, "outputs.safetensors"))
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
        close(
            out[stem][:, int(index)] if index else out[stem],
            value,
            prefix + key,
            tolerance,
            tolerance,
        )


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


@pytest.mark.parametrize("name", ROCKET)
def test_rocket(name):
    meta, inputs, outputs = load("models")
    case = meta["cases"][name]
    model = built(meta, case)
    batch = batch_of(inputs, ["image_local.0", "image_local.1"])
    tolerance = BEHIND_BATCH_NORM if case.get("buffers_after_train") else 1e-5
    with torch.no_grad():
        model.eval()
        check_outputs(model(features_only=True, **batch), outputs, f"{name}/eval.", 1e-5)
        image, text = model.embed_image(batch["image"]), model.embed_text(inputs["text_eval"])
        for side, out in (("image", image), ("text", text)):
            for key, value in out.items():
                close(
                    value,
                    outputs[f"{name}/encode_{side}_val.{key}_{side}"],
                    f"{name}/encode_{side}_val {key}",
                )
        check_outputs(
            zeroshot_similarities(image, text), outputs, f"{name}/predict_zeroshot.", 1e-5
        )
    model.train()
    out = model(features_only=True, **batch)
    check_outputs(out, outputs, f"{name}/train.", tolerance)
    if "losses" not in case:
        return
    losses = model.losses(out)
    assert set(losses) == set(case["losses"])
    for key, expected in case["losses"].items():
        close(losses[key], expected, f"{name} {key}", tolerance, tolerance)
    losses["loss"].backward()
    check_gradients(name, model, case, tolerance)


def check_gradients(name, model, case, tolerance) -> None:
    for key, expected in case["grad_sum_norm"].items():
        grad = model.get_parameter(key).grad
        if expected is None:
            assert grad is None, f"{name}: {key} should have no gradient"
            continue
        close(sum_and_norm(grad), expected, f"{name} gradient of {key}", tolerance, tolerance)
    for key, expected in case["buffers_after_train"].items():
        buffer = model.get_buffer(key)
        expected = (
            expected
            if buffer.is_floating_point()
            else expected[:1]
            if isinstance(expected, list)
            else expected
        )
        actual = sum_and_norm(buffer) if buffer.is_floating_point() else buffer.double().reshape(-1)
        close(actual, expected, f"{name} buffer {key}", 1e-4, 1e-4)


def test_every_recorded_case_is_tested():
    assert set(load("models")[0]["cases"]) == set(ROCKET)


@pytest.mark.parametrize("name", ["cl2l_separate", "siamlip", "swalipv1"])
def test_stored_state_dict_loads(name):
    meta, inputs, outputs = load("models")
    model = built(meta, meta["cases"][name])
    stored = load_file(golden_file("clip_rocket", "models", f"{name}.state.safetensors"))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    with torch.no_grad():
        out = model.eval()(
            features_only=True, **batch_of(inputs, ["image_local.0", "image_local.1"])
        )
    check_outputs(out, outputs, f"{name}/eval.", 1e-5)


SLIP_TOY = {"ctx": "context_length", "vocab": "vocab_size", "tw": "text_width", "th": "text_heads"}


@pytest.mark.parametrize("name", ["CLIP", "SLIP", "SIMCLR"])
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
    model.load_state_dict(recipe_state(case["state"], meta["seed"], half=True))
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
    losses = model.losses(out)
    assert set(losses) == set(case["losses"])
    for key, expected in case["losses"].items():
        close(losses[key], expected, f"{name} {key}", tolerance, tolerance)
    losses["loss"].backward()
    check_gradients(name, model, case, tolerance)


KEYS = """CL2L_CNEXTS_CL2L+separate-proj CL2L_CNEXTT_CL2L+separate-proj CL2L_R50_BARLIP+separate-proj
    CL2L_R50_CL2L+separate-proj+cl2l-txt-proj-typelinear+cl2l-img-proj-typelinear
    CL2L_R50_CL2L+separate-proj+clip-proj-typemlp CL2L_R50_CL2L+separate-proj CL2L_R50_CL2L
    CL2L_R50_SIAMLIP+separate-proj+siamlip-no-last-bn CL2L_R50_SIAMLIP+separate-proj CL2L_R50_SWALIP+separate-proj
    CL2L_VITB16_CL2L+separate-proj CL2L_VITB32_CL2L+separate-proj CL2L_VITL16_CL2L+separate-proj
    CL2L_VITS16MOCO_BARLIP+separate-proj+separate-proj-child CL2L_VITS16MOCO_CL2L+separate-proj
    CL2L_VITS16MOCO_SIAMLIP+separate-proj+separate-proj-child CL2L_VITS16MOCO_SWALIP+separate-proj+separate-proj-child
    CL2L_VITS16_CL2L+separate-proj CL2L_VITS32_CL2L+separate-proj CLIP_R50_CLIP CLIP_R50_SWALIPV1 CLIP_VITB16_CLIP
    CLIP_VITB16_SWALIPV1+swalip-no-shared-proto CLIP_VITL16_CLIP""".split()


def flags_of(name: str) -> tuple[str, list[str]]:
    """`MODEL+flag+cl2l-txt-proj-typelinear` -> model string and flags."""
    model, *words = name.split("+")
    flags = []
    for word in words:
        stem, kind = (word[:-3], ["mlp"]) if word.endswith("mlp") else (word, [])
        stem, kind = (word[:-6], ["linear"]) if word.endswith("linear") else (stem, kind)
        flags += [f"--{stem}", *kind]
    return model, flags


@pytest.mark.parametrize("name", KEYS)
def test_state_keys(name):
    expected = json.loads(golden_file("clip_rocket", "state_keys", f"{name}.json").read_text())
    summary = json.loads(golden_file("clip_rocket", "state_keys", "summary.json").read_text())[name]
    with torch.device("meta"):
        model = build_dual(config_of(*flags_of(name)))
    actual = {
        k: [list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in model.state_dict().items()
    }
    assert list(actual) == list(expected)
    assert actual == expected
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == summary["trainable"]


GROUPS = [
    "CL2L_R50_CL2L",
    "CL2L_VITS16MOCO_BARLIP",
    "CL2L_R50_SIAMLIP",
    "CL2L_VITB16_CL2L",
    "CLIP_R50_SWALIPV1",
]


@pytest.mark.parametrize("name", GROUPS)
def test_weight_decay_groups(name):
    case = json.loads(golden_file("clip_rocket", "optim", "param_groups.json").read_text())[
        "cases"
    ][name]
    with torch.device("meta"):
        model = build_dual(config_of(case["flags"][1], case["flags"][2:]))
    decay, no_decay = names_by_decay(model, original=True)
    assert (decay, no_decay) == (case["decay"], case["no_decay"])
