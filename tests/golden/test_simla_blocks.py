"""The building blocks against the originals: vision transformer, text transformers, both kinds of
language model."""

import pytest
import torch

from models.fusion.losses import (
    IGNORE,
    distilled_cross_entropy,
    masked_mean,
    sequence_axis_soft_loss,
)
from models.layers.positions import resize_positions
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, DecoderCache, XBert, XBertLM
from tests.golden.report import compare
from tests.helpers.golden import decode_image, golden

TOLERANCE = 1e-5


def load(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load the original's state dict, which must fit exactly."""
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    assert set(state) == set(module.state_dict())
    module.load_state_dict(state)
    module.eval()


def bert_config(meta: dict) -> BertConfig:
    known = {k: v for k, v in meta["config"].items() if k != "alpha"}
    return BertConfig.from_json(
        known | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )


@pytest.fixture(scope="module")
def vit_case():
    meta, t = golden("simla", "vit")
    c = meta["config"]
    geometry = {
        k: c[k]
        for k in (
            "image_size",
            "patch_size",
            "width",
            "depth",
            "heads",
            "mlp_ratio",
            "layer_norm_eps",
        )
    }
    vit = ViT(ViTConfig(**geometry, mask_token=True))
    load(vit, t)
    return vit, t, meta["attn_block_index"]


def test_vit_tokens(vit_case):
    vit, t, _ = vit_case
    image, masked = decode_image(t["in.image"]), t["in.masked_pos"].bool()
    compare("vit", "tokens", vit(image), t["out.tokens"], TOLERANCE)
    compare("vit", "tokens, patches masked", vit(image, masked), t["out.tokens_masked"], TOLERANCE)


def test_vit_attention_map_and_its_gradient(vit_case):
    vit, t, block = vit_case
    tokens, probabilities = vit(decode_image(t["in.image"]), map_block=block)
    loss = (tokens[:, 0] * t["in.cls_weight"]).sum()
    (gradient,) = torch.autograd.grad(loss, probabilities)
    compare("vit", "tokens", tokens, t["out.tokens"], TOLERANCE)
    compare("vit", "attention map", probabilities, t["out.attn_map"], TOLERANCE)
    compare("vit", "gradient of the attention map", gradient, t["out.attn_grad"], TOLERANCE)
    compare("vit", "loss", loss, t["out.loss"], TOLERANCE)


def test_pos_embed_interpolation():
    _, t = golden("simla", "vit")
    prefix = "out.pos_embed_"
    sizes = [key.removeprefix(prefix) for key in t if key.startswith(prefix)]
    assert sizes
    for size in sizes:
        grid = int(size.split("x")[0])
        resized = resize_positions(t["in.pos_embed"], grid)
        compare("vit", "position interpolation", resized, t[prefix + size], TOLERANCE)


def test_single_stream():
    meta, t = golden("simla", "text_single_stream")
    bert = XBert(bert_config(meta))
    load(bert, t)
    ids, mask, image = t["in.input_ids"], t["in.attention_mask"].bool(), t["in.encoder_embeds"]

    def check(quantity, ours, key):
        compare("text_single_stream", quantity, ours, t[f"out.{key}"], TOLERANCE)

    hidden = bert.text_stage(ids, mask)
    check("embeddings", hidden, "embeddings")
    check("text mode", bert.encode_text(ids, mask), "text")
    assert {key for key in t if key.startswith("out.hidden_")} == {
        f"out.hidden_{i}" for i in range(bert.depth + 1)
    }
    for i in range(bert.depth + 1):
        check("hidden states", bert.run(hidden, mask, image, last=i), f"hidden_{i}")
    check("multimodal", bert(ids, mask, image), "multimodal")
    partial = t["in.encoder_mask_partial"].bool()
    check(
        "multimodal, image partly masked",
        bert(ids, mask, image, image_mask=partial),
        "multimodal_partial_mask",
    )
    as_query = bert(embeds=image, image=hidden, image_mask=mask)
    check("image tokens as queries", as_query, "image_as_query")
    for kind, layer, key in (
        ("self", 0, "self_attention_first"),
        ("self", bert.depth - 1, "self_attention_last"),
        ("cross", bert.depth - 1, "cross_attention_last"),
    ):
        out, probabilities = bert(ids, mask, image, map_of=(kind, layer))
        check(f"{kind}-attention map", probabilities, key)
        check("multimodal", out, "multimodal")
    almost = bert.run(hidden, mask, image, last=bert.depth - 1)
    compare(
        "text_single_stream",
        "[CLS] row of the last self-attention",
        bert.cls_attention(almost, mask),
        t["out.self_attention_last"][:, :, 0],
        TOLERANCE,
    )


def test_two_stage():
    meta, t = golden("simla", "text_two_stage")
    bert = XBert(bert_config(meta))
    load(bert, t)
    ids, mask = t["in.input_ids"], t["in.attention_mask"].bool()
    images = [t["in.image0"], t["in.image1"]]
    stage = bert.text_stage(ids, mask)
    compare("text_two_stage", "text mode", bert.encode_text(ids, mask), t["out.text"], TOLERANCE)
    compare(
        "text_two_stage", "fusion", bert.fuse(stage, mask, images[0]), t["out.fusion"], TOLERANCE
    )
    compare(
        "text_two_stage", "whole stack", bert(ids, mask, images[0]), t["out.multi_modal"], TOLERANCE
    )
    compare("text_two_stage", "two images", bert(ids, mask, images), t["out.two_images"], TOLERANCE)
    compare("text_two_stage", "embeddings", bert.embeddings(ids), t["out.embeddings"], TOLERANCE)
    _, probabilities = bert(ids, mask, images[0], map_of=("self", bert.depth - 1))
    compare(
        "text_two_stage",
        "self-attention map",
        probabilities,
        t["out.self_attention_last"],
        TOLERANCE,
    )


@pytest.mark.parametrize("origin", ["simla", "albef"])
def test_masked_lm(origin):
    case = f"masked_lm_{origin}"
    meta, t = golden("simla", case)
    model = XBertLM(bert_config(meta))
    load(model, t)
    labels = t["in.labels"].flatten()
    positions = torch.nonzero(labels != IGNORE).squeeze(1)
    teacher_logits = t["in.soft_labels"].flatten(0, 1)[positions].log()
    logits = model(t["in.input_ids"], t["in.attention_mask"].bool(), t["in.encoder_embeds"])
    compare(case, "logits", logits, t["out.logits"], TOLERANCE)

    def loss(alpha):
        rows = logits.flatten(0, 1)[positions]
        if origin == "albef":
            per_row = distilled_cross_entropy(rows, labels[positions], teacher_logits, alpha)
        else:
            hard = distilled_cross_entropy(rows, labels[positions])
            per_row = (1 - alpha) * hard + alpha * sequence_axis_soft_loss(
                logits, positions, teacher_logits
            )
        return masked_mean(per_row, labels[positions] != IGNORE)

    for key, alpha in (("hard", 0.0), ("alpha", meta["config"]["alpha"]), ("soft_only", 1.0)):
        compare(case, "losses", loss(alpha), t[f"out.loss_{key}"], TOLERANCE)


@pytest.mark.parametrize("origin", ["simla", "albef"])
def test_causal_lm(origin):
    case = f"causal_lm_{origin}"
    meta, t = golden("simla", case)
    model = XBertLM(bert_config(meta))
    load(model, t)
    ids, mask = t["in.input_ids"], t["in.attention_mask"].bool()
    image, image_mask = t["in.encoder_embeds"], t["in.encoder_mask"].bool()
    logits = model(ids, mask, image, image_mask=image_mask, causal=True)
    compare(case, "logits", logits, t["out.logits"], TOLERANCE)
    start = model(ids[:, :1], None, image, image_mask=image_mask, causal=True)
    compare(case, "logits of the start token", start, t["out.start_token_logits"], TOLERANCE)

    compare(
        case, "logits that have a next token", logits[:, :-1], t["out.shifted_logits"], TOLERANCE
    )
    rows, labels = logits[:, :-1].flatten(0, 1), t["in.labels"][:, 1:].flatten()
    hard = distilled_cross_entropy(rows, labels)
    compare(
        case,
        "loss per sequence",
        hard.view(len(ids), -1).sum(1),
        t["out.loss_per_sequence"],
        TOLERANCE,
    )
    teacher, alpha = t["in.soft_labels"].flatten(0, 1).log(), meta["config"]["alpha"]
    if origin == "albef":
        mixed = distilled_cross_entropy(rows, labels, teacher, alpha)
    else:
        soft = sequence_axis_soft_loss(logits[:, :-1], torch.arange(len(rows)), teacher)
        mixed = (1 - alpha) * hard + alpha * soft.masked_fill(labels == IGNORE, 0.0)
    mixed = mixed.view(len(ids), -1).sum(1)
    compare(
        case, "loss per sequence, soft labels", mixed, t["out.loss_per_sequence_alpha"], TOLERANCE
    )

    cache = DecoderCache()
    pieces = [
        model(
            ids[:, i : i + 1],
            mask[:, i : i + 1],
            image,
            image_mask=image_mask,
            causal=True,
            cache=cache,
        )
        for i in range(ids.shape[1])
    ]
    compare(
        case,
        "logits, token by token with a cache",
        torch.cat(pieces, dim=1),
        t["out.logits"],
        TOLERANCE,
    )
