"""COYO-ALIGN's recorded numbers: loss, ghost batch norm, towers, LAMB, the schedule, whole training steps."""

import pytest
import torch

from models.dual_encoder.align import Align
from models.dual_encoder.base import NOT_LOADED, DualConfig
from models.dual_encoder.objectives import LossOptions, align
from models.layers.batchnorm import GhostBatchNorm, collect, deal
from models.layers.efficientnet import EfficientNet
from models.weights.loading import load_checkpoint
from runtime.optim.build import Optimizer, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, Schedule
from tests.golden.align_cases import LOSS, TINY_IMAGE, TINY_TEXT, load, pictures, state_of, tiny_align
from tests.helpers.golden import golden


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def close(actual, expected, tolerance: float = 1e-5, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_loss_and_its_gradients(number, tile):
    """The global batch on one process; two processes are tests/contract/test_align_processes.py."""
    meta, tensors = golden("align", "contrastive_loss")
    case = meta["cases"][number]
    t = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"case{number}.")}
    image, text = (t[f"{side}_embeds"].requires_grad_() for side in ("image", "text"))
    temperature = torch.tensor(case["temperature"], requires_grad=True)
    out = align({"z_image": image, "z_text": text, "temperature": temperature}, LossOptions(**LOSS, tile=tile))
    out["loss"].backward()
    close(out["loss"].item(), case["logged_loss_mean"])
    close(out["clip_loss_image"], t["loss_i2t"].mean())
    close(out["clip_loss_text"], t["loss_t2i"].mean())
    close(image.grad, t["grad_image_embeds"])
    close(text.grad, t["grad_text_embeds"])
    close(temperature.grad.item(), case["grad_temperature_sum"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ghost_batch_norm(layout):
    meta, t = golden("align", "ghost_bn")
    norm = GhostBatchNorm(5, meta["virtual_batch_size"])
    norm.load_state_dict({"weight": t["gamma"], "bias": t["beta"]}, strict=False)
    for step in range(3):
        x = nchw(t[f"train{step}.x_nhwc"]).contiguous(memory_format=layout).requires_grad_()
        y = collect(norm(deal(x, meta["groups"])), meta["groups"])
        y.backward(nchw(t[f"train{step}.cotangent"]))
        close(y, nchw(t[f"train{step}.y_nhwc"]))
        close(x.grad, nchw(t[f"train{step}.grad_x"]))
        close(norm.weight.grad, t[f"train{step}.grad_gamma"])
        close(norm.bias.grad, t[f"train{step}.grad_beta"])
        close(norm.running_mean, t[f"train{step}.moving_mean_after"])
        close(norm.running_var, t[f"train{step}.moving_variance_after"])
        norm.zero_grad()
    assert norm.num_batches_tracked == 3
    close(norm.eval()(nchw(t["eval.x_nhwc"])), nchw(t["eval.y_nhwc"]))


def test_image_tower():
    _, t = golden("align", "efficientnet_tiny")
    tower, prefix = EfficientNet(TINY_IMAGE), "vision_model."
    state = state_of(t, "weight.", "image_encoder/")
    load(tower, {k.removeprefix(prefix): v for k, v in state.items()})
    image = pictures(t["images_u8_nhwc"])
    tower.eval()
    close(tower(image), t["eval.features"])
    features = tower.train()(image)
    close(features, t["train.features"], 1e-4)
    (features * t["train.cotangent"]).sum().backward()
    for kind, tolerance in (("grad", 1e-3), ("after", 1e-4)):
        wanted = state_of(
            {f"image_encoder/{k[len(kind) + 7 :]}": v for k, v in t.items() if k.startswith(f"train.{kind}.")}, ""
        )
        for name, value in wanted.items():
            name = name.removeprefix(prefix)
            if kind == "grad" and name.endswith("project_bn.bias"):
                continue  # exactly zero where no skip follows: rounding noise
            found = tower.get_parameter(name).grad if kind == "grad" else tower.get_buffer(name)
            assert (found - value).abs().max() <= tolerance * value.abs().max(), f"{kind} {name}"


def test_text_tower():
    _, t = golden("align", "text_tiny")
    model = Align(DualConfig(model="ALIGN_B0_MINI", embed_dim=12), TINY_IMAGE, TINY_TEXT)
    weights = state_of(t, "weight.", "text_encoder/")
    load_checkpoint(model, weights, ("vision_model.*", "image_projection.*", "temperature"), NOT_LOADED)
    ids = torch.where(t["attention_mask"].bool(), t["input_ids"], 0).long()
    z = model.embed_text(ids)["z"]
    close(z, t["output"])
    (z * t["cotangent"]).sum().backward()
    wanted = state_of(t, "grad.", "text_encoder/")
    for name, value in wanted.items():
        close(model.get_parameter(name).grad, value, what=name)


def test_lamb():
    meta, t = golden("align", "lamb")
    names = list(meta["params"])
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(t[f"init.{name}"].clone()) for name in names})
    decayed = [name for name in names if not meta["params"][name]["excluded_from_decay_and_adaptation"]]
    optimizer = build_optimizer(model, Optimizer(opt="lamb", lr=1.0, weight_decay=1e-5, eps=1e-6), decayed)
    for step in range(meta["steps"]):
        for name in names:
            model[name].grad = t[f"grad.{step}.{name}"].clone()
        set_learning_rate(optimizer, meta["lr_values"][step])
        optimizer.step()
        for name in names:
            close(model[name].detach(), t[f"param.{step}.{name}"], 1e-6, f"{name} after update {step}")
    for name in names:
        close(optimizer.state[model[name]]["exp_avg"], t[f"final_m.{name}"], 1e-6)
        close(optimizer.state[model[name]]["exp_avg_sq"], t[f"final_v.{name}"], 1e-6)


