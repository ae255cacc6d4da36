"""Views of images for dual encoders."""

import pytest
import torch
from torchvision.transforms import v2

from base.errors import UserError
from dataset.images import clip as clip_transforms
from dataset.images import vit
from dataset.images.albef import TrainTransform
from dataset.images.clip import (
    EvalView,
    ImageViews,
    View,
    ViewOptions,
    blur_weights,
    color_jitter,
    gaussian_blur,
    grey_levels,
    normalize,
    pixel_statistics,
    turn_hue,
)
from dataset.loading.randomness import seeded
from models.weights.libraries import OnImage


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(
        0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("share", [-0.4, -0.1, 0.0, 0.03, 0.5])
def test_hue_is_torchvisions(share, image):
    from torchvision.transforms.v2.functional import adjust_hue

    image[:, :3, :3] = image[:1, :3, :3]  # grey
    expected = adjust_hue(image.float() / 255, share) * 255
    torch.testing.assert_close(turn_hue(image.float(), share), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_pillows(sigma, image):
    import numpy as np
    from PIL import Image, ImageFilter

    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(
        ImageFilter.GaussianBlur(sigma)
    )
    expected = torch.from_numpy(np.array(blurred)).permute(2, 0, 1).float()
    inner = (slice(None), slice(8, -8), slice(8, -8))
    assert (gaussian_blur(image.float(), sigma)[inner] - expected[inner]).abs().max() < 3.6
    weights = blur_weights(sigma)
    assert sum(weights) * 2 - weights[0] == pytest.approx(1)
    assert 2 * sum(w * k**2 for k, w in enumerate(weights)) == pytest.approx(sigma**2)


def test_jitter_keeps_range_and_draws_from_torch_alone(image):
    levels = image.float()
    with seeded(3):
        first = color_jitter(levels, 0.4, 0.4, 0.4, 0.1)
    with seeded(3):
        assert torch.equal(color_jitter(levels, 0.4, 0.4, 0.4, 0.1), first)
    assert first.min() >= -0.01 and first.max() <= 255.01 and not torch.equal(first, levels)
    torch.testing.assert_close(color_jitter(levels, 0, 0, 0, 0), levels, rtol=0, atol=1e-2)
    assert torch.equal(levels, image.float())  # in place would spoil the other views


def test_a_view_without_operations_is_the_crop(image):
    from torchvision.transforms.v2.functional import resize

    whole = View(32, (1.0, 1.0), "bilinear")
    square = image[:, :, :60]
    expected = resize(square, [32, 32], antialias=True)
    assert torch.equal(whole(square), expected)
    flipped = View(32, (1.0, 1.0), "bilinear", flip=1.0)
    assert torch.equal(flipped(square), expected.flip(-1))
    grey = View(32, (1.0, 1.0), "bilinear", grey=1.0)(square)
    assert torch.equal(grey[0], grey[1]) and torch.equal(
        grey[0], grey_levels(expected.float())[0].round().byte()
    )
    negative = View(32, (1.0, 1.0), "bilinear", solarize=1.0)(square)
    assert torch.equal(negative, torch.where(expected >= 128, 255 - expected, expected))


def views_of(compat="none", **options) -> ImageViews:
    return ImageViews(32, ViewOptions(**options), compat=compat)


def test_kinds_of_views():
    plain = views_of()
    weak, strong = plain.glob[0], plain.local[0]
    assert (
        weak == View(32, (0.5, 1.0))
        and strong.jitter == (0.4, 0.4, 0.4, 0.1)
        and strong.scale == (0.08, 1.0)
    )
    assert (strong.grey, strong.blur, strong.solarize, strong.flip) == (0.2, 0.5, 0.0, 0.5)
    first, second = views_of(byol_augment=True).local
    assert first.jitter == second.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert views_of(weak_augment=True).local == [weak]
    assert views_of(strong_augment=True).glob == [strong]
    assert (
        views_of(byol_augment=True, strong_augment=True).glob[0].side == 32
    )  # the original crashes here
    assert views_of(randaugment=True).glob[0].randaugment
    assert views_of(randaugment=True, compat="original").glob == [weak, strong]
    assert views_of(jitter=False, flip=False).local[0].jitter is None


@pytest.mark.parametrize(
    "options",
    [{}, {"byol_augment": True}, {"randaugment": True}, {"multicrop_resize": 16}],
    ids=str,
)
def test_shapes_and_randomness(options, image):
    views = views_of(**options)
    with seeded(1):
        view, local = views(image)
    with seeded(1):
        again = views(image)
    small = options.get("multicrop_resize", 32)
    assert view.shape == (3, 32, 32) and local.shape == (2, 3, small, small)
    assert view.dtype == local.dtype == torch.uint8
    assert torch.equal(view, again[0]) and torch.equal(local, again[1])
    assert not torch.equal(local[0], local[1])
    assert views_of(num_augs=0)(image)[1] is None


def test_probabilities_hold(image, monkeypatch):
    counts = {"jitter": 0, "blur": 0}

    def counting(name, result):
        def count(image, *_):
            counts[name] += 1
            return result(image)

        return count

    monkeypatch.setattr(clip_transforms, "color_jitter", counting("jitter", lambda image: image))
    monkeypatch.setattr(clip_transforms, "gaussian_blur", counting("blur", lambda image: image))
    view = views_of().local[0]
    with seeded(0):
        for _ in range(400):
            view(image[:, :20, :20])
    assert counts["jitter"] == pytest.approx(320, abs=40) and counts["blur"] == pytest.approx(
        200, abs=50
    )


def test_evaluation_view_and_normalisation(image):
    view = EvalView(30)(image)
    assert view.shape == (3, 30, 30) and EvalView(30)(image.transpose(1, 2)).shape == (3, 30, 30)
    statistics = pixel_statistics(torch.device("cpu"))
    made = normalize(torch.stack([view, view]), statistics)
    expected = (
        view.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(made[1], expected)


LIBRARYS = v2.Compose([v2.Resize(24, antialias=True), v2.CenterCrop(24), v2.PILToTensor()])


@pytest.mark.parametrize(
    "view",
    [EvalView(24), vit.ViTEvalView(24, 24), OnImage(LIBRARYS, cuts=True)],
    ids=["clip", "vit", "library"],
)
def test_a_thin_image_shows_its_middle_and_takes_no_more_memory_than_that(view):
    """Enlarged whole, 1 x 3,000,000 pixels would take terabytes."""
    thin = torch.zeros(3, 2, 3_000_000, dtype=torch.uint8)
    thin[:, 0, 1_500_000:1_500_002] = 250  # begins where the right half of the square does
    assert view(thin)[:, 2, 18].tolist() == [250] * 3 and not view(thin)[:, :, :6].any()
    upright = view(thin.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(upright.float(), view(thin).float(), atol=1, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"byol_augment": True, "num_augs": 3},
        {"weak_augment": True, "strong_augment": True},
        {"num_augs": -1},
    ],
    ids=str,
)
def test_impossible_options(options):
    with pytest.raises(UserError):
        ViewOptions(**options)


def test_areas_of_crops_that_are_turned_round_are_refused():
    with pytest.raises(UserError, match=r"crop_scale 0\.5 0\.1: .* the smaller area first"):
        TrainTransform(16, (0.5, 0.1))
    with pytest.raises(
        UserError, match=r"strong_min_scale, multicrop_max_scale 0\.08 0\.05: no crop"
    ):
        ImageViews(16, ViewOptions(multicrop_max_scale=0.05))
