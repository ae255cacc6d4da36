"""The pre-training model of SIMLA and ALBEF: properties that hold whatever the weights."""

import copy

import pytest
import torch

from base.errors import UserError
from models.fusion.base import Features
from models.fusion.losses import IGNORE, distilled_cross_entropy
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.fusion.simla import Simla, with_counts
from models.layers.vit import ViTConfig
from tests.helpers.gradients import assert_same_gradients, gradients_of
from tests.helpers.tiny_simla import (
    LENGTH,
    PATCHES,
    rows_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)

BOTH = pytest.mark.parametrize("albef", [False, True], ids=["simla", "albef"])


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(losses.values())


def fix_negatives(model: Simla) -> None:
    """The next sample is the negative, on both sides, so that two runs draw alike."""

    def draw(i2t, t2i, same):
        following = (torch.arange(len(same)) + 1) % len(same)
        return following, following

    model.sample_negatives = draw


@BOTH
def test_losses_are_named_finite_and_reach_every_parameter(albef):
    model = tiny_model(albef=albef)
    losses = model(**tiny_batch(albef=albef))
    names = ["loss_ita", "loss_itm", "loss_mlm"] + ([] if albef else ["loss_mim", "loss_pseudo"])
    assert list(losses) == names
    assert all(
        loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
        for loss in losses.values()
    )
    total(losses).backward()
    for name, parameter in model.named_parameters():
        taught = name.split(".")[0].endswith("_m")
        assert parameter.requires_grad != taught and (parameter.grad is None) == taught, name


@pytest.mark.slow
def test_albef_compiled_equals_eager():
    """SIMLA's step is in tests/script/test_compiled.py."""
    model, batch = tiny_model(albef=True, layers=2, depth=1), tiny_batch(albef=True)
    fix_negatives(model)
    other = copy.deepcopy(model)
    fix_negatives(other)
    losses = model(**batch)
    total(losses).backward()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)(**batch)
    total(compiled).backward()
    for name, loss in losses.items():
        torch.testing.assert_close(compiled[name], loss)
    eager, ours = gradients_of(model), gradients_of(other)
    trained = {name: value for name, value in eager.items() if value is not None}
    assert {name for name, value in ours.items() if value is not None} == trained.keys()
    assert_same_gradients({name: ours[name] for name in trained}, trained, part=1e-5)
    assert torch.equal(model.image_queue, other.image_queue) and torch.equal(
        model.queue_ptr, other.queue_ptr
    )


@BOTH
def test_one_fusion_pass_equals_separate_ones(albef):
    model, batch = tiny_model(albef=albef), tiny_batch(albef=albef)
    tokens, mask = model.visual_encoder(batch["image"]), batch["text_mask"]
    stage, masked_stage = model.text_stages(batch["text_ids"], batch["mlm_ids"], mask)
    images, texts = torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 0])
    matched, masked = model.fuse_pairs(stage, mask, tokens, images, texts, masked_stage)
    bert = model.bert
    alone = bert.text_stage(batch["text_ids"], mask)
    own = bert.fuse(alone, mask, tokens)[:, 0]
    drawn_image = bert.fuse(alone, mask, tokens[images])[:, 0]
    drawn_text = bert.fuse(alone[texts], mask[texts], tokens)[:, 0]
    torch.testing.assert_close(matched, torch.cat([own, drawn_image, drawn_text]))
    torch.testing.assert_close(masked, bert(batch["mlm_ids"], mask, tokens))
    without_masked, none = model.fuse_pairs(stage, mask, tokens, images, texts)
    torch.testing.assert_close(without_masked, matched)
    assert none is None


def test_each_network_makes_the_patches_of_a_batch_once():
    """With a stem or a tower they are most of an image's work; a mask is laid over them."""
    model, batch = tiny_model(), tiny_batch()
    seen = []
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        encoder.patch_embed.register_forward_hook(lambda *_, encoder=encoder: seen.append(encoder))
    model(**batch)
    assert seen == [model.visual_encoder, model.visual_encoder_m]


def test_heads_at_masked_places_equal_dense_heads():
    """MLM and MIM computed everywhere and averaged over the masked places."""
    model, batch = tiny_model().eval(), tiny_batch()
    MomentumPairs(model).copy()
    losses = model(**batch)
    tokens = model.visual_encoder(batch["image"])
    student_logits = model.text_encoder(batch["mlm_ids"], batch["text_mask"], tokens)
    teacher_logits = model.text_encoder_m(batch["mlm_ids"], batch["text_mask"], tokens)
    chosen = batch["mlm_ids"] != batch["text_ids"]
    rows = distilled_cross_entropy(
        student_logits[chosen], batch["text_ids"][chosen], teacher_logits[chosen], 0.4
    )
    torch.testing.assert_close(losses["loss_mlm"], rows.mean())

    queries = model.bert.embeddings(
        embeds=model.visual_encoder(batch["image"], batch["patch_mask"])
    )
    context = model.bert.embeddings(batch["text_ids"])
    fused = model.bert.fuse(queries, None, context, image_mask=batch["text_mask"])
    logits = model.mim_head(fused[:, 1:])[batch["patch_mask"]]
    rows = distilled_cross_entropy(logits, batch["visual_codes"][batch["patch_mask"]], logits, 0.4)
    torch.testing.assert_close(losses["loss_mim"], rows.mean())


