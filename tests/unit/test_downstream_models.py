"""The networks of VQA, VE, NLVR2 and grounding: what must hold whatever the weights."""

import copy
from types import SimpleNamespace

import pytest
import torch

from base.errors import UserError
from models.fusion.grounding import contrast_map, matching_map
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.fusion.text_assignment import TextAssignment, TextAssignmentConfig, for_two_images
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.fusion.vqa import Vqa, VqaConfig, same_length
from tests.helpers.gradients import assert_same_gradients, gradients_of
from tests.helpers.tiny_simla import CLS, VOCAB, tiny_batch, tiny_config

SYSTEMS = pytest.mark.parametrize("albef", [False, True], ids=["simla", "albef"])
TEXT = ("text_ids", "text_mask")


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every input matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(albef: bool, rows: int = 4) -> dict:
    batch = tiny_batch(rows, albef)
    return {key: batch[key] for key in ("image", *TEXT)}


def vqa(albef: bool, **options) -> Vqa:
    torch.manual_seed(0)
    config = tiny_config(albef)
    return spread(Vqa(VqaConfig(config.vit, config.bert, decoder_layers=2, **options)))


@pytest.mark.parametrize(
    ("asked", "weights", "layers"),
    [
        (None, {}, 3),
        (None, {"text_decoder.bert.encoder.layer.3.output": 0}, 4),
        (5, {"text_decoder.bert.encoder.layer.3.output": 0}, 5),
    ],
)
def test_the_decoder_is_half_as_deep_as_the_encoder_where_nothing_tells(
    asked, weights, layers, monkeypatch
):
    """ALBEF's: six layers for twelve."""
    import VQA

    config = tiny_config(layers=6)
    monkeypatch.setattr(VQA, "networks", lambda *_: (config.vit, config.bert))
    options = SimpleNamespace(decoder_layers=asked, distill=False, compat="none")
    model = VQA.build_model(options, SimpleNamespace(vocab_size=VOCAB), weights)
    assert model.text_decoder.bert.depth == layers


ANSWERS = [[5, 6], [7], [5, 8, 9], [10], [11, 12], [7, 13], [14]]


def answer_table() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[CLS, *pieces, 3] for pieces in ANSWERS]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


@SYSTEMS
@torch.no_grad()
def test_ranking_is_by_the_whole_likelihood(albef):
    """Cached keys and groups of one length give what the plain decoder gives for each answer
    alone."""
    model, batch = vqa(albef).eval(), inputs(albef)
    ids, length = answer_table()
    found, probability = model.rank_answers(
        **batch, answer_ids=ids, answer_length=length, k=len(ids)
    )
    states = model.encode_question(**batch)
    likelihood = torch.zeros(len(states), len(ids))
    for answer, (row, n) in enumerate(zip(ids, length, strict=True)):
        given = row[:n].expand(len(states), -1)
        rows = torch.arange(len(states))
        logits = model.text_decoder(
            given[:, :-1], None, states, image_mask=batch["text_mask"], rows=rows, causal=True
        )
        picked = logits.log_softmax(-1).gather(2, given[:, 1:, None]).squeeze(2)
        likelihood[:, answer] = picked.sum(1)
    expected, order = likelihood.softmax(1).sort(descending=True)
    torch.testing.assert_close(probability, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found, order)


@torch.no_grad()
def test_the_original_ranking_counts_the_first_piece_twice():
    batch, (ids, length) = inputs(False), answer_table()
    ours, theirs = (
        vqa(False, compat=compat)
        .eval()
        .rank_answers(**batch, answer_ids=ids, answer_length=length, k=len(ids))
        for compat in ("none", "original")
    )
    assert not torch.allclose(ours[1], theirs[1])


def training_answers() -> dict:
    ids, length = answer_table()
    mask = torch.arange(ids.shape[1]) < length[:, None]
    weight = torch.tensor([0.7, 0.3, 0.5, 0.5, 1.0, 1.0, 0.0])
    return {
        "answer_ids": ids,
        "answer_mask": mask,
        "answer_weight": weight,
        "answer_question": torch.tensor([0, 0, 1, 1, 2, 3, 0]),
    }


