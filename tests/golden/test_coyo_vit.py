"""Network, losses, optimizers, schedules, positions and whole training steps against the numbers of
COYO-ViT."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from models.classification.classifier import (
    SIZES,
    ClassifierConfig,
    VisionClassifier,
    clipped_sigmoid_loss,
    ema_decay,
    sigmoid_loss,
    softmax_loss,
)
from models.layers.average import WeightAverage
from models.layers.positions import resize_positions
from models.weights.vit import native, to_transformers
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Schedule, learning_rate
from scripts.weights.tf_checkpoint import SUFFIX, read_checkpoint
from tests.golden.report import compare, same
from tests.golden.simla_cases import tensors_under
from tests.helpers.golden import golden, golden_file, golden_json, golden_tensors, recorded
from tests.helpers.tensorflow_vit import to_tensorflow

CLOSE, GRADIENT = 1e-5, 1e-4
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
NO_GRADIENT = "key_dense/bias"  # zero in exact arithmetic, rounding noise else
SATURATED = 14.0  # logits beyond which the original's cut at 1e-7 matters


def sizes_of(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the toy network from its weights; the heads, which no weight shows, are those of `vit_tiny`."""
    conv = state["patch_embed.proj.weight"]
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    return {
        "hidden": conv.shape[0],
        "patch": conv.shape[-1],
        "image": grid * conv.shape[-1],
        "layers": len([key for key in state if key.endswith("norm1.weight")]),
        "mlp": state["blocks.0.mlp.fc1.weight"].shape[0],
        "representation_size": len(state.get("pre_logits.fc.bias", ())),
        "num_classes": len(state["head.bias"]),
        "heads": golden_json("coyo_vit", "vit_tiny.json")["heads"],
    }


class Toy(VisionClassifier):
    """A network whose MLP need not be four times as wide as the model."""

    def __init__(self, config, mlp: int):
        super().__init__(config)
        width = config.vit.width
        for block in self.blocks:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)


@pytest.fixture
def toy(monkeypatch):
    """Builds the network of recorded TensorFlow weights: toy(tensors, prefix, **options)."""

    def build(tensors: dict, prefix: str, **options) -> VisionClassifier:
        state = native(tensors_under(prefix, tensors))
        sizes = sizes_of(state)
        monkeypatch.setitem(SIZES, "toy", (sizes["hidden"], sizes["layers"], sizes["heads"]))
        config = ClassifierConfig(
            model=f"vit-toy/{sizes['patch']}",
            image_size=sizes["image"],
            num_classes=sizes["num_classes"],
            representation_size=sizes["representation_size"],
            compat="original",
            **options,
        )
        model = Toy(config, sizes["mlp"])
        model.load_state_dict(state)
        return model

    return build


def sparse(targets):
    """Labels and weights of dense targets [B,C]."""
    return torch.arange(targets.shape[1]).expand(len(targets), -1), targets


def nchw(image):
    return image.permute(0, 3, 1, 2).contiguous()


def test_forward_and_gradients(toy):
    meta, t = golden("coyo_vit", "vit_tiny")
    model = toy(t, "weight.", loss="sigmoid")
    found = sizes_of(model.state_dict())
    same("coyo_vit vit_tiny", "sizes", found, {name: meta[name] for name in found})
    same("coyo_vit vit_tiny", "epsilon", model.options.layer_norm_eps, meta["layer_norm_eps"])
    image = nchw(t["x_nhwc"]).requires_grad_()
    logits = model.logits(image)
    features = model.pre_logits(model.features(image))
    (logits * t["cotangent"]).sum().backward()
    compare("coyo_vit vit_tiny", "logits", logits, t["logits"], CLOSE)
    compare("coyo_vit vit_tiny", "features", features, t["backbone_output"].flatten(1), CLOSE)
    same(
        "coyo_vit vit_tiny",
        "shape of the features",
        list(t["backbone_output"].shape),
        meta["backbone_output_shape"],
    )
    grads = to_tensorflow({name: p.grad for name, p in model.named_parameters()})
    wanted = tensors_under("grad.", t)
    assert grads.keys() == wanted.keys()
    scale = 1e-2 * max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        noise = scale if name.endswith(NO_GRADIENT) else 0.0
        compare("coyo_vit vit_tiny", "gradients", grads[name], value, GRADIENT, noise)