@BOTH
def test_teacher_has_no_dropout_but_the_student_has(albef):
    model, batch = tiny_model(albef=albef, dropout=0.5), tiny_batch(albef=albef)
    seen = []
    model.momentum_features = lambda *args: (
        seen.append(type(model).momentum_features(model, *args)) or seen[-1]
    )
    fix_negatives(model)
    first, second = model(**batch), model(**batch)
    assert torch.equal(seen[0].text, seen[1].text) and torch.equal(seen[0].image, seen[1].image)
    assert not torch.equal(first["loss_mlm"], second["loss_mlm"])
    assert model.training and model.text_encoder.training and not model.text_encoder_m.training
    published = tiny_model(albef=albef, dropout=0.5, compat="original")
    assert published.text_encoder_m.training and not published.eval().text_encoder_m.training


@BOTH
def test_no_nan_at_the_smallest_temperature(albef):
    model = tiny_model(albef=albef, temp=0.07)
    with torch.no_grad():
        model.temp.fill_(-3.0)  # the optimizer overshot
    for step in range(3):
        losses = model(**tiny_batch(albef=albef, seed=step))
        total(losses).backward()
    assert model.temp.item() == pytest.approx(0.001)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@BOTH
def test_nothing_masked_gives_zero(albef):
    model, batch = tiny_model(albef=albef), tiny_batch(albef=albef)
    batch |= {
        "mlm_ids": batch["text_ids"],
        "mlm_labels": torch.full_like(batch["mlm_labels"], IGNORE),
    }
    if not albef:
        batch["patch_mask"] = torch.zeros(4, PATCHES, dtype=torch.bool)
    losses = model(**batch)
    total(losses).backward()
    assert losses["loss_mlm"] == 0 and (albef or losses["loss_mim"] == 0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_micro_batches_with_other_numbers_of_masked_tokens_and_patches_are_one_batch():
    model = tiny_model()
    batch = tiny_batch(rows=4)
    parts = [rows_of(batch, 0, 2), rows_of(batch, 2, 4)]
    together = model(**batch)
    alone = [model(**part) for part in parts]
    counted = [model(**part) for part in with_counts(parts)]
    for name in ("loss_mlm", "loss_mim"):
        torch.testing.assert_close((counted[0][name] + counted[1][name]) / 2, together[name])
        means = (alone[0][name] + alone[1][name]) / 2
        assert abs(means - together[name]) > 1e-3 * together[name]


def test_queue_of_any_size_keeps_the_latest_in_order():
    for size in (0, 1, 3, 4, 6, 7, 11):
        model = tiny_model(queue_size=size)
        written = []
        for step in range(4):
            torch.manual_seed(step)
            features = Features(torch.randn(4, 16), torch.randn(4, 16))
            written.append(features)
            columns = model.enqueue(features)
            assert len(columns) == min(4, size)
        if size == 0:
            assert model.image_queue.shape == (16, 0)
            continue
        latest = torch.cat([f.image for f in written])[-size:]
        held = model.image_queue.t()
        for i, row in enumerate(reversed(latest)):
            assert torch.equal(held[(16 - 1 - i) % size], row)
        assert int(model.queue_ptr) == 16 % size


@pytest.mark.parametrize("size", [0, 3, 7])
def test_training_with_any_queue_size(size):
    model = tiny_model(queue_size=size)
    for step in range(3):
        total(model(**tiny_batch(seed=step))).backward()
    assert int(model.queue_ptr) == (12 % size if size else 0)


def test_evaluation_leaves_the_queue_alone():
    model = tiny_model().eval()
    queue = model.image_queue.clone()
    model(**tiny_batch())
    assert torch.equal(model.image_queue, queue) and int(model.queue_ptr) == 0


def test_the_loss_sees_the_queue_before_its_own_enqueue():
    model, batch = tiny_model(), tiny_batch()
    untouched = copy.deepcopy(model).eval()  # no enqueue in evaluation mode
    loss, expected = model(**batch)["loss_ita"], untouched(**batch)["loss_ita"]
    assert not torch.equal(model.image_queue, untouched.image_queue)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(model.vision_proj.weight.grad, untouched.vision_proj.weight.grad)


def test_autocast_losses_are_float32_and_close():
    model, batch = tiny_model(), tiny_batch()
    fix_negatives(model)
    exact = copy.deepcopy(model)
    fix_negatives(exact)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**batch)
    total(losses).backward()
    for name, loss in exact(**batch).items():
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(loss.item(), rel=0.05), name


