"""VQA, visual entailment, NLVR2 with its text assignment, and Grad-CAM of SIMLA and ALBEF against
the originals.

The weights are the pre-training state of the golden case, converted by `start_from` as a user
would.
"""

import pytest
import torch

from models.fusion.grounding import contrast_map, matching_map
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.fusion.text_assignment import TextAssignment, TextAssignmentConfig
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.fusion.vqa import Vqa, VqaConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from models.weights.albef import start_from
from models.weights.loading import Differences
from tests.golden.report import compare, compare_gradients, same
from tests.golden.simla_cases import bert_of, pretrained, tensors_under, vit_of
from tests.helpers.golden import decode_image, golden

TOLERANCE, GRADIENT = 1e-5, 1e-4
SYSTEMS = pytest.mark.parametrize("system", ["simla", "albef"])


def sizes(meta: dict) -> tuple[ViTConfig, BertConfig]:
    return vit_of(meta["config"]), bert_of(meta["config"])


def first_pair(bert: BertConfig) -> int:
    """The text layer from which on there are two for one: the later half of the layers was
    doubled."""
    return bert.num_hidden_layers // 3


def check_left_out(name: str, left_out: Differences, expected: dict) -> None:
    """The keys that the original's loading code missed and ignored."""
    same(name, "checkpoint keys missing", sorted(left_out.missing), sorted(expected["missing"]))
    same(
        name,
        "checkpoint keys left over",
        sorted(left_out.unexpected),
        sorted(expected["unexpected"]),
    )


def online(names: list[str]) -> list[str]:
    """Parameter names without those of momentum copies."""
    return [name for name in names if "_m." not in name]


def override(model: torch.nn.Module, tensors: dict) -> None:
    """Apply a case's `new.*`."""
    assert model.load_state_dict(tensors_under("new.", tensors), strict=False).unexpected_keys == []


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
    compare_gradients(name, model, meta["grad_norms"], tensors, GRADIENT)


@SYSTEMS
def test_vqa(system):
    name = f"vqa_{system}"
    meta, t = golden("simla", name)
    model = Vqa(
        VqaConfig(*sizes(meta), decoder_layers=meta["config"]["decoder_layers"], compat="original")
    )
    left_out = start_from(model, pretrained(system), "vqa")
    check_left_out(name, left_out, meta["load"])
    model.eval()
    questions = {
        "text_ids": t["in.rank.question_ids"],
        "text_mask": t["in.rank.question_mask"].bool(),
    }
    image = decode_image(t["in.rank.image"])
    with torch.no_grad():
        states = model.encode_question(image, **questions)
    real = questions["text_mask"]
    compare(name, "question states", states[real], t["out.rank.question_states"][real], TOLERANCE)
    ids, lengths = t["in.rank.answer_ids"], t["in.rank.answer_mask"].sum(1)
    k = meta["config"]["k_test"]
    answers, probability = model.rank_answers(
        image, **questions, answer_ids=ids, answer_length=lengths, k=k
    )
    compare(name, "answer probabilities", probability, t["out.rank.topk_probs"], TOLERANCE)
    same(name, "answers ranked", answers, t["out.rank.topk_ids"])
    with torch.no_grad():
        start = ids[:1, :1].expand(len(image), 1)
        first = model.text_decoder(start, None, states, image_mask=real, causal=True)[:, 0].softmax(
            -1
        )
    first = first.index_select(1, ids[:, 1])
    compare(
        name,
        "probabilities of the answers' first tokens",
        first,
        t["out.rank.first_token_prob"],
        TOLERANCE,
    )
    candidates = first.gather(1, answers).sort(dim=1, descending=True).values
    compare(
        name, "probabilities of the candidates", candidates, first.topk(k, dim=1).values, TOLERANCE
    )

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
    model = StatementModel(
        StatementConfig(*sizes(meta), classes=len(meta["config"]["classes"]), compat="original")
    )
    check_left_out(name, start_from(model, pretrained(system), "ve"), meta["load"])
    override(model, t)
    batch = {"image": decode_image(t["in.image"]), "text_ids": t["in.input_ids"]}
    batch["text_mask"] = t["in.attention_mask"].bool()
    with torch.no_grad():
        compare(name, "logits", model.eval().logits(**batch), t["out.logits"], TOLERANCE)
    check_training(name, model, meta, t, batch | {"label": t["in.targets"]})