@torch.no_grad()
def test_intermediate_states(toy):
    _, t = golden("coyo_vit", "vit_tiny")
    model = toy(t, "weight.", loss="sigmoid")
    image, case = nchw(t["x_nhwc"]), "coyo_vit vit_tiny"
    compare(case, "patches", model.patch_embed(image), t["patch_embeddings"], CLOSE)
    x = model.embed(image)
    for number, block in enumerate(model.blocks):
        x = block(x)
        theirs = t[f"hidden_after_block_{number}"]
        compare(case, "states after a block", x[: len(theirs)], theirs, CLOSE)
    theirs = t["encoder_output_normed"]
    compare(case, "states at the end", model.norm(x)[: len(theirs)], theirs, CLOSE)


@torch.no_grad()
def test_bfloat16(toy):
    """Our logits in bfloat16 are about as far from float32 as the original's, and as far from those."""
    meta, t = golden("coyo_vit", "vit_tiny")
    model, theirs = toy(t, "weight.", loss="sigmoid"), t["logits_mixed_bfloat16_as_f32"]
    spread = meta["mixed_bfloat16"]["max_abs_diff_to_f32"]
    compare(
        "coyo_vit vit_tiny", "spread of bfloat16", (theirs - t["logits"]).abs().max(), spread, 1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.logits(nchw(t["x_nhwc"]))
    assert 0 < (ours - t["logits"]).abs().max() < 2 * spread
    assert (ours - theirs).abs().max() < 3 * spread


@pytest.mark.parametrize("number", recorded("coyo_vit", "pos_embed_resize.json", within="cases"))
def test_positions(number):
    meta, t = golden("coyo_vit", "pos_embed_resize")
    case = meta["cases"][number]
    old, new = (t[f"case{case['index']}.{name}"] for name in ("old", "new"))
    sizes = [case["grid_old"] ** 2 + 1, case["grid_new"] ** 2 + 1, case["dim"]]
    same("coyo_vit pos_embed_resize", "sizes", [old.shape[1], new.shape[1], old.shape[2]], sizes)
    compare(
        "coyo_vit pos_embed_resize",
        "positions",
        resize_positions(old, case["grid_new"], align_corners=True),
        new,
        CLOSE,
    )


@pytest.mark.parametrize("number", recorded("coyo_vit", "losses.json", within="cases"))
def test_losses(number):
    meta, t = golden("coyo_vit", "losses")
    case = meta["cases"][number]
    name = case["name"]
    saturated = bool(t[f"{name}.logits"].abs().max() > SATURATED)
    functions = [softmax_loss] if name.startswith("ce") else [clipped_sigmoid_loss, sigmoid_loss]
    for function in functions:
        logits = t[f"{name}.logits"].clone().requires_grad_()
        loss = function(logits, *sparse(t[f"{name}.labels"]), case["label_smoothing"])
        loss.backward()
        if saturated and function is sigmoid_loss:  # not cut off
            assert loss > case["loss"]
            continue
        # float32's one minus a probability is coarse near the cut, says the golden README
        tolerance = 1e-2 if saturated and function is clipped_sigmoid_loss else CLOSE
        compare(f"coyo_vit {name}", "loss", loss, case["loss"], tolerance)
        compare(f"coyo_vit {name}", "gradients", logits.grad, t[f"{name}.grad"], CLOSE)


def test_cut_of_the_original():
    """A confident mistake costs minus the logarithm of the cut at most."""
    edge = golden("coyo_vit", "losses")[0]["clip_eps"]
    loss = clipped_sigmoid_loss(
        torch.tensor([[-100.0]]), torch.tensor([[0]]), torch.ones(1, 1), 0.0
    )
    compare("coyo_vit losses", "largest term", loss, -math.log(edge), CLOSE)


@pytest.mark.parametrize("number", recorded("coyo_vit", "lr_schedule.json", within="cases"))
def test_schedules(number):
    case = golden("coyo_vit", "lr_schedule")[0]["cases"][number]
    assert case["total_steps"] == case["epochs"] * case["steps_per_epoch"]
    shape = Schedule(
        case["schedule_name"].replace("vit/", "vit_"),
        min_lr=case["end_learning_rate"],
        warmup_lr=case["init_lr"],
        warmup=f"{case['warmup_steps']} steps",
        power=float(case.get("power", 1)),
    )
    steps_per_epoch = case["steps_per_epoch"]
    rate = learning_rate(
        shape, case["base_lr"], total=case["total_steps"], epoch_steps=steps_per_epoch, batch=1
    )
    for step, theirs in zip(case["steps"], case["lr_values"], strict=True):
        # near the end float32 leaves the original a few units of the peak's eighth digit
        compare(
            "coyo_vit lr_schedule",
            "learning rates",
            rate(step),
            theirs,
            1e-6,
            0.1 * case["base_lr"],
        )


class Weights(nn.Module):
    """Parameters under the goldens' names."""

    def __init__(self, tensors, prefix):
        super().__init__()
        self.names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(tensors[prefix + name].clone()))


