"""VQA, visual entailment, NLVR2 with its text assignment, and Grad-CAM of SIMLA and ALBEF against the originals.

The weights are the pre-training state of the golden case, converted by `models.adapters.start_from` as a user would.
"""

import pytest
import torch

from models.adapters import start_from
from models.grounding import contrast_map, matching_map
from models.momentum import MomentumPairs
from models.retrieval import Retrieval, RetrievalConfig
from models.statements import StatementConfig, StatementModel
from models.text_assignment import TextAssignment, TextAssignmentConfig
from models.vit import ViTConfig
from models.vqa import Vqa, VqaConfig
from models.xbert import BertConfig
from tests.golden.report import compare, record
from tests.helpers.golden import decode_image, golden

TOLERANCE, GRADIENT = 1e-5, 1e-4
SYSTEMS = pytest.mark.parametrize("system", ["simla", "albef"])


def networks(meta: dict) -> tuple[ViTConfig, BertConfig]:
    c = meta["config"]
    vit = ViTConfig(c["image_size"], **{k: v for k, v in c["vit"].items() if v is not None})
    return vit, BertConfig.from_json(c["bert"] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})


def pretrained(system: str) -> dict[str, torch.Tensor]:
    _, tensors = golden("simla", f"pretrain_{system}")
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def override(model: torch.nn.Module, tensors: dict) -> None:
    """Apply a case's `new.*`."""
    new = {k.removeprefix("new."): v for k, v in tensors.items() if k.startswith("new.")}
    assert model.load_state_dict(new, strict=False).unexpected_keys == []


def check_gradients(name: str, model: torch.nn.Module, meta: dict, tensors: dict) -> None:
    """Gradient norms of every trainable parameter, and the gradients stored in full."""
    parameters = dict(model.named_parameters())
    frozen = {key for key, norm in meta["grad_norms"].items() if norm is None}
    trainable = {key for key, p in parameters.items() if p.requires_grad}
    assert trainable | frozen == set(meta["grad_norms"])
    scale = max(norm for norm in meta["grad_norms"].values() if norm)
    for key, norm in meta["grad_norms"].items():
        if norm is None:
            assert parameters[key].grad is None, key
            continue
        error = abs(float(parameters[key].grad.norm()) - norm) / max(norm, 1e-4 * scale)
        record(name, "gradient norms", error)
        assert error < GRADIENT, key
    for key in [k for k in tensors if k.startswith("grad.")]:
        compare(name, "gradients", parameters[key.removeprefix("grad.")].grad, tensors[key], GRADIENT)


def check_training(name, model, meta, tensors, batch) -> None:
    """Loss with and without teacher, and the gradients of the former."""
    pairs = MomentumPairs(model.train(), meta["config"]["momentum"])
    model.config.distill = False
    (hard,) = model(**batch, alpha=0.0).values()
    compare(name, "loss without teacher", hard, tensors["out.loss_no_distill"], TOLERANCE)
    model.config.distill = True
    pairs.update()
    (loss,) = model(**batch, alpha=torch.tensor(meta["config"]["alpha"])).values()
    compare(name, "loss", loss, tensors["out.loss"], TOLERANCE)
    loss.backward()
    check_gradients(name, model, meta, tensors)


@SYSTEMS
def test_vqa(system):
    name = f"vqa_{system}"
    meta, t = golden("simla", name)
    model = Vqa(VqaConfig(*networks(meta), decoder_layers=meta["config"]["decoder_layers"], compat="original"))
    left_out = start_from(model, pretrained(system), "vqa")
    assert left_out.missing == meta["load"]["missing"]
    model.eval()
    questions = {"text_ids": t["in.rank.question_ids"], "text_mask": t["in.rank.question_mask"].bool()}
    image = decode_image(t["in.rank.image"])
    with torch.no_grad():
        states = model.encode_question(image, **questions)
    real = questions["text_mask"]
    compare(name, "question states", states[real], t["out.rank.question_states"][real], TOLERANCE)
    ids, lengths = t["in.rank.answer_ids"], t["in.rank.answer_mask"].sum(1)
    answers, probability = model.rank_answers(image, **questions, answer_ids=ids, answer_length=lengths, k=5)
    compare(name, "answer probabilities", probability, t["out.rank.topk_probs"], TOLERANCE)
    assert torch.equal(answers, t["out.rank.topk_ids"])

    counts = t["in.answers_per_question"]
    batch = {
        "image": decode_image(t["in.image"]),
        "text_ids": t["in.question_ids"],
        "text_mask": t["in.question_mask"].bool(),
        "answer_ids": t["in.answer_ids"],
        "answer_mask": t["in.answer_mask"].bool(),
        "answer_weight": t["in.weights"],
        "answer_question": torch.arange(len(counts)).repeat_interleave(counts),
    }
    check_training(name, model, meta, t, batch)