def text_assignment(system: str) -> tuple[TextAssignment, dict, dict]:
    meta, t = golden("simla", f"nlvr_ta_{system}")
    vit, bert = sizes(meta)
    model = TextAssignment(
        TextAssignmentConfig(vit, bert, first_pair(bert), meta["config"]["embed_dim"])
    )
    left_out = start_from(model, pretrained(system), "text_assignment")
    check_left_out(
        f"nlvr_ta_{system}", left_out, {key: online(names) for key, names in meta["load"].items()}
    )
    override(model, t)
    return model, meta, t


@SYSTEMS
def test_text_assignment(system, monkeypatch):
    name = f"nlvr_ta_{system}"
    model, _meta, t = text_assignment(system)
    assigned = t["in.first_image_index"], t["in.second_image_index"], t["in.labels"]
    image, text = decode_image(t["in.image"]), (t["in.input_ids"], t["in.attention_mask"].bool())
    with torch.no_grad():
        logits = model.logits(model.visual_encoder(image), *assigned[:2], *text)
    compare(name, "logits", logits, t["out.logits"], TOLERANCE)
    monkeypatch.setattr(model, "assign", lambda tokens: assigned)
    loss = model.train()(image, *text)["loss_ta"]
    compare(name, "loss", loss, t["out.loss"], TOLERANCE)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@SYSTEMS
def test_nlvr(system):
    name = f"nlvr_{system}"
    meta, t = golden("simla", name)
    vit, bert = sizes(meta)
    classes = t["out.logits"].shape[1]
    model = StatementModel(
        StatementConfig(vit, bert, classes, paired_from=first_pair(bert), compat="original")
    )
    left_out = start_from(
        model, text_assignment(system)[0].state_dict(), "nlvr", fill_momentum=False
    )
    same(
        name,
        "checkpoint keys left over",
        sorted(left_out.unexpected),
        sorted(meta["load"]["unexpected"]),
    )
    same(
        name,
        "checkpoint keys missing",
        sorted(online(left_out.missing)),
        sorted(meta["load"]["missing_online"]),
    )
    override(model, t)
    MomentumPairs(model).copy()
    image = torch.stack([decode_image(t["in.image0"]), decode_image(t["in.image1"])], dim=1)
    batch = {
        "image": image,
        "text_ids": t["in.input_ids"],
        "text_mask": t["in.attention_mask"].bool(),
    }
    with torch.no_grad():
        compare(name, "logits", model.eval().logits(**batch), t["out.logits"], TOLERANCE)
    check_training(name, model, meta, t, batch | {"label": t["in.targets"]})


@SYSTEMS
def test_grounding_maps(system):
    name = f"grounding_{system}"
    meta, t = golden("simla", name)
    model = Retrieval(
        RetrievalConfig(*sizes(meta), embed_dim=meta["config"]["embed_dim"], compat="original")
    )
    start_from(model, pretrained(system), "retrieval")
    override(model, t)
    small = decode_image(t["in.image_small"])
    zoom = meta["config"]["image_size"] // small.shape[-1]
    image = small.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    text = (t["in.input_ids"], t["in.attention_mask"].bool())
    for mode, function in (("itm", matching_map), ("itc", contrast_map)):
        for block in meta["config"]["blocks"][mode]:
            found = function(model.eval(), image, *text, block)
            compare(name, f"{mode} maps", found, t[f"out.{mode}_block{block}"], TOLERANCE)
