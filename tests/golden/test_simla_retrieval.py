"""Retrieval fine-tuning and scoring of SIMLA and ALBEF against the originals, from converted
pre-training weights."""

import pytest
import torch

from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.layers.positions import resize_positions
from tests.golden.report import compare, compare_gradients, same
from tests.golden.simla_cases import bert_of, draw_recorded_negatives, vit_of
from tests.helpers.golden import decode_image, golden

LOSS, TENSOR, GRADIENT = 1e-5, 1e-5, 1e-4


@pytest.fixture(params=["simla", "albef"])
def case(request):
    """(name, meta, tensors, retrieval model with the converted pre-training weights)."""
    name = f"retrieval_{request.param}"
    meta, t = golden("simla", name)
    _, pretrained = golden("simla", f"pretrain_{request.param}")
    c = meta["config"]
    model = Retrieval(
        RetrievalConfig(
            vit=vit_of(c),
            bert=bert_of(c),
            embed_dim=c["embed_dim"],
            queue_size=c["queue_size"],
            compat="original",
        )
    )
    state = {
        k.removeprefix("state.").replace("bert.", ""): v
        for k, v in pretrained.items()
        if k.startswith("state.")
    }
    for key in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        state[key] = resize_positions(state[key], model.config.vit.grid)
    compare(
        name,
        "position interpolation",
        state["visual_encoder.pos_embed"],
        t["out.pos_embed"],
        TENSOR,
    )
    state |= {k.removeprefix("new."): v for k, v in t.items() if k.startswith("new.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    same(name, "checkpoint keys left over", sorted(unexpected), sorted(meta["load"]["unexpected"]))
    same(name, "checkpoint keys missing", missing, [])
    new = {key.removeprefix("new.") for key in t}
    assert set(meta["load"]["missing"]) <= new
    return name, meta, t, model


def test_two_training_steps(case):
    name, meta, t, model = case
    pairs = MomentumPairs(model.train(), meta["config"]["momentum"])
    matching = []
    drawn = draw_recorded_negatives(model, [negatives_of(t, step) for step in (0, 1)])
    model.itm_head.register_forward_hook(lambda module, args, output: matching.append(output))
    for step in (0, 1):
        given = {
            k.removeprefix(f"in.step{step}."): v
            for k, v in t.items()
            if k.startswith(f"in.step{step}.")
        }
        pairs.update()
        losses = model(
            image=decode_image(given["image"]),
            text_ids=given["input_ids"],
            text_mask=given["attention_mask"].bool(),
            image_id=given["idx"],
            alpha=torch.tensor(meta["config"]["alpha"]),
        )
        for key, loss in losses.items():
            compare(name, key, loss, t[f"out.step{step}.{key}"], LOSS)
        compare(name, "ITM logits", matching[-1], t[f"out.step{step}.itm_logits"], TENSOR)
    assert len(drawn) == 2
    sum(losses.values()).backward()
    compare_gradients(name, model, meta["grad_norms"], t, GRADIENT)
    for queue in ("image_queue", "text_queue"):
        compare(name, "queues", getattr(model, queue), t[f"out.final.{queue}"], TENSOR)
    same(name, "queue of ids", model.idx_queue, t["out.final.idx_queue"])
    same(name, "queue pointer", model.queue_ptr, t["out.final.queue_ptr"])


def negatives_of(t: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image for each text, text for each image) of a recorded step."""
    names = ("negative_image_for_text", "negative_text_for_image")
    return tuple(t[f"in.step{step}.{name}"] for name in names)


@torch.no_grad()
def test_evaluation_scores(case):
    name, meta, t, model = case
    model.eval()
    ids, mask = t["in.eval.input_ids"], t["in.eval.attention_mask"].bool()
    tokens, image_features = model.encode_image(decode_image(t["in.eval.images"]))
    states, text_features = model.encode_text(ids, mask)
    similarity = image_features @ text_features.T
    compare(name, "image features", image_features, t["out.eval.image_embeds"], TENSOR)
    compare(name, "text features", text_features, t["out.eval.text_embeds"], TENSOR)
    compare(name, "similarity matrix", similarity, t["out.eval.sims"], TENSOR)
    k = meta["config"]["k_test"]
    for key, scores_of in (("score_i2t", similarity), ("score_t2i", similarity.T)):
        top = scores_of.topk(k, dim=1).indices
        first = torch.arange(len(top)).repeat_interleave(k)
        images, texts = (first, top.flatten()) if key == "score_i2t" else (top.flatten(), first)
        theirs = t[f"out.eval.{key}"]
        for text in (ids, states):
            scores = torch.full(theirs.shape, -100.0)
            scores[first, top.flatten()] = model.match_scores(
                text[texts], mask[texts], tokens, rows=images
            )
            assert torch.equal(scores == -100, theirs == -100)
            found = theirs != -100
            compare(name, "matching scores", scores[found], theirs[found], TENSOR)