@SYSTEMS
def test_visual_entailment(system):
    name = f"ve_{system}"
    meta, t = golden("simla", name)
    model = StatementModel(StatementConfig(*networks(meta), classes=3, compat="original"))
    start_from(model, pretrained(system), "ve")
    override(model, t)
    batch = {"image": decode_image(t["in.image"]), "text_ids": t["in.input_ids"]}
    batch["text_mask"] = t["in.attention_mask"].bool()
    with torch.no_grad():
        compare(name, "logits", model.eval().logits(**batch), t["out.logits"], TOLERANCE)
    check_training(name, model, meta, t, batch | {"label": t["in.targets"]})


def text_assignment(system: str) -> tuple[TextAssignment, dict, dict]:
    meta, t = golden("simla", f"nlvr_ta_{system}")
    vit, bert = networks(meta)
    model = TextAssignment(TextAssignmentConfig(vit, bert, 6, meta["config"]["embed_dim"]))
    start_from(model, pretrained(system), "text_assignment")
    override(model, t)
    return model, meta, t


@SYSTEMS
def test_text_assignment(system, monkeypatch):
    name = f"nlvr_ta_{system}"
    model, meta, t = text_assignment(system)
    assigned = t["in.first_image_index"], t["in.second_image_index"], t["in.labels"]
    image, text = decode_image(t["in.image"]), (t["in.input_ids"], t["in.attention_mask"].bool())
    with torch.no_grad():
        logits = model.logits(model.visual_encoder(image), *assigned[:2], *text)
    compare(name, "logits", logits, t["out.logits"], TOLERANCE)
    monkeypatch.setattr(model, "assign", lambda tokens: assigned)
    loss = model.train()(image, *text)["loss_ta"]
    compare(name, "loss", loss, t["out.loss"], TOLERANCE)
    loss.backward()
    if "grad_norms" in meta:
        check_gradients(name, model, meta, t)


@SYSTEMS
def test_nlvr(system):
    name = f"nlvr_{system}"
    meta, t = golden("simla", name)
    vit, bert = networks(meta)
    model = StatementModel(StatementConfig(vit, bert, classes=2, paired_from=6, compat="original"))
    start_from(model, text_assignment(system)[0].state_dict(), "nlvr")
    override(model, t)
    MomentumPairs(model).copy()
    image = torch.stack([decode_image(t["in.image0"]), decode_image(t["in.image1"])], dim=1)
    batch = {"image": image, "text_ids": t["in.input_ids"], "text_mask": t["in.attention_mask"].bool()}
    with torch.no_grad():
        compare(name, "logits", model.eval().logits(**batch), t["out.logits"], TOLERANCE)
    check_training(name, model, meta, t, batch | {"label": t["in.targets"]})


@SYSTEMS
def test_grounding_maps(system):
    name = f"grounding_{system}"
    meta, t = golden("simla", name)
    model = Retrieval(RetrievalConfig(*networks(meta), embed_dim=meta["config"]["embed_dim"], compat="original"))
    start_from(model, pretrained(system), "retrieval")
    override(model, t)
    image = decode_image(t["in.image_small"]).repeat_interleave(16, 2).repeat_interleave(16, 3)
    text = (t["in.input_ids"], t["in.attention_mask"].bool())
    for mode, function in (("itm", matching_map), ("itc", contrast_map)):
        for block in meta["config"]["blocks"][mode]:
            found = function(model.eval(), image, *text, block)
            compare(name, f"{mode} maps", found, t[f"out.{mode}_block{block}"], TOLERANCE)