def test_answers_of_weight_zero_and_padding_change_nothing():
    model, batch, answers = vqa(False).train(), inputs(False), training_answers()
    loss = model(**batch, **answers, alpha=0.4)["loss_vqa"]
    fewer = {key: value[:-1] for key, value in answers.items()}
    fewer["answer_ids"], fewer["answer_mask"] = (
        fewer["answer_ids"][:, :5],
        fewer["answer_mask"][:, :5],
    )
    torch.testing.assert_close(loss, model(**batch, **fewer, alpha=0.4)["loss_vqa"])


def shallow(task: str) -> Vqa | StatementModel:
    """As few layers as there can be: compiling takes long."""
    torch.manual_seed(0)
    if task == "answers":
        config = tiny_config(layers=1, depth=1)
        return spread(Vqa(VqaConfig(config.vit, config.bert, decoder_layers=1)))
    config = tiny_config(layers=2, depth=1)
    return spread(
        StatementModel(StatementConfig(config.vit, config.bert, classes=2, paired_from=0))
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["answers", "image pairs"])
def test_compiled_equals_eager(task):
    """One graph, the same loss and the same gradients."""
    model = shallow(task)
    other, batch = copy.deepcopy(model), inputs(False)
    if task == "answers":
        batch |= training_answers()
    else:
        batch |= {
            "image": torch.stack([batch["image"], batch["image"].flip(0)], 1),
            "label": torch.tensor([0, 1] * 2),
        }
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    losses = [m(**batch, alpha=torch.tensor(0.4)) for m in (model, compiled)]
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss)
    for part in losses:
        sum(part.values()).backward()
    theirs = {name: grad for name, grad in gradients_of(model).items() if grad is not None}
    ours = {name: grad for name, grad in gradients_of(other).items() if grad is not None}
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("albef", "compat", "matters"),
    [(False, "none", 1), (False, "original", 0), (True, "original", 1)],
)
def test_the_teacher_of_vqa_matters_except_as_published_for_simla(albef, compat, matters):
    model, batch = vqa(albef, compat=compat).train(), inputs(albef) | training_answers()
    with torch.no_grad():
        for parameter in model.text_decoder_m.parameters():
            parameter.mul_(0.5)
    zero, some = (model(**batch, alpha=alpha)["loss_vqa"] for alpha in (0.0, 0.5))
    assert bool((zero - some).abs() > 1e-4) == bool(matters)


def test_same_length_visits_every_row_once():
    length = torch.tensor([3, 5, 3, 4, 3, 5, 3])
    groups = list(same_length(length, most=3))
    assert sorted(i for group in groups for i in group.tolist()) == list(range(7))
    assert all(len(set(length[group].tolist())) == 1 and len(group) <= 3 for group in groups)


def statements(albef: bool, images: int, **options) -> StatementModel:
    torch.manual_seed(0)
    config = tiny_config(albef)
    bert, first = for_two_images(config.bert, 1) if images == 2 else (config.bert, None)
    return spread(StatementModel(StatementConfig(config.vit, bert, 3, first, **options)))


@SYSTEMS
def test_both_images_of_a_pair_matter(albef):
    model, batch = statements(albef, 2).eval(), inputs(albef)
    image = torch.stack([batch["image"], batch["image"].flip(0)], dim=1)
    text = {key: batch[key] for key in TEXT}
    with torch.no_grad():
        plain = model.logits(image, **text)
        for place in (0, 1):
            other = image.clone()
            other[:, place] += torch.randn_like(other[:, place])
            assert (model.logits(other, **text) - plain).abs().max() > 1e-3


def test_doubled_layers_share_keys_and_values_alone():
    model = statements(True, 2)
    layers = model.text_encoder.layers
    assert len(layers) == 5  # three layers, doubled from layer 1 on
    for module in (model.text_encoder, model.text_encoder_m):
        for even in (1, 3):
            first, second = (module.layers[i].crossattention.self for i in (even, even + 1))
            assert first["key"] is second["key"] and first["value"] is second["value"]
            assert first["query"] is not second["query"]
    assert (
        model.text_encoder_m.layers[1].crossattention.self["key"]
        is not layers[1].crossattention.self["key"]
    )


def test_teacher_follows_the_student():
    model = statements(False, 1).train()
    with torch.no_grad():
        model.cls_head[2].bias.add_(1.0)
    before = model.cls_head_m[2].bias.clone()
    MomentumPairs(model, 0.9).update()
    torch.testing.assert_close(model.cls_head_m[2].bias, before + 0.1)


