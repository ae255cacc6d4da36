"""Under bf16 autocast the losses are those of float32 features, and so are the scores that
evaluations rank by: no logit is rounded to bfloat16."""

import pytest
import torch

from base.distributed import World
from evaluation.retrieval import nearest
from evaluation.zeroshot import class_scores
from main import total_loss
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.fusion.retrieval import Retrieval, RetrievalConfig
from tests.helpers.tiny_simla import tiny_batch, tiny_config

METHODS = {
    "clip": "CLIP_VITT8_CLIP",
    "siglip": "CLIP_VITT8_SIGLIP",
    "align": "ALIGN_NANO_TINY",
    "cl2l": "CL2L_VITT8_CL2L",
    "barlip": "CL2L_VITT8_BARLIP",
    "siamlip": "CL2L_VITT8_SIAMLIP",
    "swalip": "CL2L_VITT8_SWALIP",
    "slip": "SLIP_VITT8",
}


def features() -> dict[str, torch.Tensor]:
    """Features of every method for 32 pairs, partners alike, at CLIP's temperature of 0.01."""
    torch.manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(32, 64), dim=-1)

    def near(*views: int) -> torch.Tensor:
        shape = base[:, None].expand(-1, *views, -1) if views else base
        return (shape + 0.1 * torch.randn(shape.shape)).requires_grad_()

    out = {
        name: near()
        for name in ("z_image", "z_text", "z_image_global", "z_text_global", "v_image", "v_text")
    }
    out |= {
        name: near()
        for name in ("image_embed", "text_embed", "aug1_embed", "aug2_embed", "p_image", "p_text")
    }
    out |= {f"{kind}_{side}_local": near(2) for kind in "hvp" for side in ("image", "text")}
    scale = torch.tensor(100.0)
    return out | {
        "logit_scale": scale,
        "h_logit_scale": scale,
        "logit_bias": -scale / 10,
        "temperature": 1 / scale,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tile", [None, 16])
def test_losses_in_float32(method, tile):
    config = DualConfig(model=METHODS[method], tile=tile, label_smoothing=0.0)
    with torch.device("meta"):
        model = build_dual(config)
    results = []
    for autocast in (False, True):
        out = features()
        model.features = lambda out=out: out
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = total_loss(model(), config)
        loss.backward()
        grads = {name: x.grad for name, x in out.items() if x.grad is not None}
        results.append((loss, grads))
    (plain, gradients), (cast, cast_gradients) = results
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert gradients.keys() == cast_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, cast_gradients[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_features_of_bfloat16_give_losses_in_float32(method):
    """What towers return under autocast is widened before anything is computed of it."""
    config = DualConfig(model=METHODS[method], label_smoothing=0.0)
    with torch.device("meta"):
        model = build_dual(config)
    rounded = {name: x.detach().bfloat16() for name, x in features().items()}
    model.features = lambda: rounded
    with torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(model(), config)
    exact = model.losses({name: x.float() for name, x in rounded.items()})
    assert torch.equal(loss, total_loss(exact, config))


def test_similarities_in_float32():
    """Rounded, those of 500 keys to a query take a dozen values."""
    rows = torch.nn.functional.normalize(torch.randn(500, 32) + 1, dim=-1)
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            classes = class_scores({"z": rows, "h": rows}, {"z": rows, "h": rows.flip(1)})
            ranking = nearest(rows, rows, 10, alone)
        found.append([*classes.values(), ranking.candidates, ranking.scores])
    assert all(map(torch.equal, *found))


def test_matching_scores_in_float32():
    """The head's logits have the states' own differences, however near these are."""
    config = tiny_config()
    model = Retrieval(RetrievalConfig(config.vit, config.bert, embed_dim=8, queue_size=4)).eval()
    batch = tiny_batch()
    ids = batch["text_ids"][:1].expand(9, -1)
    mask = batch["text_mask"][:1].expand(9, -1)
    near = batch["image"][:1] + 1e-3 * torch.randn(9, *batch["image"].shape[1:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model.encode_image(near)
        scores = model.match_scores(ids, mask, tokens, None)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
