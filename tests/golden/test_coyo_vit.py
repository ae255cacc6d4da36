"""Network, losses, optimizers, schedules, positions and whole training steps against the numbers of
COYO-ViT."""

import copy

import pytest
import torch
from torch import nn

from models.classification.classifier import (
    SIZES,
    ClassifierConfig,
    VisionClassifier,
    clipped_sigmoid_loss,
    follow,
    resize_positions,
    sigmoid_loss,
    softmax_loss,
    trained,
)
from models.weights.vit import native, to_tensorflow
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Schedule, learning_rate
from tests.golden.report import compare
from tests.helpers.golden import golden, golden_file

SPARSE = 16  # more labels than any golden row has classes


@pytest.fixture(autouse=True)
def toy_size(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", (32, 2, 4))


class Toy(VisionClassifier):
    """The goldens' MLP is twice as wide as the model, not four times."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)


def toy(tensors, prefix: str, **options) -> VisionClassifier:
    state = native({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    width = len(state["pre_logits.fc.bias"]) if "pre_logits.fc.bias" in state else 0
    sizes = {
        "model": "vit-toy/8",
        "image_size": 32,
        "num_classes": 11,
        "representation_size": width,
    }
    model = Toy(ClassifierConfig(**sizes, compat="original", **options))
    model.load_state_dict(state)
    return model


def sparse(targets):
    """Labels and weights of dense targets [B,C]."""
    return torch.arange(targets.shape[1]).expand(len(targets), -1), targets


def nchw(image):
    return image.permute(0, 3, 1, 2).contiguous()


def test_forward_and_gradients():
    _, t = golden("coyo_vit", "vit_tiny")
    model = toy(t, "weight.", loss="sigmoid")
    image = nchw(t["x_nhwc"]).requires_grad_()
    logits = model.logits(image)
    features = model.pre_logits(model.features(image))
    (logits * t["cotangent"]).sum().backward()
    compare("coyo_vit vit_tiny", "logits", logits, t["logits"], 1e-5)
    compare("coyo_vit vit_tiny", "features", features, t["backbone_output"].flatten(1), 1e-5)
    grads = to_tensorflow({name: p.grad for name, p in model.named_parameters()})
    wanted = {k.removeprefix("grad."): v for k, v in t.items() if k.startswith("grad.")}
    assert grads.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.endswith("key_dense/bias"):  # analytically zero
            compare("coyo_vit vit_tiny", "gradients", grads[name], value, 1e-4)


@pytest.mark.parametrize("number", range(4))
def test_positions(number):
    meta, t = golden("coyo_vit", "pos_embed_resize")
    case = meta["cases"][number]
    ours = resize_positions(t[f"case{number}.old"], case["grid_new"])
    compare("coyo_vit pos_embed_resize", "positions", ours, t[f"case{number}.new"], 1e-5)


@pytest.mark.parametrize("name", ["bce0", "bce1", "bce2", "bce3", "ce0", "ce1"])
def test_losses(name):
    meta, t = golden("coyo_vit", "losses")
    case = next(case for case in meta["cases"] if case["name"] == name)
    functions = [softmax_loss] if name.startswith("ce") else [clipped_sigmoid_loss, sigmoid_loss]
    for function in functions:
        logits = t[f"{name}.logits"].clone().requires_grad_()
        loss = function(logits, *sparse(t[f"{name}.labels"]), case["label_smoothing"])
        loss.backward()
        if name == "bce3" and function is sigmoid_loss:  # saturated: not cut off
            assert loss > case["loss"]
            continue
        tolerance = 1e-2 if name == "bce3" else 1e-5
        compare(f"coyo_vit {name}", "loss", loss, torch.tensor(case["loss"]), tolerance)
        compare(f"coyo_vit {name}", "gradients", logits.grad, t[f"{name}.grad"], 1e-5)


@pytest.mark.parametrize("number", range(5))
def test_schedules(number):
    meta, _ = golden("coyo_vit", "lr_schedule")
    case = meta["cases"][number]
    shape = Schedule(
        case["schedule_name"].replace("vit/", "vit_"),
        min_lr=case["end_learning_rate"],
        warmup_lr=case["init_lr"],
        warmup=f"{case['warmup_steps']} steps",
        power=float(case.get("power", 1)),
    )
    rate = learning_rate(
        shape,
        case["base_lr"],
        total=case["total_steps"],
        epoch_steps=case["steps_per_epoch"],
        batch=1,
    )
    ours = torch.tensor([rate(step) for step in case["steps"]])
    torch.testing.assert_close(ours, torch.tensor(case["lr_values"]), rtol=2e-6, atol=1e-9)
    compare("coyo_vit lr_schedule", "learning rates", ours, torch.tensor(case["lr_values"]), 1e-6)


class Weights(nn.Module):
    """Parameters under the goldens' names."""

    def __init__(self, tensors, prefix):
        super().__init__()
        self.names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(tensors[prefix + name].clone()))