def test_without_distillation_there_is_no_teacher():
    model = statements(False, 1, distill=False).train()
    assert not [key for key in model.state_dict() if "_m." in key]
    label = torch.tensor([0, 1, 2, 0])
    loss = model(**inputs(False), label=label, alpha=0.4)["loss_cls"]
    expected = torch.nn.functional.cross_entropy(model.logits(**inputs(False)), label)
    torch.testing.assert_close(loss, expected)


def assignment() -> TextAssignment:
    torch.manual_seed(0)
    config = tiny_config(True)
    bert, first = for_two_images(config.bert)
    return spread(TextAssignment(TextAssignmentConfig(config.vit, bert, first, 16)))


def test_assignment_is_what_the_label_says():
    model, seen = assignment(), torch.zeros(3)
    tokens = torch.randn(6, 17, 24)
    own = torch.arange(6)
    for _ in range(200):
        first, second, label = model.assign(tokens)
        assert torch.equal(first == own, label == 0) and torch.equal(second == own, label == 1)
        assert not (first == second).any()
        seen += label.bincount(minlength=3)
    assert (seen / seen.sum() - 1 / 3).abs().max() < 0.06


def test_assignment_prefers_similar_images():
    model, tokens = assignment(), torch.randn(6, 17, 24)
    tokens[1] = tokens[0]  # the most similar other image of number 0
    drawn = [int(torch.stack(model.assign(tokens)[:2])[:, 0].eq(1).any()) for _ in range(60)]
    assert sum(drawn) > 30


def test_assignment_needs_three_images():
    with pytest.raises(UserError, match="batch_size_train to 3"):
        assignment()(**inputs(True, rows=2))


def test_geometry_for_two_images():
    bert = tiny_config(False, layers=4).bert
    doubled, first = for_two_images(bert)
    assert (doubled.num_hidden_layers, first, doubled.fusion_layer, doubled.single_stream) == (
        6,
        2,
        0,
        False,
    )
    state = {f"text_encoder.encoder.layer.{i}.output.dense.bias": torch.zeros(1) for i in range(7)}
    assert for_two_images(bert, None, state)[1] == 1  # as the checkpoint has it
    with pytest.raises(UserError, match="paired_from 4"):
        for_two_images(bert, 4)


def grounding_model(albef: bool, compat: str = "none") -> Retrieval:
    torch.manual_seed(0)
    config = tiny_config(albef)
    return spread(Retrieval(RetrievalConfig(config.vit, config.bert, 16, 6, compat=compat))).eval()


@SYSTEMS
@pytest.mark.parametrize("mode", [matching_map, contrast_map])
def test_maps_are_those_of_each_sample_alone(albef, mode):
    model, batch = grounding_model(albef), inputs(albef)
    together = mode(model, *batch.values(), 1)
    assert together.shape == (4, 4, 4) and bool((together >= 0).all()) and together.max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    for i in range(4):
        alone = mode(model, *(value[i : i + 1] for value in batch.values()), 1)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-6)


def test_padding_does_not_dim_a_map_except_as_published():
    batch = inputs(True)
    longer = {key: torch.nn.functional.pad(batch[key], (0, 5)) for key in TEXT}
    short, long = (
        matching_map(grounding_model(True), batch["image"], *t.values(), 1)
        for t in ({k: batch[k] for k in TEXT}, longer)
    )
    torch.testing.assert_close(short, long, rtol=1e-3, atol=1e-6)
    original = grounding_model(True, "original")
    theirs = [
        matching_map(original, batch["image"], *t.values(), 1)
        for t in ({k: batch[k] for k in TEXT}, longer)
    ]
    torch.testing.assert_close(theirs[0] * 8 / 13, theirs[1], rtol=1e-3, atol=1e-6)


def test_a_layer_without_cross_attention_has_no_map():
    with pytest.raises(UserError, match=r"text layers 1..2"):
        matching_map(grounding_model(True), *inputs(True).values(), 0)
    with pytest.raises(UserError, match=r"blocks 0..1"):
        contrast_map(grounding_model(True), *inputs(True).values(), 2)


def test_vocabulary_covers_the_answers():
    assert max(max(pieces) for pieces in ANSWERS) < VOCAB
