"""Images, labels, mixup and CutMix against the numbers of COYO-ViT."""

import pytest
import torch

from base.pixels import HALF
from dataset.images.clip import normalize, pixel_statistics
from dataset.images.vit import EvalView, centre, inception_box, resize_area, resize_bilinear
from dataset.loading.randomness import seeded
from dataset.tasks.classification import LabelOptions, Labels
from models.classification.classifier import dense_targets
from models.classification.mixup import blend, cut_and_paste, rectangles
from tests.golden.report import compare
from tests.helpers.golden import golden


def chw(image):
    return image.permute(2, 0, 1)


@pytest.mark.parametrize("name", ["eval_small_center", "eval_small_tall", "eval_resize"])
def test_evaluation_views(name):
    meta, t = golden("coyo_vit", "preprocess")
    case = next(case for case in meta["cases"] if case["name"] == name)
    sizes = [op["params"].get("size") for op in case["ops"]]
    view = (
        EvalView(sizes[0][0], None, True)
        if name == "eval_resize"
        else EvalView(sizes[1], sizes[0], True)
    )
    ours = normalize(view(chw(t[f"{name}.image_u8"])), pixel_statistics(torch.device("cpu"), *HALF))
    compare("coyo_vit preprocess", "normalised views", ours, chw(t[f"{name}.out"]), 1e-5)


@pytest.mark.parametrize("name", ["resize_small_upscale", "resize_small_only", "resize_upscale"])
def test_resizing(name):
    meta, t = golden("coyo_vit", "preprocess")
    case = next(case for case in meta["cases"] if case["name"] == name)
    size, image = case["ops"][0]["params"]["size"], chw(t[f"{name}.image_u8"])
    ours = resize_bilinear(image, *size) if name == "resize_upscale" else resize_area(image, size)
    compare("coyo_vit preprocess", "resized images", ours, chw(t[f"{name}.out"]), 1e-5)


@pytest.mark.parametrize("number", range(3))
def test_crops_of_a_given_box(number):
    meta, t = golden("coyo_vit", "preprocess")
    name = f"crop_then_resize.{number}"
    case = next(case for case in meta["cases"] if case["name"] == name)
    top, left, height, width = case["box_yxhw"]
    image = chw(t["crop_then_resize.image_u8"])[:, top : top + height, left : left + width]
    ours = resize_bilinear(image, case["size"], case["size"])
    compare("coyo_vit preprocess", "resized images", ours, chw(t[f"{name}.out"]), 1e-5)
    assert torch.equal(
        centre(image, 5), image[:, (height - 5) // 2 :, (width - 5) // 2 :][:, :5, :5]
    )


def test_law_of_the_random_crop():
    meta, _ = golden("coyo_vit", "preprocess")
    law, limits = meta["random_crop_statistics"], meta["random_crop_parameters"]
    height, width = law["image_hw"]
    with seeded(0):
        boxes = [
            inception_box(height, width, limits["area_range"], limits["aspect_ratio_range"])
            for _ in range(20000)
        ]
    sizes = torch.tensor([box[2:] for box in boxes]).double()
    area, aspect = sizes.prod(1) / (height * width), sizes[:, 1] / sizes[:, 0]
    assert all(top + h <= height and left + w <= width for top, left, h, w in boxes)
    for values, expected in ((area, law["area_fraction"]), (aspect, law["aspect"])):
        ours = [values.mean(), *values.quantile(torch.tensor([0.1, 0.5, 0.9]).double())]
        theirs = [expected["mean"], *expected["quantiles_10_50_90"]]
        assert torch.stack(ours).tolist() == pytest.approx(theirs, rel=0.04)
        assert values.min().item() == pytest.approx(expected["min"], abs=0.003)


def test_labels():
    meta, t = golden("coyo_vit", "labels_mixing")
    given, count = meta["labels"], meta["labels"]["num_classes"]
    labels = Labels(count, LabelOptions(), "golden")
    for record, name in (
        ({"labels": given["multi"]}, "multi_hot"),
        ({"label": given["single"]}, "one_hot"),
    ):
        ids, weights = labels(record)
        dense = dense_targets(torch.tensor([ids]), torch.tensor([weights]), count)[0]
        assert torch.equal(dense, t[name])


def batch_of(t, name):
    rows, classes = t[f"{name}.labels"].shape
    return {
        "image": t[f"{name}.images"].permute(0, 3, 1, 2),
        "labels": torch.arange(classes).expand(rows, -1),
        "label_weights": t[f"{name}.labels"],
    }


def summed(batch, classes):
    """Targets [B,C] of sparse labels whose lists may name a class twice."""
    return torch.zeros(len(batch["labels"]), classes).scatter_add_(
        1, batch["labels"], batch["label_weights"]
    )


def test_mixup_and_cutmix():
    _, t = golden("coyo_vit", "labels_mixing")
    mixed = blend(batch_of(t, "mix"), t["mixup.beta_draw"][:, 0])
    pasted = cut_and_paste(batch_of(t, "mix"), t["cutmix.masks"].permute(0, 3, 1, 2), original=True)
    for name, ours in (("mixup", mixed), ("cutmix", pasted)):
        compare(
            "coyo_vit labels_mixing",
            "images",
            ours["image"].permute(0, 2, 3, 1),
            t[f"{name}.images"],
            1e-6,
        )
        compare("coyo_vit labels_mixing", "targets", summed(ours, 7), t[f"{name}.labels"], 1e-6)
    halves = [
        {k: v[part] for k, v in batch_of(t, "mix").items()} for part in (slice(0, 2), slice(2, 4))
    ]
    masks = t["cutmix.masks"].permute(0, 3, 1, 2)
    both = [
        blend(halves[0], t["mixup.beta_draw"][:2, 0]),
        cut_and_paste(halves[1], masks[2:], original=True),
    ]
    image = torch.cat([half["image"] for half in both]).permute(0, 2, 3, 1)
    compare("coyo_vit labels_mixing", "images", image, t["both.images"], 1e-6)
    targets = torch.cat([summed(half, 7) for half in both])
    compare("coyo_vit labels_mixing", "targets", targets, t["both.labels"], 1e-6)


def test_cutmix_rectangles():
    meta, t = golden("coyo_vit", "labels_mixing")
    for case in meta["cutmix_masks"]:
        centre_y, centre_x = torch.tensor([case["center_y"]]), torch.tensor([case["center_x"]])
        ours = rectangles(
            torch.tensor([case["beta_draw"]]), centre_y, centre_x, case["h"], case["w"]
        )
        assert torch.equal(ours[0].permute(1, 2, 0), t[f"cutmix_mask.{case['index']}"]), case
