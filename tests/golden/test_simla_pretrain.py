"""A whole pre-training step of SIMLA and ALBEF against the originals: losses, intermediates,
gradients, AdamW."""

import pytest
import torch

from models.fusion.losses import IGNORE
from models.fusion.momentum import MomentumPairs
from models.fusion.simla import Simla, SimlaConfig
from tests.golden.report import compare, compare_gradients, same
from tests.golden.simla_cases import bert_of, draw_recorded_negatives, tensors_under, vit_of
from tests.helpers.golden import decode_image, golden

LOSS, TENSOR, GRADIENT, UPDATE = 1e-5, 1e-5, 1e-4, 1e-3
ORIGINS = ["simla", "albef"]


def build(meta: dict, tensors: dict[str, torch.Tensor], **changes) -> Simla:
    """The model of a golden case with its weights; the momentum copies as before the step's
    update."""
    c, vit = meta["config"], vit_of(meta["config"])
    special = c["special_ids"]
    config = SimlaConfig(
        vit=vit,
        bert=bert_of(c),
        embed_dim=c["embed_dim"],
        queue_size=c["queue_size"],
        temp=c["temperature"],
        mim=c["mim_vocab_size"] is not None,
        visual_vocab=c["mim_vocab_size"] or 1,
        max_masked_patches=vit.grid**2,
        keywords=5 if c["concept_vocab_size"] else 0,
        special_ids=tuple(special.values()),
        cls_id=special["cls"],
        **{"compat": "original"} | changes,
    )
    model = Simla(config)
    state = tensors_under("state.", tensors)
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    return model.train()


