"""COYO-ALIGN's recorded numbers: loss, ghost batch norm, towers, LAMB, the schedule, whole training
steps."""

import re

import pytest
import torch
import torch.nn.functional as F

from models.dual_encoder.align import Align
from models.dual_encoder.base import NOT_LOADED
from models.dual_encoder.config import DualConfig
from models.layers.batchnorm import GhostBatchNorm, collect, deal
from models.layers.efficientnet import EfficientNet, padded
from models.weights.loading import load_checkpoint
from runtime.optim.build import Optimizer, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, Schedule
from tests.golden.align_cases import (
    image_shape,
    load,
    loss_options,
    nchw,
    padded_ids,
    pixels,
    state_of,
    text_shape,
    tiny_align,
)
from tests.golden.report import compare, same
from tests.helpers.clip_toys import losses_of, with_total
from tests.helpers.golden import golden, recorded
from tests.helpers.processes import spawn

CLOSE, BEHIND_BATCH_NORM, GRADIENT = 1e-5, 1e-4, 2e-4
NO_GRADIENT = (
    "project_bn.bias",
    "self.key.bias",
)  # zero in exact arithmetic; LAMB makes full steps of the noise


def loss_case(number: int) -> tuple[dict, dict[str, torch.Tensor]]:
    meta, tensors = golden("align", "contrastive_loss")
    case = meta["cases"][number]
    prefix = f"case{case['index']}."
    return case, {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("number", recorded("align", "contrastive_loss.json", within="cases"))
def test_loss_and_its_gradients(number, tile):
    """The global batch on one process."""
    case, t = loss_case(number)
    image, text = (t[f"{side}_embeds"].requires_grad_() for side in ("image", "text"))
    temperature = torch.tensor(case["temperature"], requires_grad=True)
    features = {"z_image": image, "z_text": text, "temperature": temperature}
    out = losses_of("ALIGN_B0_MINI", features, **loss_options(), tile=tile)
    out["loss"].backward()
    compare("align loss", "mean over the batch", out["loss"], case["logged_loss_mean"], CLOSE)
    compare("align loss", "sum over replicas", out["loss"], case["total_scaled_loss"], CLOSE)
    compare("align loss", "image to text", out["clip_loss_image"], t["loss_i2t"].mean(), CLOSE)
    compare("align loss", "text to image", out["clip_loss_text"], t["loss_t2i"].mean(), CLOSE)
    compare("align loss", "gradient of images", image.grad, t["grad_image_embeds"], CLOSE)
    compare("align loss", "gradient of texts", text.grad, t["grad_text_embeds"], CLOSE)
    compare(
        "align loss",
        "gradient of the temperature",
        temperature.grad,
        case["grad_temperature_sum"],
        CLOSE,
    )
    shares = t["grad_temperature_per_replica"]
    compare("align loss", "gradient of the temperature", temperature.grad, shares.sum(), CLOSE)


def test_loss_of_each_replica():
    """Each process has one replica's samples: its loss, and gradients whose mean is that of the
    global batch."""
    meta, _ = golden("align", "contrastive_loss")
    several = sorted({case["replicas"] for case in meta["cases"]} - {1})
    if not several:
        pytest.skip("no recorded case has several replicas")
    for replicas in several:
        spawn(compare_replica, replicas)


def compare_replica(rank: int) -> None:
    meta, _ = golden("align", "contrastive_loss")
    replicas = torch.distributed.get_world_size()
    for number in [n for n, case in enumerate(meta["cases"]) if case["replicas"] == replicas]:
        case, t = loss_case(number)
        rows = slice(rank * case["per_replica_batch"], (rank + 1) * case["per_replica_batch"])
        image, text = (
            t[f"{side}_embeds"][rows].clone().requires_grad_() for side in ("image", "text")
        )
        temperature = torch.tensor(case["temperature"], requires_grad=True)
        features = {"z_image": image, "z_text": text, "temperature": temperature}
        out = losses_of("ALIGN_B0_MINI", features, **loss_options())
        (out["loss"] / replicas).backward()
        name = "align loss of a replica"
        compare(name, "loss", out["loss"] / replicas, t["scaled_loss_per_replica"][rank], CLOSE)
        compare(name, "image to text", out["clip_loss_image"], t["loss_i2t"][rows].mean(), CLOSE)
        compare(name, "text to image", out["clip_loss_text"], t["loss_t2i"][rows].mean(), CLOSE)
        compare(name, "gradient of images", image.grad, t["grad_image_embeds"][rows], CLOSE)
        compare(name, "gradient of texts", text.grad, t["grad_text_embeds"][rows], CLOSE)
        shares = t["grad_temperature_per_replica"]
        compare(name, "gradient of the temperature", temperature.grad, shares[rank], CLOSE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ghost_batch_norm(layout):
    meta, t = golden("align", "ghost_bn")
    channels, groups = len(t["gamma"]), meta["groups"]
    norm = GhostBatchNorm(
        channels, meta["virtual_batch_size"], meta["epsilon"], 1 - meta["keras_momentum"]
    )
    norm.load_state_dict({"weight": t["gamma"], "bias": t["beta"]}, strict=False)
    steps = len([key for key in t if re.fullmatch(r"train\d+\.x_nhwc", key)])
    assert steps
    for step in range(steps):
        x = nchw(t[f"train{step}.x_nhwc"]).contiguous(memory_format=layout).requires_grad_()
        y = collect(norm(deal(x, groups)), groups)
        y.backward(nchw(t[f"train{step}.cotangent"]))
        compare("align ghost_bn", "outputs", y, nchw(t[f"train{step}.y_nhwc"]), CLOSE)
        compare("align ghost_bn", "gradients", x.grad, nchw(t[f"train{step}.grad_x"]), CLOSE)
        compare(
            "align ghost_bn", "gradients", norm.weight.grad, t[f"train{step}.grad_gamma"], CLOSE
        )
        compare("align ghost_bn", "gradients", norm.bias.grad, t[f"train{step}.grad_beta"], CLOSE)
        compare(
            "align ghost_bn",
            "statistics",
            norm.running_mean,
            t[f"train{step}.moving_mean_after"],
            CLOSE,
        )
        compare(
            "align ghost_bn",
            "statistics",
            norm.running_var,
            t[f"train{step}.moving_variance_after"],
            CLOSE,
        )
        norm.zero_grad()
    assert norm.num_batches_tracked == steps
    compare(
        "align ghost_bn",
        "outputs, inference",
        norm.eval()(nchw(t["eval.x_nhwc"])),
        nchw(t["eval.y_nhwc"]),
        CLOSE,
    )


def maps_of(tower: EfficientNet, blocks: list[str], image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features and intermediate maps of inference, by TensorFlow's names of the layers."""
    seen, hooks = {}, []

    def keep(module: torch.nn.Module, name: str) -> None:
        hooks.append(
            module.register_forward_hook(lambda _, args, output: seen.__setitem__(name, output))
        )

    keep(tower.embeddings["batchnorm"], "stem_bn")
    for name, block in zip(blocks, tower.encoder["blocks"], strict=True):
        keep(block.depthwise_conv["depthwise_norm"], f"{name}_bn")
        keep(block.projection["project_bn"], f"{name}_project_bn")
        if block.skip:
            keep(block, f"{name}_add")
    seen["features"] = tower(image)
    for hook in hooks:
        hook.remove()
    convolution = tower.embeddings["convolution"]
    seen["rescaling"] = image
    seen["stem_conv"] = padded(convolution, image)
    seen["stem_activation"] = F.silu(seen["stem_bn"])
    for name, block in zip(blocks, tower.encoder["blocks"], strict=True):
        x, gate = F.silu(seen[f"{name}_bn"]), block.squeeze_excite
        seen[f"{name}_se_excite"] = (
            x * gate["expand"](F.silu(gate["reduce"](x.mean((2, 3), keepdim=True)))).sigmoid()
        )
    return seen


def test_image_tower():
    meta, t = golden("align", "efficientnet_tiny")
    tower, prefix = EfficientNet(image_shape()), "vision_model."
    numbers = [
        value
        for name, value in tower.state_dict().items()
        if not name.endswith("num_batches_tracked")
    ]
    same(
        "align tower",
        "parameters and statistics",
        sum(value.numel() for value in numbers),
        meta["params"],
    )
    same("align tower", "features", tower.num_features, meta["feature_dim"])
    load(
        tower,
        {k.removeprefix(prefix): v for k, v in state_of(t, "weight.", "image_encoder/").items()},
    )
    image = pixels(t["images_u8_nhwc"])
    blocks = block_names(meta)
    with torch.no_grad():
        maps = maps_of(tower.eval(), blocks, image)
    for name, shape in meta["layers"]:
        if name in maps:
            same("align tower", "channels", maps[name].shape[1], shape[-1])
    for key in [key for key in t if key.startswith("eval.")]:
        theirs = t[key]
        ours = maps[key.removeprefix("eval.")][: len(theirs)]
        compare("align tower", "maps", ours, nchw(theirs) if theirs.ndim == 4 else theirs, CLOSE)
    features = tower.train()(image)
    compare("align tower", "features in training", features, t["train.features"], BEHIND_BATCH_NORM)
    (features * t["train.cotangent"]).sum().backward()
    for kind, tolerance in (("grad", GRADIENT), ("after", BEHIND_BATCH_NORM)):
        start = f"train.{kind}."
        variables = {
            f"image_encoder/{k.removeprefix(start)}": v for k, v in t.items() if k.startswith(start)
        }
        assert variables
        largest = max(value.norm() for value in variables.values())
        for name, value in state_of(variables, "").items():
            name = name.removeprefix(prefix)
            found = tower.get_parameter(name).grad if kind == "grad" else tower.get_buffer(name)
            # the shift in front of another norm has no gradient but rounding noise
            scale = 1e-2 * float(largest) if name.endswith(NO_GRADIENT) else 0.0
            compare("align tower", f"{kind} of training", found, value, tolerance, scale)


def block_names(meta: dict) -> list[str]:
    """`block1a`, `block2a`, … in order."""
    found = (re.match(r"block\d[a-z]", name) for name, _ in meta["layers"])
    return list(dict.fromkeys(match[0] for match in found if match))


def test_rates_of_stochastic_depth():
    meta, _ = golden("align", "efficientnet_tiny")
    tower = EfficientNet(image_shape(drop_connect=0.2))
    rates = zip(block_names(meta), tower.encoder["blocks"], strict=True)
    ours = {f"{name}_drop": block.drop for name, block in rates if block.skip and block.drop}
    theirs = meta["drop_connect_rates_if_0_2"]
    assert ours.keys() == theirs.keys()
    for name, rate in theirs.items():
        compare("align tower", "stochastic depth", ours[name], rate, 1e-12)


def test_text_tower():
    meta, t = golden("align", "text_tiny")
    config = DualConfig(model="ALIGN_B0_MINI", embed_dim=meta["embed_dim"])
    model = Align(config, image_shape(), text_shape())
    weights = state_of(t, "weight.", "text_encoder/")
    load_checkpoint(
        model, weights, ("vision_model.*", "image_projection.*", "temperature"), NOT_LOADED
    )
    z = model.embed_text(padded_ids(t))["z"]
    compare("align text", "output", z, t["output"], CLOSE)
    (z * t["cotangent"]).sum().backward()
    wanted = state_of(t, "grad.", "text_encoder/")
    largest = float(max(value.norm() for value in wanted.values()))
    for name, value in wanted.items():
        scale = 1e-2 * largest if name.endswith(NO_GRADIENT) else 0.0
        compare("align text", "gradients", model.get_parameter(name).grad, value, 1e-4, scale)
    with_gradient = {key.removeprefix("grad.") for key in t if key.startswith("grad.")}
    without = {
        key.removeprefix("weight.") for key in t if key.startswith("weight.")
    } - with_gradient
    same(
        "align text", "variables without gradient", without, set(meta["variables_without_gradient"])
    )


def lamb(
    model: torch.nn.Module, decayed: list[str], weight_decay: float, hyper: dict | None = None
):
    """LAMB as recorded; the whole system's case states its weight decay alone and has the defaults
    else."""
    hyper = hyper or {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-6}
    config = Optimizer(
        opt="lamb",
        lr=1.0,
        weight_decay=weight_decay,
        betas=(hyper["beta_1"], hyper["beta_2"]),
        eps=hyper["epsilon"],
    )
    return build_optimizer(model, config, decayed)


def test_lamb():
    meta, t = golden("align", "lamb")
    names, rates = list(meta["params"]), meta["lr_values"]
    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(t[f"init.{name}"].clone()) for name in names}
    )
    decayed = [
        name for name in names if not meta["params"][name]["excluded_from_decay_and_adaptation"]
    ]
    excluded = meta["hyper"]["exclude"]
    by_name = [
        name
        for name in names
        if not any(part in meta["params"][name]["tf_name"] for part in excluded)
    ]
    same("align lamb", "parameters with decay", decayed, by_name)
    plan = plan_of(meta["lr_schedule"])
    optimizer = lamb(model, decayed, meta["hyper"]["weight_decay"], meta["hyper"])
    for step in range(meta["steps"]):
        before = {name: model[name].detach().clone() for name in names}
        for name in names:
            model[name].grad = t[f"grad.{step}.{name}"].clone()
        compare("align lamb", "learning rates", plan.lr(step), rates[step], 1e-6, 0.1 * max(rates))
        set_learning_rate(optimizer, rates[step])
        optimizer.step()
        for name in names:
            ours, theirs = model[name].detach(), t[f"param.{step}.{name}"]
            compare("align lamb", "parameters", ours, theirs, CLOSE)
            if rates[step]:  # rounding of the parameter is a larger part of the change
                compare("align lamb", "updates", ours - before[name], theirs - before[name], 2e-3)
    for name in names:
        state = optimizer.state[model[name]]
        compare("align lamb", "first moments", state["exp_avg"], t[f"final_m.{name}"], 1e-6)
        compare(
            "align lamb", "second moments", state["exp_avg_sq"], t[f"final_v.{name}"], 1e-4
        )  # beta_2 is float32 there


def plan_of(case: dict) -> Plan:
    shape = Schedule(
        "vit_linear", f"{case['train_steps']} steps", 0.0, 0.0, f"{case['warmup_steps']} steps"
    )
    return Plan.of(shape, case["lr"], loader_steps=1000, accumulate=1, batch=64)


@pytest.mark.parametrize("number", recorded("align", "lr_schedule.json", within="cases"))
def test_schedule(number):
    case = golden("align", "lr_schedule")[0]["cases"][number]
    plan = plan_of(case)
    assert plan.total == case["train_steps"]
    for step, value in zip(case["steps"], case["lr_values"], strict=True):
        # TensorFlow's 1 - progress is float32: near the end a few units of the peak's eighth digit
        compare("align schedule", "learning rates", plan.lr(step), value, 1e-6, 0.1 * case["lr"])


def test_training_steps():
    """Loss, learning rate, temperature and weights over the updates of the whole system."""
    meta, t = golden("align", "train_steps")
    embeddings = {side: t.pop(f"final.eval_{side}_embeds") for side in ("image", "text")}
    model = tiny_align(embeddings["image"].shape[1], temperature=meta["initial_temperature"])
    plan, start = plan_of(meta["lr_schedule"]), state_of(t, "init.")
    load(model, start)
    free = model.free_of_decay()
    optimizer = lamb(
        model,
        [name for name, _ in model.named_parameters() if name not in free],
        meta["weight_decay"],
    )
    for step, expected in enumerate(meta["per_step"]):
        set_learning_rate(optimizer, plan.lr(step))
        image, text_ids = pixels(t[f"step{step}.images_u8_nhwc"]), padded_ids(t, f"step{step}.")
        losses = with_total(model(image=image, text_ids=text_ids), model.config)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        compare("align training", "loss", losses["loss"], expected["loss"], CLOSE)
        compare("align training", "loss", losses["clip_loss_image"], expected["loss_i2t"], CLOSE)
        compare("align training", "loss", losses["clip_loss_text"], expected["loss_t2i"], CLOSE)
        compare(
            "align training", "temperature", model.temperature, expected["temperature_after"], CLOSE
        )
        compare(
            "align training",
            "learning rate",
            plan.lr(step),
            expected["lr"],
            1e-6,
            0.1 * meta["lr_schedule"]["lr"],
        )
        compare_weights(model, start, state_of(t, f"after_step{step}."))
    compare_weights(model, start, state_of(t, "final."))
    model.eval()
    last = f"step{meta['steps'] - 1}."
    ours = model.embed_image(pixels(t[f"{last}images_u8_nhwc"]))["z"]
    compare("align training", "embeddings at the end", ours, embeddings["image"], 1e-4)
    ours = model.embed_text(padded_ids(t, last))["z"]
    compare("align training", "embeddings at the end", ours, embeddings["text"], 1e-4)


def compare_weights(model: Align, start: dict, expected: dict) -> None:
    """Weights, and how they differ from the initial ones: untrained weights would not pass."""
    own = model.state_dict()
    for name, value in expected.items():
        if name.endswith(NO_GRADIENT) or "pooler" in name:
            continue
        behind_one = name.endswith(
            "expand_bn.running_mean"
        )  # noise of NO_GRADIENT times the momentum
        compare("align training", "weights", own[name], value, 2e-4 if behind_one else 2e-5)
        change = value - start[name]
        if change.any():
            tolerance = (
                1e-1 if behind_one else 1e-2
            )  # of a few updates at a small learning rate, rounded to float32
            compare(
                "align training",
                "change of the weights",
                own[name] - start[name],
                change,
                tolerance,
            )


def test_transformers_layout():
    """The golden AlignModel's state dict fills our model and its outputs are ours."""
    meta, t = golden("align", "transformers_align_tiny")
    sizes, vision = meta["config"], meta["config"]["vision"]
    image = image_shape(
        width=vision["width_coefficient"],
        depth=vision["depth_coefficient"],
        divisor=vision["depth_divisor"],
        eps=vision["batch_norm_eps"],
    )
    model = tiny_align(
        sizes["projection_dim"],
        model="ALIGN_B7_MINI",
        temperature=sizes["temperature"],
        image=image,
        text=text_shape(sizes["text"]),
    )
    # transformers ties the skip to the place in the stage, not to equal widths
    for place, block in enumerate(model.vision_model.encoder["blocks"]):
        block.skip = block.skip and place in later_blocks(image)
    state = {k.removeprefix("state."): v for k, v in t.items() if k.startswith("state.")}
    load_checkpoint(model, state, (), NOT_LOADED)
    model.eval()
    maps = []
    model.vision_model.encoder["blocks"][-1].register_forward_hook(
        lambda _, args, output: maps.append(output)
    )
    ids = padded_ids(t)
    with torch.no_grad():
        out = model.features(t["pixel_values"], ids)
        hidden = model.text_model.encode_text(ids, t["attention_mask"].bool())
    name = "align transformers"
    compare(name, "features", out["z_image"], t["image_features"], CLOSE)
    compare(name, "features", out["z_text"], t["text_features"], CLOSE)
    compare(name, "last states", maps[0], t["vision_last_hidden"], CLOSE)
    compare(name, "last states", hidden, t["text_last_hidden"], CLOSE)
    unit = [F.normalize(out[f"z_{side}"], dim=1) for side in ("image", "text")]
    compare(name, "unit features", unit[0], t["image_embeds"], CLOSE)
    compare(name, "unit features", unit[1], t["text_embeds"], CLOSE)
    logits = unit[0] @ unit[1].T / out["temperature"]
    compare(name, "logits", logits, t["logits_per_image"], CLOSE)
    compare(name, "logits", logits.T, t["logits_per_text"], CLOSE)
    # the port takes the mean of the two directions
    smoothing = loss_options()["label_smoothing"]
    mean = losses_of("ALIGN_B0_MINI", out, label_smoothing=smoothing, loss_avg_or_sum="avg")
    compare(name, "loss", mean["loss"], meta["loss"], CLOSE)


def later_blocks(shape) -> set[int]:
    """Places of the blocks that are not the first of their stage."""
    repeats = [max(1, -int(-stage[1] * shape.depth // 1)) for stage in shape.stages]
    firsts = {sum(repeats[:stage]) for stage in range(len(repeats))}
    return set(range(sum(repeats))) - firsts
