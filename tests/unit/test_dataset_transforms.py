"""Transforms: what Pillow would give, what a shared view promises, what a seed fixes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dataset.images.albef import (
    PretrainTransform,
    TestTransform,
    TrainTransform,
    resize,
)
from dataset.images.block_mask import BlockMask
from dataset.images.randaugment import (
    RandAugment,
    autocontrast,
    brightness,
    equalize,
    forward_matrix,
    sharpness,
    warp,
)
from dataset.loading.randomness import mix, permuted, seeded


@pytest.fixture
def image():
    ramp = torch.arange(90 * 120).view(90, 120) % 251
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 40, (3, 90, 120), generator=generator)
    return (torch.stack([ramp, ramp.flip(0), ramp.flip(1)]) // 2 + noise + 10).to(torch.uint8)


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_resize_is_pillows(image):
    for size in ((64, 64), (256, 256), (30, 100)):
        ours = resize(image, *size)
        theirs = tensor(pillow(image).resize(size[::-1], Image.BICUBIC))
        assert ours.shape == (3, *size) and ours.dtype == torch.uint8
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_colour_operations_are_pillows(image):
    assert torch.equal(autocontrast(image), tensor(ImageOps.autocontrast(pillow(image))))
    assert torch.equal(equalize(image), tensor(ImageOps.equalize(pillow(image))))
    theirs = tensor(ImageEnhance.Brightness(pillow(image)).enhance(1.36))
    assert (brightness(image, 1.36).int() - theirs.int()).abs().max() <= 1
    theirs = tensor(ImageEnhance.Sharpness(pillow(image)).enhance(1.36))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    assert (sharpness(image, 1.36).int() - theirs.int()).abs()[inner].max() <= 1
    flat = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    for operation in (autocontrast, equalize):
        assert torch.equal(operation(flat), flat)


def test_shifts_move_whole_pixels(image):
    moved = warp(image, forward_matrix("TranslateX", 7, 90, 256))
    assert torch.equal(moved[..., :-7], image[..., 7:])
    assert (moved[..., -7:] == 128).all()
    moved = warp(image, forward_matrix("TranslateY", -7, 90, 120, fixed_shift=True))
    assert torch.equal(moved[:, 7:], image[:, :-7])


def test_rotation_by_90_degrees_and_back():
    image = torch.randint(0, 256, (3, 33, 33), dtype=torch.uint8)
    turned = warp(image, forward_matrix("Rotate", 90, 33, 33))
    assert torch.equal(turned[:, 1:, :], image.rot90(1, (1, 2))[:, :-1, :])
    assert torch.equal(warp(image, [1, 0, 0, 0, 1, 0]), image)


def test_draws_have_the_stated_frequencies():
    augment = RandAugment()
    rng = np.random.RandomState(0)
    drawn = [operation for _ in range(20_000) for operation in augment.draw(rng)]
    counts = {name: sum(name == other for other, _ in drawn) for name in augment.NAMES}
    assert all(
        1800 < count < 2200 for count in counts.values()
    )  # 20000 x 2 / 10 x 0.5 = 2000 each, sigma 43
    shears = [strength for name, strength in drawn if name == "ShearX"]
    assert set(shears) == {0.21, -0.21} and 850 < sum(s > 0 for s in shears) < 1150


def test_shared_views_show_the_same_geometry(image):
    """Without colour operations the token view is the training view at its own resolution."""
    smooth = torch.nn.functional.avg_pool2d(image.float(), 9, 1, 4).to(torch.uint8)
    transform = PretrainTransform(128, 64)
    colours = {"AutoContrast", "Equalize", "Brightness", "Sharpness"}
    compared = 0
    for seed in range(30):
        with seeded(seed):
            view, token = transform(smooth)
        with seeded(seed):
            names = {name for name, _ in transform.draw(smooth)[2]}
        if names & colours:
            continue
        small = torch.nn.functional.avg_pool2d(view[None].float(), 2)[0]
        assert (small - token.float()).abs().mean() < 0.02 * 255, (seed, names)
        compared += 1
    assert compared > 5
    apart = PretrainTransform(128, 64, shared_view=False)
    with seeded(3):
        view, token = apart(smooth)
    small = torch.nn.functional.avg_pool2d(view[None].float(), 2)[0]
    assert (small - token.float()).abs().mean() > 0.05 * 255


def test_fixed_geometry_never_moves(image):
    transform = PretrainTransform(64, 32, fixed_geometry=True)
    tokens = [transform(image)[1] for _ in range(20)]
    assert all(torch.equal(token, tokens[0]) for token in tokens)
    assert torch.equal(tokens[0], resize(image, 32, 32))


def test_train_transform_options(image):
    class NoAugment(RandAugment):
        def draw(self, rng=np.random):
            return []

    plain = TrainTransform(48, scale=None, flip=False, augment=NoAugment())
    assert plain(image).dtype == torch.uint8
    assert torch.equal(plain(image), TestTransform(48)(image))
    flips = TrainTransform(48, scale=None, augment=NoAugment())
    outputs = {tuple(flips(image).flatten().tolist()[:50]) for _ in range(30)}
    assert len(outputs) == 2
    for size in ((1, 1), (1, 500), (700, 3)):
        assert TrainTransform(32)(torch.zeros(3, *size, dtype=torch.uint8)).shape == (3, 32, 32)


def test_seeds_fix_everything_and_leave_nothing_behind(image):
    transform = PretrainTransform(64, 32)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    outputs = []
    for seed in (5, 6, 5):
        with seeded(seed):
            outputs.append(transform(image)[0])
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and np.random.get_state()[1].tolist() == before[1]
    )


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000])
def test_permutations(length):
    orders = [
        [permuted(place, length, mix(7, epoch)) for place in range(length)] for epoch in range(50)
    ]
    assert all(sorted(order) == list(range(length)) for order in orders)
    assert len(set(map(tuple, orders))) > min(length, 20) - 1


def test_permutations_look_random():
    """Chi-square over (place block, value block) and neighbours of a permutation of 40,000."""
    order = np.array([permuted(place, 40_000, 11) for place in range(40_000)])
    table = np.zeros((20, 20))
    np.add.at(table, (np.arange(40_000) // 2000, order // 2000), 1)
    chi = ((table - 100) ** 2 / 100).sum()
    assert 250 < chi < 480  # 361 degrees of freedom, sigma 27
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() - 40_000 / 3) < 250


def test_block_masks_follow_the_grid():
    random.seed(0)
    for side in (4, 14, 16, 24):
        draw = BlockMask(side)
        counts = [int(draw().sum()) for _ in range(30)]
        assert draw.total == round(75 / 256 * side * side)
        assert max(counts) <= draw.total and sorted(counts)[15] >= draw.total - 1
    assert BlockMask(16).total == 75 and BlockMask(16).min_block == 16
