"""Retrieval fine-tuning and scoring of SIMLA and ALBEF against the originals, from converted pre-training weights."""

import pytest
import torch

from models.momentum import MomentumPairs
from models.retrieval import Retrieval, RetrievalConfig
from models.vit import ViTConfig, resize_pos_embed
from models.xbert import BertConfig
from tests.golden.report import compare, record
from tests.helpers.golden import decode_image, golden

LOSS, TENSOR, GRADIENT = 1e-5, 1e-5, 1e-4


@pytest.fixture(params=["simla", "albef"])
def case(request):
    """(name, meta, tensors, retrieval model with the converted pre-training weights)."""
    name = f"retrieval_{request.param}"
    meta, t = golden("simla", name)
    _, pretrained = golden("simla", f"pretrain_{request.param}")
    c = meta["config"]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = Retrieval(
        RetrievalConfig(
            vit=ViTConfig(c["image_size"], **{k: v for k, v in c["vit"].items() if v is not None}),
            bert=BertConfig.from_json(c["bert"] | no_dropout),
            embed_dim=c["embed_dim"],
            queue_size=c["queue_size"],
            compat="original",
        )
    )
    state = {k.removeprefix("state.").replace("bert.", ""): v for k, v in pretrained.items() if k.startswith("state.")}
    for key in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        state[key] = resize_pos_embed(state[key], model.config.vit.grid)
    compare(name, "position interpolation", state["visual_encoder.pos_embed"], t["out.pos_embed"], TENSOR)
    state |= {k.removeprefix("new."): v for k, v in t.items() if k.startswith("new.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == [] and sorted(unexpected) == sorted(meta["load"]["unexpected"])
    return name, meta, t, model


def test_two_training_steps(case):
    name, meta, t, model = case
    pairs = MomentumPairs(model.train(), meta["config"]["momentum"])
    matching = []
    model.itm_head.register_forward_hook(lambda module, args, output: matching.append(output))
    for step in (0, 1):
        given = {k.removeprefix(f"in.step{step}."): v for k, v in t.items() if k.startswith(f"in.step{step}.")}
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
    sum(losses.values()).backward()
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert list(parameters) == list(meta["grad_norms"])
    scale = max(meta["grad_norms"].values())
    for key, norm in meta["grad_norms"].items():
        error = abs(float(parameters[key].grad.norm()) - norm) / max(norm, 1e-4 * scale)
        record(name, "gradient norms", error)
        assert error < GRADIENT, key
    for key in [k for k in t if k.startswith("grad.")]:
        compare(name, "gradients", parameters[key.removeprefix("grad.")].grad, t[key], GRADIENT)
    for queue in ("image_queue", "text_queue"):
        compare(name, "queues", getattr(model, queue), t[f"out.final.{queue}"], TENSOR)
    assert torch.equal(model.idx_queue, t["out.final.idx_queue"])
    assert torch.equal(model.queue_ptr, t["out.final.queue_ptr"])


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
            scores[first, top.flatten()] = model.match_scores(text[texts], mask[texts], tokens, rows=images)
            assert torch.equal(scores == -100, theirs == -100)
            found = theirs != -100
            compare(name, "matching scores", scores[found], theirs[found], TENSOR)