def test_special_tokens_are_no_keywords(monkeypatch):
    import models.fusion.simla

    seen, targets_of = [], models.fusion.simla.keyword_targets
    monkeypatch.setattr(
        models.fusion.simla,
        "keyword_targets",
        lambda *args: seen.append(targets_of(*args)) or seen[-1],
    )
    batch = tiny_batch()
    tiny_model()(**batch)
    targets, votes = seen[0]
    assert targets[:, :5].sum() == 0 and targets.sum() > 0
    assert votes[:, 0].sum() == 0 and votes[~batch["text_mask"]].sum() == 0


def test_mistakes_say_the_remedy():
    with pytest.raises(UserError, match="batch_size"):
        tiny_model()(**tiny_batch(rows=1))
    with pytest.raises(UserError, match="compat"):
        Simla(tiny_config(compat="both"))
    with pytest.raises(UserError, match="mim"):
        Simla(tiny_config(albef=True, mim=True))
    with pytest.raises(UserError, match="mask_token"):
        Simla(tiny_config(vit=ViTConfig(32, 8, 24, 2, 4)))
    with pytest.raises(UserError, match="lower image_res"):
        Simla(tiny_config(vit=ViTConfig(64, 8, 24, 2, 4, mask_token=True)))
    with pytest.raises(UserError, match="encoder_width"):
        Simla(tiny_config(vit=ViTConfig(32, 8, 48, 2, 4, mask_token=True)))


def test_retrieval_all_captions_of_one_image_is_no_error():
    """A batch without any legal negative trains on its positives alone."""
    tiny = tiny_config()
    torch.manual_seed(0)
    model = Retrieval(
        RetrievalConfig(vit=tiny.vit, bert=tiny.bert, embed_dim=16, queue_size=6)
    ).train()
    batch = tiny_batch()
    given = {k: batch[k] for k in ("image", "text_ids", "text_mask", "alpha")}
    logits = []
    model.itm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    losses = model(**given, image_id=torch.full((4,), 7))
    expected = torch.nn.functional.cross_entropy(logits[0][:4], torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(losses["loss_itm"], expected)
    assert (model.idx_queue[0, :4] == 7).all() and (model.idx_queue[0, 4:] == -100).all()


def test_retrieval_positives_are_the_captions_of_the_same_image():
    tiny = tiny_config()
    model = Retrieval(RetrievalConfig(vit=tiny.vit, bert=tiny.bert, embed_dim=16, queue_size=3))
    model.idx_queue[0] = torch.tensor([5, -100, 9])
    ids = torch.tensor([5, 9, 5])
    expected = torch.tensor(
        [[1 / 3, 0, 1 / 3, 1 / 3, 0, 0], [0, 0.5, 0, 0, 0, 0.5], [1 / 3, 0, 1 / 3, 1 / 3, 0, 0]]
    )
    torch.testing.assert_close(model.positives(ids, ids), expected)


def test_a_batch_larger_than_the_queue_leaves_its_last_ids():
    tiny = tiny_config()
    model = Retrieval(RetrievalConfig(vit=tiny.vit, bert=tiny.bert, embed_dim=16, queue_size=3))
    given = Features(torch.rand(4, 16), torch.rand(4, 16))
    model.enqueue_with_ids(given, torch.tensor([5, 6, 7, 8]))
    for column, number in enumerate(model.idx_queue[0].tolist()):
        assert torch.equal(model.image_queue[:, column], given.image[number - 5])


@pytest.mark.slow
def test_retrieval_compiled_equals_eager():
    tiny = tiny_config(layers=1, depth=1)
    torch.manual_seed(0)
    model = Retrieval(
        RetrievalConfig(vit=tiny.vit, bert=tiny.bert, embed_dim=16, queue_size=6)
    ).train()
    fix_negatives(model)
    other = copy.deepcopy(model)
    fix_negatives(other)
    batch = tiny_batch()
    given = {k: batch[k] for k in ("image", "text_ids", "text_mask", "alpha")} | {
        "image_id": torch.tensor([1, 2, 1, 3])
    }
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)(**given)
    for name, loss in model(**given).items():
        torch.testing.assert_close(compiled[name], loss)
    assert torch.equal(model.idx_queue, other.idx_queue) and given["text_ids"].shape[1] == LENGTH
