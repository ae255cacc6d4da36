"""The dual encoders' losses against their definitions written out, and the tiled forms against the
dense ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import UserError
from models.dual_encoder import losses as contrastive
from models.dual_encoder.config import DualConfig
from models.dual_encoder.losses import normalize
from tests.helpers.clip_toys import losses_of


def units(*shape, seed=0):
    return normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()


def both_sides(b=5, total=10, image_views=2, text_views=3):
    """Own and everyone's images and texts, of which `clip_loss` takes four."""
    return (
        units(b, image_views, 6),
        units(b, text_views, 6, seed=1),
        units(total, image_views, 6, seed=2),
        units(total, text_views, 6, seed=3),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tile", [1, 3, 4, 100])
@pytest.mark.parametrize("alone", [False, True], ids=["one_of_several", "alone"])
def test_tiled_clip_loss_equals_dense(tile, smoothing, alone):
    image, text, all_image, all_text = both_sides()
    if alone:  # one process holds all pairs
        all_image, all_text = image, text
    inputs = (image, text, all_image, all_text, torch.tensor(7.0, requires_grad=True))
    views = contrastive.Views(*inputs[:4], first=0 if alone else 4)
    dense = contrastive.clip_loss(views, inputs[4], smoothing)
    tiled = contrastive.clip_loss(views, inputs[4], smoothing, tile)
    for ours, theirs in zip(tiled, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in ("loss_image", "loss_text"):
        expected = torch.autograd.grad(
            getattr(dense, name), inputs, retain_graph=True, allow_unused=True
        )
        found = torch.autograd.grad(
            getattr(tiled, name), inputs, retain_graph=True, allow_unused=True
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clip_loss_is_the_mean_cross_entropy_over_pairs_of_views():
    image, text, all_image, all_text = both_sides(4, 8)
    scale, labels = torch.tensor(5.0), 4 + torch.arange(4)
    views = contrastive.Views(image, text, all_image, all_text, first=4)
    found = contrastive.clip_loss(views, scale, 0.2)
    for query, keys, loss, acc in (
        (image, all_text, found.loss_image, found.acc_image),
        (text, all_image, found.loss_text, found.acc_text),
    ):
        logits = [scale * q @ k.T for q in query.unbind(1) for k in keys.unbind(1)]
        expected = [F.cross_entropy(x, labels, label_smoothing=0.2) for x in logits]
        torch.testing.assert_close(loss, torch.stack(expected).mean())
        right = [(x.argmax(1) == labels).float().mean() for x in logits]
        torch.testing.assert_close(acc, 100 * torch.stack(right).mean())


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("tile", [None, 16])
def test_tiles_keep_memory_apart_from_the_batch(tile):
    query, keys = units(64, 1, 4), units(256, 1, 4, seed=1)
    with LargestTensor() as seen:
        views = contrastive.Views(query, query, keys, keys, first=0)
        loss = contrastive.clip_loss(views, torch.tensor(3.0), tile=tile).loss
        pairs = contrastive.sigmoid_loss(
            query[:, 0], keys[:, 0], torch.tensor(3.0), torch.tensor(0.0), tile=tile
        )
        (loss + pairs).backward()
    assert (seen.largest == 64 * 256) == (tile is None)
    assert tile is None or seen.largest == 256 * 4


def test_tiles_round_as_the_dense_form_under_autocast():
    query, keys, scale = units(8, 1, 32), units(8, 1, 32, seed=1), torch.tensor(30.0)
    with torch.autocast("cpu", torch.bfloat16):
        views = contrastive.Views(query, query, keys, keys, first=0)
        dense = contrastive.clip_loss(views, scale)
        tiled = contrastive.clip_loss(views, scale, tile=3)
        pairs = [
            contrastive.sigmoid_loss(query[:, 0], keys[:, 0], scale, -scale, tile=tile)
            for tile in (None, 3)
        ]
    torch.testing.assert_close(tiled[0], dense[0].float(), rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(pairs[1], pairs[0], rtol=3e-3, atol=3e-3)
    assert tiled.acc_image == dense.acc_image


def test_tiles_compiled_equal_eager():
    """A tensor written by `out=` through a transposed view has lost blocks in a compiled step."""
    inputs = (units(8, 1, 4), units(8, 1, 4, seed=1), torch.tensor(5.0, requires_grad=True))

    def both_losses(image, text, scale):
        views = contrastive.Views(image, text, image, text, first=0)
        found = contrastive.clip_loss(views, scale, tile=4)
        return found.loss_image, found.loss_text

    found = torch.compile(both_losses, backend="aot_eager")(*inputs)
    expected = both_losses(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(sum(losses), inputs) for losses in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tile", [None, 2, 3])
def test_sigmoid_loss(tile):
    image, text = units(4, 6), units(8, 6, seed=1)
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    inputs = (image, text, scale, bias)
    sign = -torch.ones(4, 8)
    sign[torch.arange(4), 4 + torch.arange(4)] = 1
    expected = -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum(1).mean()
    loss = contrastive.sigmoid_loss(image, text, scale, bias, 4, tile)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [9, 5])  # more features than pairs, and fewer
def test_barlow_twins_from_features_and_from_the_correlation_matrix(width):
    image = torch.randn(6, 2, width, requires_grad=True)
    text = torch.randn(6, 3, width, requires_grad=True)
    expected = 0
    for a in range(2):
        for b in range(3):
            k = image[:, a].T @ text[:, b] / 6
            diagonal = k.diagonal()
            expected = (
                expected
                + ((diagonal - 1) ** 2).sum()
                + 0.3 * (k.square().sum() - diagonal.square().sum())
            )
    loss = contrastive.barlow_twins(image, text, 0.3, 0.7)
    torch.testing.assert_close(loss, 0.7 * expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (image, text)),
        torch.autograd.grad(0.7 * expected, (image, text)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_negative_cosine_sums_over_pairs_of_views():
    p, v = torch.randn(5, 2, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    expected = sum(
        2 - 2 * F.cosine_similarity(p[:, a], v[:, b]).mean() for a in range(2) for b in range(3)
    )
    loss = contrastive.negative_cosine(p, v)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert v.grad is None


def test_sinkhorn_balances():
    scores = normalize(torch.randn(3, 12, 4)) @ normalize(torch.randn(3, 4, 4))
    q = contrastive.sinkhorn(scores, 0.5, 200)
    torch.testing.assert_close(q.sum(-1), torch.ones(3, 12))
    torch.testing.assert_close(q.sum(-2), torch.full((3, 4), 3.0), rtol=1e-3, atol=1e-3)
    # a temperature whose plain exponential would overflow float32
    assert contrastive.sinkhorn(scores, 0.004, 3).isfinite().all()


def test_scale_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = contrastive.scale_gradient(x, 0.25)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 0.25))


def features(views: int, b: int = 6) -> dict:
    g = torch.Generator().manual_seed(3)
    out = {f"z_{m}_global": torch.randn(b, 5, generator=g) for m in ("image", "text")}
    out |= {
        f"h_{m}_local": torch.randn(b, views, 5, generator=g) for m in ("image", "text") if views
    }
    return out | {"logit_scale": torch.tensor(8.0), "h_logit_scale": torch.tensor(5.0)}


def test_cl2l_without_local_views_is_clip():
    out = features(0)
    clip = {
        "z_image": out["z_image_global"],
        "z_text": out["z_text_global"],
        "logit_scale": out["logit_scale"],
    }
    expected = losses_of("CLIP_VITT8_CLIP", clip)
    actual = losses_of("CL2L_VITT8_CL2L", out)
    for name in ("loss", "clip_loss", "clip_acc"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("views", [2, 3])
def test_swalip_predicts_another_pair_of_views(views):
    """For two views as published; with more, every view takes part, unless the original's numbers
    are asked for."""
    out = features(views)
    image, text = normalize(out["h_image_local"]), normalize(out["h_text_local"])

    def term(own, other, a, b, c, d):
        q = contrastive.sinkhorn(own[:, c] @ other[:, d].T, 0.05, 3)
        return contrastive.soft_cross_entropy(5 * own[:, a] @ other[:, b].T, q)

    def over(n):
        pairs = [(a, b, (a + 1) % n, (b + 1) % n) for a in range(n) for b in range(n)]
        return sum(term(image, text, *pair) + term(text, image, *pair) for pair in pairs) / (
            2 * views**2
        )

    for compat, n in (("none", views), ("original", 2)):
        loss = losses_of("CL2L_VITT8_SWALIP", out, compat=compat)["swalip_loss"]
        torch.testing.assert_close(loss, over(n), rtol=1e-4, atol=1e-5)


def test_bad_options():
    with pytest.raises(UserError, match="loss_avg_or_sum"):
        DualConfig(loss_avg_or_sum="mean")
    with pytest.raises(UserError, match="sk_iters"):
        DualConfig(sk_iters=0)
    with pytest.raises(UserError, match="label_smoothing"):
        losses_of("CL2L_VITT8_SWALIP", features(2), label_smoothing=0.1)
    with pytest.raises(UserError, match="num_augs"):
        losses_of("CL2L_VITT8_SWALIP", features(0))


def test_perfect_features_have_small_loss():
    eye = torch.eye(4)
    out = {
        "z_image": eye,
        "z_text": eye,
        "logit_scale": torch.tensor(100.0),
        "logit_bias": torch.tensor(-50.0),
    }
    assert losses_of("CLIP_VITT8_CLIP", out)["loss"] < 1e-4
    assert losses_of("CLIP_VITT8_CLIP", out)["clip_acc"] == 100
    assert losses_of("CLIP_VITT8_SIGLIP", out)["loss"] < 1e-4
    uniform = out | {"z_text": torch.ones(4, 4)}
    assert math.isclose(
        losses_of("CLIP_VITT8_CLIP", uniform)["loss"].item(), math.log(4), rel_tol=1e-4
    )
