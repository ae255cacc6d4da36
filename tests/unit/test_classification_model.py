"""The ViT classifier: losses, starting values, positions, moving average, and every mistake."""

import copy

import pytest
import torch
import torch.nn.functional as F

from base.errors import UserError
from models.classification.classifier import (
    ClassifierConfig,
    VisionClassifier,
    clipped_sigmoid_loss,
    dense_targets,
    ema_decay,
    sigmoid_loss,
    softmax_loss,
)
from models.classification.mixup import blend, cut_and_paste, mix
from models.layers.average import WeightAverage
from models.layers.positions import resize_positions
from runtime.optim.build import Optimizer, build_optimizer, set_learning_rate


def tiny(**options) -> VisionClassifier:
    torch.manual_seed(0)
    defaults = {"model": "vit-mu/8", "image_size": 32, "num_classes": 10, "head_bias": 0.0}
    model = VisionClassifier(ClassifierConfig(**defaults | options))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    torch.nn.init.normal_(model.cls_token)
    return model


def sparse_batch(rows=5, most=3, classes=10):
    torch.manual_seed(1)
    labels = torch.stack([torch.randperm(classes)[:most] for _ in range(rows)])
    weights = (torch.arange(most) < torch.randint(1, most + 1, (rows, 1))).float()
    return torch.randn(rows, classes) * 3, labels, weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sparse_losses_are_the_dense_ones(smoothing):
    logits, labels, weights = sparse_batch()
    dense = dense_targets(labels, weights, 10)
    assert torch.equal(dense.sum(1), weights.sum(1))
    smooth = dense * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1).mean()
    torch.testing.assert_close(sigmoid_loss(logits, labels, weights, smoothing), expected)
    torch.testing.assert_close(clipped_sigmoid_loss(logits, labels, weights, smoothing), expected)
    expected = F.cross_entropy(logits, labels[:, 0], label_smoothing=smoothing)
    torch.testing.assert_close(
        softmax_loss(logits, labels[:, :1], torch.ones(5, 1), smoothing), expected
    )


def test_soft_labels_are_targets():
    logits, labels, _ = sparse_batch()
    weights = torch.rand(5, 3)
    expected = F.binary_cross_entropy_with_logits(
        logits, dense_targets(labels, weights, 10), reduction="none"
    )
    torch.testing.assert_close(sigmoid_loss(logits, labels, weights), expected.sum(1).mean())


def test_a_label_of_both_mixed_images_counts_whole():
    logits = torch.randn(2, 3)
    image = torch.zeros(2, 3, 4, 4)
    batch = {"image": image, "labels": torch.tensor([[1], [1]]), "label_weights": torch.ones(2, 1)}
    mixed = blend(batch, torch.tensor([0.7, 0.6]))
    del mixed["image"]
    target = torch.tensor([[0.0, 1, 0], [0, 1, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
    for loss in (sigmoid_loss, clipped_sigmoid_loss):
        torch.testing.assert_close(loss(logits, mixed["labels"], mixed["label_weights"]), expected)


def test_a_confident_mistake_keeps_its_gradient():
    logits = torch.full((1, 2), 40.0, requires_grad=True)
    labels, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    sigmoid_loss(logits, labels, weights).backward()
    assert logits.grad[0, 1] == 1
    logits.grad = None
    clipped_sigmoid_loss(logits, labels, weights).backward()
    assert logits.grad[0, 1] == 0  # as the original


def test_the_head_starts_from_unlikely_classes():
    config = {"model": "vit-mu/8", "image_size": 32, "num_classes": 1000, "loss": "sigmoid"}
    model = VisionClassifier(ClassifierConfig(**config))
    assert model.head.bias.eq(-10).all() and model.head.weight.eq(0).all()
    batch = {"labels": torch.zeros(2, 1, dtype=torch.int64), "label_weights": torch.ones(2, 1)}
    loss = model(image=torch.randn(2, 3, 32, 32), **batch)["loss"].item()
    assert loss == pytest.approx(1000 * 4.54e-5 + 10, rel=1e-3)
    assert VisionClassifier(ClassifierConfig(**config, compat="original")).head.bias.eq(0).all()
    assert VisionClassifier(ClassifierConfig(**config | {"loss": "softmax"})).head.bias.eq(0).all()


def test_the_last_block_computes_the_class_token_alone():
    model, image = tiny(representation_size=12), torch.randn(3, 3, 32, 32)
    x = model.embed(image)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.features(image), model.norm(x)[:, 0])
    assert model.logits(image).shape == (3, 10)


def test_dropout_is_active_in_training_alone():
    model, image = tiny(dropout=0.5, attention_dropout=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.logits(image), model.logits(image))
    model.eval()
    assert torch.equal(model.logits(image), model.logits(image))
    torch.testing.assert_close(model.logits(image), tiny().eval().logits(image))


def test_stochastic_depth_leaves_samples_out_of_branches_in_training():
    """timm's rule: the rate rises linearly from 0 to that of the last block; the branches of samples
    that stay are divided by their probability."""
    model = tiny(model="vit-xs/8", drop_path=0.3).train()
    kept = [block.kept.item() for block in model.blocks[1:]]
    assert kept == pytest.approx([0.9, 0.8, 0.7]) and not hasattr(model.blocks[0], "kept")
    assert model.state_dict().keys() == tiny(model="vit-xs/8").state_dict().keys()
    block, x = model.blocks[-1], torch.randn(400, 3, 128)
    block.kept.fill_(0.5)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    update = block.attn(block.norm1(x))[0]
    whole = block(x) - x
    left_out = (whole == 0).flatten(1).all(1)
    assert 150 < left_out.sum() < 250
    torch.testing.assert_close(whole[~left_out], 2 * update[~left_out], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(block.eval()(x) - x, update, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_blocks_with_rates_of_their_own_are_compiled_once():
    """--compile_mode blocks: one graph for blocks that drop, one for the first, one for the last's
    class token; a graph for each rate would end at torch's limit of 8, and the others run eagerly."""
    graphs = []

    def counted(graph, _example):
        graphs.append(graph)
        return graph.forward

    model = tiny(model="vit-ti/8", image_size=16, drop_path=0.3).train()
    for block in model.blocks:
        block.compile(backend=counted)
    model.logits(torch.randn(4, 3, 16, 16))
    assert len(graphs) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "vit-b16"}, "did you mean vit-b/16"),
        ({"model": "vit-xl/16"}, "is unknown; did you mean"),
        ({"image_size": 30}, "nearest size is 32"),
        ({"image_size": 225, "model": "vit-b/16"}, "nearest size is 224"),
        ({"loss": "bce"}, "use softmax or sigmoid"),
    ],
)
def test_mistakes_in_the_configuration(options, words):
    with pytest.raises(UserError, match=words):
        tiny(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="built for 32 x 32"):
        tiny().logits(torch.randn(1, 3, 40, 40))