@pytest.mark.parametrize("number", recorded("coyo_vit", "optimizers.json", within="cases"))
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
    average, ema = copy.deepcopy(model), case.get("ema")
    shadows = WeightAverage([(average, model)])
    with torch.no_grad():
        torch._foreach_zero_(list(average.parameters()))
    assert len(case["lr_values"]) == meta["steps"]
    for step, rate in enumerate(case["lr_values"]):
        for name in model.names:
            getattr(model, name).grad = t[f"grad.{step}.{name}"].clone()
        set_learning_rate(optimizer, rate)
        precision.step(optimizer, list(model.parameters()))
        if ema:
            shadows.update(ema_decay(step + 1, ema["decay"], ema["start_step"]))
        for name in model.names:
            ours, shadow = getattr(model, name), getattr(average, name)
            compare(f"coyo_vit {tag}", "weights", ours, t[f"{tag}.param.{step}.{name}"], 2e-6)
            if ema:
                compare(f"coyo_vit {tag}", "average", shadow, t[f"{tag}.ema.{step}.{name}"], 2e-6)


@pytest.mark.parametrize("case", ["train_steps_pretrain", "train_steps_finetune_ema"])
def test_training_steps(case, toy):
    meta, t = golden("coyo_vit", case)
    given, schedule = meta["optimizer"], meta["schedule"]
    sigmoid = meta["loss"]["kind"] == "BCELoss"
    smoothing = meta["loss"]["label_smoothing"]
    model = toy(t, "init.", loss="sigmoid" if sigmoid else "softmax", label_smoothing=smoothing)
    assert meta["l2_weight_decay"] == 0  # which we do not have
    start = {key: value.clone() for key, value in to_tensorflow(model.state_dict()).items()}
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
            WeightAverage([(average, model)]).update(ema_decay(step + 1, given["ema"]))
        compare(f"coyo_vit {case}", "loss", loss, expected["loss"], CLOSE)
        compare(f"coyo_vit {case}", "gradient norm", norm, expected["raw_grad_global_norm"], CLOSE)
        compare(f"coyo_vit {case}", "learning rate", rate(step), expected["lr"], 1e-6)
    assert len(meta["per_step"]) == meta["steps"]
    for name, network in (("final.", model), ("ema.", average)):
        if network is None:
            continue
        ours, theirs = to_tensorflow(network.state_dict()), tensors_under(name, t)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key.endswith(NO_GRADIENT):  # AdamW makes full steps of the noise
                compare(f"coyo_vit {case}", "without gradient", ours[key], value, 1e-4, scale=0.1)
                continue
            compare(f"coyo_vit {case}", name.strip("."), ours[key], value, CLOSE)
            if network is model:  # weights that were not trained would not have changed
                change = value - start[key]
                compare(f"coyo_vit {case}", "change", ours[key] - start[key], change, 1e-3)