@pytest.mark.parametrize("number", range(5))
def test_optimizers(number):
    meta, t = golden("coyo_vit", "optimizers")
    case = meta["cases"][number]
    adamw, tag = case["optimizer"] == "AdamW", case["tag"]
    model = Weights(t, "init.")
    config = Optimizer(
        "adamw" if adamw else "sgd",
        weight_decay=case.get("weight_decay", 0.0),
        eps=case.get("eps", 0.0),
        clip_grad_norm=case["global_clipnorm"],
        keras=True,
    )
    decayed = [
        name for name in model.names if not any(part in name for part in case.get("excluded", ()))
    ]
    optimizer = build_optimizer(model, config, decayed)
    precision = Precision("fp32", torch.device("cpu"), config.clip_grad_norm)
    average, ema = [torch.zeros_like(p) for p in model.parameters()], case.get("ema")
    for step, rate in enumerate(case["lr_values"]):
        for name in model.names:
            getattr(model, name).grad = t[f"grad.{step}.{name}"].clone()
        set_learning_rate(optimizer, rate)
        precision.step(optimizer, list(model.parameters()))
        if ema:
            follow(average, list(model.parameters()), step + 1, ema["decay"], ema["start_step"])
        for name, shadow in zip(model.names, average, strict=True):
            ours = getattr(model, name)
            compare(f"coyo_vit {tag}", "weights", ours, t[f"{tag}.param.{step}.{name}"], 2e-6)
            if ema:
                compare(f"coyo_vit {tag}", "average", shadow, t[f"{tag}.ema.{step}.{name}"], 2e-6)


@pytest.mark.parametrize("case", ["train_steps_pretrain", "train_steps_finetune_ema"])
def test_training_steps(case):
    meta, t = golden("coyo_vit", case)
    given, schedule = meta["optimizer"], meta["schedule"]
    sigmoid = meta["loss"]["kind"] == "BCELoss"
    model = toy(t, "init.", loss="sigmoid" if sigmoid else "softmax")
    average = copy.deepcopy(model).requires_grad_(False) if "ema" in given else None
    config = Optimizer(
        given["name"].lower(),
        weight_decay=given.get("weight_decay", 0.0),
        eps=given.get("eps", 0.0),
        clip_grad_norm=given["global_clipnorm"],
        keras=True,
    )
    optimizer = build_optimizer(model, config, [name for name, _ in model.named_parameters()])
    precision = Precision("fp32", torch.device("cpu"), config.clip_grad_norm)
    shape = Schedule(
        schedule["kind"].replace("vit/", "vit_"),
        min_lr=schedule["end_lr"],
        warmup_lr=schedule["init_lr"],
        warmup=f"{schedule['warmup']} steps",
    )
    rate = learning_rate(
        shape, schedule["base_lr"], total=schedule["decay_steps"], epoch_steps=1, batch=1
    )
    if average is not None:
        torch._foreach_zero_(list(average.parameters()))
    for step, expected in enumerate(meta["per_step"]):
        labels, weights = sparse(t[f"step{step}.y"])
        set_learning_rate(optimizer, rate(step))
        loss = model(image=nchw(t[f"step{step}.x_nhwc"]), labels=labels, label_weights=weights)[
            "loss"
        ]
        loss.backward()
        norm = precision.step(optimizer, list(model.parameters()))
        if average is not None:
            follow(list(average.parameters()), trained(model), step + 1, given["ema"])
        compare(f"coyo_vit {case}", "loss", loss, torch.tensor(expected["loss"]), 1e-5)
        compare(
            f"coyo_vit {case}",
            "gradient norm",
            norm,
            torch.tensor(expected["raw_grad_global_norm"]),
            1e-5,
        )
    for name, network in (("final.", model), ("ema.", average)):
        if network is None:
            continue
        for key, value in to_tensorflow(network.state_dict()).items():
            if not key.endswith("key_dense/bias"):
                compare(f"coyo_vit {case}", name.strip("."), value, t[name + key], 1e-5)


def test_toy_checkpoint_keys():
    """The tensors of a TensorFlow training checkpoint by their keys, optimizer slots and counters
    among them."""
    from safetensors.torch import load_file

    stored = load_file(golden_file("coyo_vit", "tf_checkpoint_tiny", "expected.safetensors"))
    state = native(stored)
    back = to_tensorflow(state)
    assert (
        len(back) == 42 and {f"{key}/.ATTRIBUTES/VARIABLE_VALUE" for key in back} <= stored.keys()
    )
    assert all(
        torch.equal(value, stored[f"{key}/.ATTRIBUTES/VARIABLE_VALUE"])
        for key, value in back.items()
    )


def test_keys_of_the_published_checkpoint():
    meta, _ = golden("coyo_vit", "checkpoint_keys_vit_l16")
    config = ClassifierConfig(model="vit-l/16", representation_size=1024)
    with torch.device("meta"):
        model = VisionClassifier(config)
    assert sum(p.numel() for p in model.parameters()) == meta["parameters"]
    ours = to_tensorflow(model.state_dict())
    assert {key: list(value.shape) for key, value in ours.items()} == {
        row[0]: row[1] for row in meta["rows"]
    }
    from models.weights.vit import to_transformers

    theirs = {row[4].partition(" ")[0] for row in meta["rows"]}
    assert set(to_transformers(model.state_dict())) == theirs