def plan_of(case: dict) -> Plan:
    shape = Schedule("vit_linear", f"{case['train_steps']} steps", 0.0, 0.0, f"{case['warmup_steps']} steps")
    return Plan.of(shape, case["lr"], loader_steps=1000, accumulate=1, batch=64)


def test_schedule():
    meta, _ = golden("align", "lr_schedule")
    for case in meta["cases"]:
        plan = plan_of(case)
        assert plan.total == case["train_steps"]
        for step, value in zip(case["steps"], case["lr_values"], strict=True):
            # TensorFlow's 1 - progress is float32: near the end a few units of the peak's eighth digit
            assert plan.lr(step) == pytest.approx(value, rel=1e-6, abs=1e-7 * case["lr"])


def test_training_steps():
    """Loss, learning rate, temperature and weights over four updates of the whole system."""
    meta, t = golden("align", "train_steps")
    model, plan = tiny_align(), plan_of(meta["lr_schedule"])
    load(model, state_of(t, "init."))
    decayed = [name for name, _ in model.named_parameters() if name not in model.free_of_decay()]
    optimizer = build_optimizer(model, Optimizer(opt="lamb", weight_decay=meta["weight_decay"], eps=1e-6), decayed)
    for step, expected in enumerate(meta["per_step"]):
        mask = t[f"step{step}.attention_mask"].bool()
        ids = torch.where(mask, t[f"step{step}.input_ids"], 0).long()
        set_learning_rate(optimizer, plan.lr(step))
        losses = model(image=pictures(t[f"step{step}.images_u8_nhwc"]), text_ids=ids)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        close(losses["loss"].item(), expected["loss"], what=f"loss {step}")
        close(losses["clip_loss_image"].item(), expected["loss_i2t"])
        close(losses["clip_loss_text"].item(), expected["loss_t2i"])
        close(model.temperature.item(), expected["temperature_after"])
        if step == 1:
            compare_weights(model, state_of(t, "after_step1."))
    embeddings = {side: t.pop(f"final.eval_{side}_embeds") for side in ("image", "text")}
    compare_weights(model, state_of(t, "final."))
    model.eval()
    close(model.embed_image(pictures(t["step3.images_u8_nhwc"]))["z"], embeddings["image"], 1e-4)
    ids = torch.where(t["step3.attention_mask"].bool(), t["step3.input_ids"], 0).long()
    close(model.embed_text(ids)["z"], embeddings["text"], 1e-4)


def compare_weights(model: Align, expected: dict) -> None:
    own = model.state_dict()
    for name, value in expected.items():
        no_gradient = name.endswith(("project_bn.bias", "self.key.bias")) or "pooler" in name
        behind_one = name.endswith("expand_bn.running_mean")  # one of which shifts this by noise times the momentum
        if not no_gradient:
            close(own[name], value, 2e-4 if behind_one else 2e-5, name)


def test_transformers_layout():
    """The golden AlignModel's state dict fills our model and its outputs are ours."""
    meta, t = golden("align", "transformers_align_tiny")
    # the toy's first stage has a skip by width, which transformers ties to the place in the stage
    model = tiny_align(embed_dim=40, model="ALIGN_B7_MINI", temperature=meta["config"]["temperature"])
    model.vision_model.encoder["blocks"][0].skip = False
    state = {k.removeprefix("state."): v for k, v in t.items() if k.startswith("state.")}
    load_checkpoint(model, state, (), NOT_LOADED)
    model.eval()
    image = model.embed_image(t["pixel_values"])["z"]
    close(image, t["image_features"])
    close(model.embed_text(torch.where(t["attention_mask"].bool(), t["input_ids"], 0))["z"], t["text_features"])
