"""Images, labels, mixup and CutMix against the numbers of COYO-ViT."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from base.pixels import HALF
from dataset.images.clip import normalize, pixel_statistics
from dataset.images.vit import ViTEvalView, inception_box, resize_area, resize_bilinear
from dataset.loading.randomness import seeded
from dataset.tasks.classification import LabelOptions, Labels
from models.classification.classifier import dense_targets
from models.classification.mixup import blend, cut_and_paste, rectangles
from tests.golden.report import compare, compare_levels, same
from tests.helpers.golden import golden, golden_json, recorded


def chw(image):
    return image.permute(2, 0, 1)


def view_cases(*kinds: str) -> list:
    """Numbers of the cases whose operations are of these types."""
    numbers = recorded("coyo_vit", "preprocess.json", within="cases")
    cases = (
        golden_json("coyo_vit", "preprocess.json")["cases"] if isinstance(numbers[0], int) else []
    )
    found = [
        n
        for n, case in enumerate(cases)
        if tuple(op["type"] for op in case.get("ops", ())) in kinds
    ]
    return found if cases else numbers


def view_case(number: int) -> tuple[dict, list, torch.Tensor, torch.Tensor]:
    """(case, sizes of its operations, image [3,H,W], recorded view [3,h,w])."""
    meta, t = golden("coyo_vit", "preprocess")
    case = meta["cases"][number]
    image, out = t[f"{case['name']}.image_u8"], t[f"{case['name']}.out"]
    same(
        "coyo_vit preprocess",
        "sizes",
        [list(image.shape), list(out.shape)],
        [case["in_shape"], case["out_shape"]],
    )
    return case, [op["params"].get("size") for op in case["ops"]], chw(image), chw(out)


EVALUATION = ("ResizeSmall", "CentralCrop", "normalize"), ("resize", "normalize")


@pytest.mark.parametrize("number", view_cases(*EVALUATION))
def test_evaluation_views(number):
    case, sizes, image, theirs = view_case(number)
    square = case["ops"][0]["type"] == "resize"
    view = ViTEvalView(sizes[0][0], None, True) if square else ViTEvalView(sizes[1], sizes[0], True)
    same(
        "coyo_vit preprocess",
        "statistics",
        [127.5, 127.5],
        [case["ops"][-1]["params"][n] for n in ("mean", "std")],
    )
    ours = normalize(view(image), pixel_statistics(torch.device("cpu"), *HALF))
    compare("coyo_vit preprocess", "normalised views", ours, theirs, 1e-5)


@pytest.mark.parametrize("number", view_cases(("ResizeSmall",), ("resize",)))
def test_resizing(number):
    case, (size,), image, theirs = view_case(number)
    ours = (
        resize_bilinear(image, *size)
        if case["ops"][0]["type"] == "resize"
        else resize_area(image, size)
    )
    compare("coyo_vit preprocess", "resized images", ours, theirs, 1e-5)


def test_crops_of_a_given_box():
    meta, t = golden("coyo_vit", "preprocess")
    boxes = [case for case in meta["cases"] if "box_yxhw" in case]
    assert boxes
    for case in boxes:
        top, left, height, width = case["box_yxhw"]
        whole = t[f"{case['name'].rpartition('.')[0]}.image_u8"]
        image = chw(whole)[:, top : top + height, left : left + width]
        ours = resize_bilinear(image, case["size"], case["size"])
        compare("coyo_vit preprocess", "resized images", ours, chw(t[f"{case['name']}.out"]), 1e-5)


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
    whole = sum(box[2:] == (height, width) for box in boxes) / len(boxes)
    assert abs(whole - law["full_image_fraction"]) < 0.005
    assert area.std().item() == pytest.approx(law["area_fraction"]["std"], rel=0.04)
    for values, expected in ((area, law["area_fraction"]), (aspect, law["aspect"])):
        ours = [values.mean(), *values.quantile(torch.tensor([0.1, 0.5, 0.9]).double())]
        theirs = [expected["mean"], *expected["quantiles_10_50_90"]]
        assert torch.stack(ours).tolist() == pytest.approx(theirs, rel=0.04)
        assert values.min().item() == pytest.approx(expected["min"], abs=0.003)
        assert values.max().item() == pytest.approx(expected["max"], rel=0.03)


def test_labels():
    meta, t = golden("coyo_vit", "labels_mixing")
    given, count = meta["labels"], meta["labels"]["num_classes"]
    cases = (
        ("multi_hot", {"labels": given["multi"]}, False),
        ("multi_hot_normalised", {"labels": given["multi_normalised"]}, True),
        ("one_hot", {"label": given["single"]}, False),
    )
    for name, record, normalised in cases:
        ids, weights = Labels(count, LabelOptions(normalize_label=normalised), "golden")(record)
        dense = dense_targets(torch.tensor([ids]), torch.tensor([weights]), count)[0]
        same("coyo_vit labels", name, dense, t[name])


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
    classes, half = t["mix.labels"].shape[1], len(t["mix.labels"]) // 2
    masks = t["cutmix.masks"].permute(0, 3, 1, 2)
    parts = [
        {key: value[rows] for key, value in batch_of(t, "mix").items()}
        for rows in (slice(0, half), slice(half, None))
    ]
    halves = [
        blend(parts[0], t["mixup.beta_draw"][:half, 0]),
        cut_and_paste(parts[1], masks[half:], original=True),
    ]
    both = {
        "image": torch.cat([part["image"] for part in halves]),
        "targets": torch.cat([summed(part, classes) for part in halves]),
    }
    for name, ours in (("mixup", mixed), ("cutmix", pasted), ("both", both)):
        targets = ours["targets"] if "targets" in ours else summed(ours, classes)
        image = ours["image"].permute(0, 2, 3, 1)
        compare("coyo_vit labels_mixing", "images", image, t[f"{name}.images"], 1e-6)
        compare("coyo_vit labels_mixing", "targets", targets, t[f"{name}.labels"], 1e-6)


def test_cutmix_rectangles():
    meta, t = golden("coyo_vit", "labels_mixing")
    for case in meta["cutmix_masks"]:
        centre_y, centre_x = torch.tensor([case["center_y"]]), torch.tensor([case["center_x"]])
        ours = rectangles(
            torch.tensor([case["beta_draw"]]), centre_y, centre_x, case["h"], case["w"]
        )
        theirs = t[f"cutmix_mask.{case['index']}"]
        same(
            "coyo_vit labels_mixing",
            "rectangles",
            ours[0].permute(1, 2, 0).to(theirs.dtype),
            theirs,
        )


def augmented(name: str, image: torch.Tensor, given: dict) -> torch.Tensor | None:
    """torchvision's operation of that name on uint8 [3,H,W]; None where it is another than the original's."""
    kind, moved = (
        name.partition("_")[0],
        {"interpolation": F.InterpolationMode.NEAREST, "fill": 128.0},
    )
    if name == "solarize_add":
        return None  # no operation of torchvision's policies
    if kind in ("autocontrast", "equalize", "invert"):
        return getattr(F, kind)(image)
    if kind == "posterize":
        return F.posterize(image, given["bits"])
    if kind == "solarize":
        return F.solarize(image, float(given["threshold"]))
    if kind in ("color", "brightness", "sharpness"):
        adjust = {"color": F.adjust_saturation, "brightness": F.adjust_brightness}
        return adjust.get(kind, F.adjust_sharpness)(image, given["factor"])
    if kind == "rotate":
        return F.rotate(image, given["degrees"], **moved)
    if kind == "translate":
        shift = [-given["pixels"], 0.0] if name.endswith("_x") else [0.0, -given["pixels"]]
        return F.affine(image, 0.0, shift, 1.0, [0.0, 0.0], **moved)
    return None  # contrast (towards another grey) and shear (about another corner), see docs/DIFFERENCES.md


def test_augmentations():
    """The operations that our policies, torchvision's, are made of."""
    meta, t = golden("coyo_vit", "augment_ops")
    image, compared = chw(t["image_u8"]), set()
    for name, given in meta["ops"].items():
        source = image // 2 + 40 if "input" in given else image
        ours = augmented(name, source, given)
        if ours is not None:
            compare_levels("coyo_vit augment_ops", name, ours, chw(t[name]), 1.0)
            compared.add(name)
    assert len(meta["ops"].keys() - compared) <= 5