def test_positions_keep_corners_and_the_class_token():
    old = torch.randn(1, 17, 5)
    new = resize_positions(old, 7, align_corners=True)
    assert new.shape == (1, 50, 5) and torch.equal(new[:, 0], old[:, 0])
    for a, b in ((0, 0), (3, 6), (12, 42), (15, 48)):  # corners stay corners
        torch.testing.assert_close(new[:, 1 + b], old[:, 1 + a])
    assert resize_positions(old, 4, align_corners=True) is old
    for tokens in (16, 15, 1):
        with pytest.raises(UserError, match="no class token and a square"):
            resize_positions(torch.randn(1, tokens, 5), 7, align_corners=True)


def test_decay_of_the_average():
    assert ema_decay(1, 0.9999) == pytest.approx(2 / 11)
    assert [ema_decay(update, 0.9) for update in (79, 80, 200)] == pytest.approx(
        [80 / 89, 0.9, 0.9]
    )
    assert [ema_decay(update, 0.9, start=4) for update in (1, 3, 4, 5)] == pytest.approx(
        [0, 0, 0.1, 2 / 11]
    )


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_keras_arithmetic_is_torchs_where_nothing_changes(opt):
    """Constant learning rate, no epsilon: one and the same."""
    weights = []
    for keras in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        options = {"weight_decay": 0.1, "eps": 1e-30, "keras": keras}
        optimizer = build_optimizer(model, Optimizer(opt, lr=0.1, **options), ["weight"])
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            set_learning_rate(optimizer, 0.1)
            optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)
    with pytest.raises(UserError, match="arithmetic of sgd and adamw, not of lamb"):
        Optimizer("lamb", keras=True)


def test_mixing_keeps_the_mass_of_the_labels():
    _, labels, weights = sparse_batch(rows=6)
    batch = {"image": torch.rand(6, 3, 8, 8), "labels": labels, "label_weights": weights}
    torch.manual_seed(3)
    for alphas in ((0.4, 0), (0, 1.0), (0.4, 1.0)):
        mixed = mix(batch, *alphas)
        assert mixed["image"].shape == batch["image"].shape and mixed["labels"].shape == (6, 6)
        own, others = (
            mixed["label_weights"][:, :3].sum(1) / weights.sum(1),
            mixed["label_weights"][:, 3:].sum(1),
        )
        assert ((own >= 0) & (own <= 1)).all() and (others >= 0).all()
        assert not torch.equal(mixed["image"], batch["image"])
    assert mix(batch, 0, 0) is batch
    one = blend(batch, torch.full((6,), 0.25))
    torch.testing.assert_close(one["image"], 0.75 * batch["image"] + 0.25 * batch["image"].flip(0))
    masks = torch.zeros(6, 1, 8, 8)
    masks[:, :, :4] = torch.tensor([0.0, 1, 1, 1, 1, 1]).view(6, 1, 1, 1)
    weight = cut_and_paste(batch, masks)["label_weights"][:, :3]
    torch.testing.assert_close(weight[0], weights[0])  # by one's own area, not the batch's
    torch.testing.assert_close(weight[1], weights[1] / 2)


def test_the_average_follows_weights_and_statistics():
    torch.manual_seed(0)
    model = VisionClassifier(
        ClassifierConfig(model="vit-mu/8", stem=(4, 6), image_size=16, num_classes=3)
    )
    model.ema = copy.deepcopy(model).requires_grad_(False)
    average = WeightAverage([(model.ema, model)], average_buffers=True)
    model.train().logits(torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        model.head.weight += 1
    statistics, before = model.patch_embed.backbone.bn1.running_mean, torch.zeros(4)
    average.update(ema_decay(1, 0.5))  # at first 2 / 11
    torch.testing.assert_close(
        model.ema.patch_embed.backbone.bn1.running_mean, before.lerp(statistics, 9 / 11)
    )
    torch.testing.assert_close(model.ema.head.weight, torch.full((3, 32), 9 / 11))