def transformed(value: torch.Tensor, how: str) -> torch.Tensor:
    """A TensorFlow variable by the recorded rule of its row, in PyTorch's layout."""
    if how == "HWIO->OIHW":
        return value.permute(3, 2, 0, 1)
    return value.T if how == "T" else value


def by_the_table(table: dict, variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TensorFlow's variables under timm's names by the recorded table: rows of (TensorFlow, shape, timm, rule, …).

    A row names where in a stacked tensor its part lies, for the width of the table: the order is taken from it.
    """
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, _, name, rule, _ in table["rows"]:
        if key not in variables:
            continue
        if name is None:  # the tanh layer, which timm no longer has
            name = f"pre_logits.fc.{'weight' if rule == 'T' else 'bias'}"
        target, _, place = name.partition("[")
        first = int(re.search(r"\d+", place)[0]) if place else 0
        parts.setdefault(target, []).append((first, transformed(variables[key], rule)))
    ordered = {
        name: [value for _, value in sorted(found, key=lambda part: part[0])]
        for name, found in parts.items()
    }
    return {
        name: torch.cat(values) if len(values) > 1 else values[0]
        for name, values in ordered.items()
    }


def test_toy_checkpoint():
    """A TensorFlow training checkpoint, bit for bit, and its weights where the recorded table puts them."""
    table = golden_json("coyo_vit", "checkpoint_keys_vit_l16.json")
    stored = golden_tensors("coyo_vit", "tf_checkpoint_tiny", "expected.safetensors")
    prefix = golden_file("coyo_vit", "tf_checkpoint_tiny", "last_checkpoint.index").with_suffix("")
    slots_of = {key: key.removesuffix(SUFFIX).partition(".OPTIMIZER_SLOT/")[2] for key in stored}
    read = {slot: read_checkpoint(str(prefix), slot or None) for slot in set(slots_of.values())}
    for key, value in stored.items():
        found = read[slots_of[key]][key.removesuffix(SUFFIX)][1]
        same("coyo_vit checkpoint", "values", found, value)
    slots = [slot for slots in table["optimizer_slots"].values() for slot in slots]
    others = (*table["other_keys"], "optimizer/iter")
    weights = {
        key.removesuffix(VALUE): value
        for key, value in stored.items()
        if not any(slot in key for slot in slots) and not key.startswith(others)
    }
    expected, ours = by_the_table(table, weights), native(stored)
    same("coyo_vit checkpoint", "names", sorted(ours), sorted(expected))
    for name, value in expected.items():
        same("coyo_vit checkpoint", "weights", ours[name], value)


def test_keys_of_the_published_checkpoint():
    table = golden_json("coyo_vit", "checkpoint_keys_vit_l16.json")
    variables = {row[0]: torch.empty(row[1], device="meta") for row in table["rows"]}
    width = variables["backbone/representation/bias"].shape[0]
    config = ClassifierConfig(model="vit-l/16", representation_size=width)
    with torch.device("meta"):
        model = VisionClassifier(config)
    same(
        "coyo_vit keys",
        "parameters",
        sum(p.numel() for p in model.parameters()),
        table["parameters"],
    )
    ours = to_tensorflow(model.state_dict())
    shapes = {key: list(value.shape) for key, value in ours.items()}
    same("coyo_vit keys", "TensorFlow's", shapes, {row[0]: row[1] for row in table["rows"]})
    shapes = {name: list(value.shape) for name, value in by_the_table(table, variables).items()}
    same(
        "coyo_vit keys", "timm's", {k: list(v.shape) for k, v in model.state_dict().items()}, shapes
    )
    theirs = {row[4].partition(" ")[0] for row in table["rows"]}
    same("coyo_vit keys", "transformers'", set(to_transformers(model.state_dict())), theirs)
    same("coyo_vit keys", "suffix", VALUE, table["suffix"])