def batch_of(meta: dict, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The case's inputs under the names of the forward."""
    labels = t["in.mlm_labels"].flatten()
    positions = torch.nonzero(labels != IGNORE).squeeze(1)
    padding = 5  # rows of the head that no masked token fills
    batch = {
        "image": decode_image(t["in.image"]),
        "text_ids": t["in.input_ids"],
        "text_mask": t["in.attention_mask"].bool(),
        "mlm_ids": t["in.mlm_input_ids"],
        "mlm_positions": torch.cat([positions, torch.zeros(padding, dtype=torch.int64)]),
        "mlm_labels": torch.cat([labels[positions], torch.full((padding,), IGNORE)]),
        "alpha": torch.tensor(meta["config"]["alpha"]),
    }
    if "in.masked_positions" in t:
        batch["patch_mask"] = t["in.masked_positions"].bool()
        batch["visual_codes"] = t["in.visual_token_ids"]
        codes = batch["visual_codes"][batch["patch_mask"]]
        same("pretraining", "image tokens at masked patches", codes, t["in.masked_labels"])
    return batch


def forward(model: Simla, meta: dict, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The teacher's update and the forward of the recorded step, with the recorded hard
    negatives."""
    draw_recorded_negatives(
        model, [(t["out.negative_image_for_text"], t["out.negative_text_for_image"])]
    )
    MomentumPairs(model, meta["config"]["momentum"]).update()
    return model(**batch_of(meta, t))


class Taps:
    """Outputs of the heads and features of a forward, kept by name."""

    def __init__(self, model: Simla):
        self.seen: dict[str, list] = {}
        for name in ("itm_head", "mim_head", "mim_head_m", "concept_head", "concept_head_m"):
            if hasattr(model, name):
                getattr(model, name).register_forward_hook(self.keep(name))
        for name in ("text_encoder", "text_encoder_m"):
            getattr(model, name).cls["predictions"].register_forward_hook(self.keep(f"{name}.lm"))
        ita = model.ita

        def tapped_ita(student, teacher, *args):
            self.seen["features"] = [student, teacher]
            return ita(student, teacher, *args)

        model.ita = tapped_ita

    def keep(self, name):
        return lambda module, args, output: self.seen.setdefault(name, []).append(output)


@pytest.fixture(scope="module", params=ORIGINS)
def step(request):
    """(case name, meta, tensors, model after forward and backward, losses, taps)."""
    case = f"pretrain_{request.param}"
    meta, t = golden("simla", case)
    model = build(meta, t)
    taps = Taps(model)
    losses = forward(model, meta, t)
    sum(losses.values()).backward()
    return case, meta, t, model, losses, taps.seen, batch_of(meta, t)


def test_losses(step):
    case, _, t, _, losses, _, _ = step
    assert {f"out.{name}" for name in losses} | {"out.loss_total"} == {
        k for k in t if k.startswith("out.loss_")
    }
    for name, loss in losses.items():
        compare(case, name, loss, t[f"out.{name}"], LOSS)
    compare(case, "sum of the losses", sum(losses.values()), t["out.loss_total"], LOSS)


def test_features(step):
    case, _, t, _, _, seen, _ = step
    student, teacher = seen["features"]
    compare(case, "features", student.image, t["out.image_feat"], TENSOR)
    compare(case, "features", student.text, t["out.text_feat"], TENSOR)
    compare(case, "momentum features", teacher.image, t["out.image_feat_m"], TENSOR)
    compare(case, "momentum features", teacher.text, t["out.text_feat_m"], TENSOR)


def test_head_outputs(step):
    case, meta, t, _, _, seen, batch = step
    compare(case, "ITM logits", seen["itm_head"][0], t["out.itm_logits"], TENSOR)
    valid = batch["mlm_labels"] != IGNORE
    positions = batch["mlm_positions"][valid]
    (ours,) = seen["text_encoder.lm"]
    theirs = t["out.mlm_logits"]
    if not meta["config"]["mim_vocab_size"]:  # ALBEF's head runs at the masked positions alone
        ours, theirs = ours[valid], theirs.flatten(0, 1)[positions]
    compare(case, "MLM logits", ours, theirs, TENSOR)
    teacher = t["out.mlm_logits_m"].flatten(0, 1)[positions]
    compare(case, "MLM logits, teacher", seen["text_encoder_m.lm"][0][valid], teacher, TENSOR)


def test_masked_image_and_keyword_outputs(step):
    case, meta, t, _, _, seen, batch = step
    if not meta["config"]["mim_vocab_size"]:
        assert not {"mim_head", "concept_head"} & set(seen)
        return
    order = batch["patch_mask"].byte().argsort(dim=1, descending=True, stable=True)
    for name, key in (("mim_head", "mim_logits"), ("mim_head_m", "mim_logits_m")):
        theirs = t[f"out.{key}"]
        theirs = theirs.gather(1, order.unsqueeze(-1).expand(-1, -1, theirs.shape[-1]))
        compare(case, "MIM logits", seen[name][0], theirs, TENSOR)
    teacher = seen["concept_head_m"][0]
    compare(case, "keyword logits", seen["concept_head"][0], t["out.concept_logits"], TENSOR)
    compare(case, "keyword logits, teacher", teacher, t["out.concept_logits_m"], TENSOR)
    compare(case, "keyword soft targets", teacher.sigmoid(), t["out.concept_soft_targets"], TENSOR)


def test_keyword_votes(monkeypatch):
    import models.fusion.simla

    meta, t = golden("simla", "pretrain_simla")
    model = build(meta, t)
    seen = []
    targets_of = models.fusion.simla.keyword_targets
    monkeypatch.setattr(
        models.fusion.simla,
        "keyword_targets",
        lambda *args: seen.append(targets_of(*args)) or seen[0],
    )
    forward(model, meta, t)
    targets, votes = seen[0]
    same("pretrain_simla", "keyword votes", votes, t["out.salience_counts"])
    same("pretrain_simla", "keyword hard targets", targets, t["out.concept_hard_targets"])


def test_queue_and_momentum_after_the_step(step):
    case, _, t, model, _, _, _ = step
    compare(case, "queues", model.image_queue, t["out.image_queue"], TENSOR)
    compare(case, "queues", model.text_queue, t["out.text_queue"], TENSOR)
    same(case, "queue pointer", model.queue_ptr, t["out.queue_ptr"])
    parameters = dict(model.named_parameters())
    samples = [k for k in t if k.startswith("out.momentum.")]
    assert samples
    for key in samples:
        compare(
            case,
            "momentum parameters",
            parameters[key.removeprefix("out.momentum.")],
            t[key],
            TENSOR,
        )


def test_gradients(step):
    case, meta, t, model, _, _, _ = step
    compare_gradients(case, model, meta["grad_norms"], t, GRADIENT)
    teachers = [p.grad for k, p in model.named_parameters() if not p.requires_grad]
    assert teachers and all(g is None for g in teachers)


def layers_of(span: str) -> range:
    """The layers of `layers_FIRST_LAST`."""
    first, last = span.removeprefix("layers_").split("_")
    return range(int(first), int(last) + 1)


def group_of(name: str, groups: list[str]) -> str:
    """The golden file's group of a parameter: groups are key prefixes, but for the text layers and
    the LM head."""
    name = name.replace("text_encoder.bert.", "text_encoder.").replace(
        "text_encoder.cls.", "text_encoder.mlm_head."
    )
    if "encoder.layer." in name:
        layer, part = name.split("encoder.layer.")[1].split(".")[:2]
        spans = {
            group.split(".")[1] for group in groups if group.startswith("text_encoder.layers_")
        }
        (stage,) = [span for span in spans if int(layer) in layers_of(span)]
        name = f"text_encoder.{stage}.{part if 'attention' in part else 'feed_forward'}"
    (group,) = [g for g in groups if name == g or name.startswith(f"{g}.")]
    return group


@pytest.mark.parametrize("origin", ORIGINS)
def test_which_loss_reaches_what(origin):
    case = f"pretrain_{origin}"
    meta, t = golden("simla", case)
    model = build(meta, t)
    losses = forward(model, meta, t)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for loss, groups in meta["grad_norm_per_loss_and_group"].items():
        grads = torch.autograd.grad(
            losses[f"loss_{loss}"], list(parameters.values()), retain_graph=True, allow_unused=True
        )
        squares: dict[str, float | None] = dict.fromkeys(groups)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                group = group_of(name, list(groups))
                squares[group] = (squares[group] or 0.0) + float(grad.double().square().sum())
        for group, norm in groups.items():
            assert (norm is None) == (squares[group] is None), f"{loss} and {group}"
            if norm is not None:
                compare(
                    case,
                    f"gradient norms of {loss} by group",
                    squares[group] ** 0.5,
                    norm,
                    GRADIENT,
                )


@pytest.mark.parametrize("origin", ORIGINS)
def test_adamw_step(origin):
    case = f"pretrain_{origin}"
    meta, t = golden("simla", case)
    model = build(meta, t)
    trained = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    plain = [p for k, p in trained if p.ndim == 1 or k.endswith(".bias")]
    decayed = [p for k, p in trained if not (p.ndim == 1 or k.endswith(".bias"))]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    sum(forward(model, meta, t).values()).backward()
    before = {name: parameter.detach().clone() for name, parameter in trained}
    optimizer.step()
    after = tensors_under("after_step.", t)
    assert after
    for name, theirs in after.items():
        ours = dict(trained)[name].detach()
        compare(case, "parameters after AdamW", ours, theirs, TENSOR)
        compare(case, "update of AdamW", ours - before[name], theirs - before[name], UPDATE)


def test_static_count_of_masked_patches():
    """Fewer head rows than patches give the same loss as long as every masked patch has one."""
    meta, t = golden("simla", "pretrain_simla")
    model = build(meta, t)
    model.config.max_masked_patches = int(t["in.masked_positions"].sum(1).max())
    compare(
        "pretrain_simla",
        "loss_mim, few head rows",
        forward(model, meta, t)["loss_mim"],
        t["out.loss_mim"],
        LOSS,
    )
