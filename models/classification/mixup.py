"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a whole batch on the device, with
sparse labels.

The partner of sample i is sample B - 1 - i. Labels stay lists: those of the partner stand behind
one's own, each list with its fraction as weight. Shapes: image [B,3,H,W], labels int64 [B,K],
label_weights float32 [B,K].
"""

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def mix(batch: Batch, mixup_alpha: float, cutmix_alpha: float, original: bool = False) -> Batch:
    """The batch mixed by fractions sampled from Beta(alpha, alpha); 0 = without. Both: mixup for
    the first half, CutMix for the second, partners within the half. original: see `cut_and_paste`.
    Draws on the device, nothing waits for it.
    """
    if mixup_alpha and cutmix_alpha:
        middle = len(batch["image"]) // 2
        first = {name: value[:middle] for name, value in batch.items()}
        second = {name: value[middle:] for name, value in batch.items()}
        first = mix(first, mixup_alpha, 0, original)
        second = mix(second, 0, cutmix_alpha, original)
        return {name: torch.cat([first[name], second[name]]) for name in batch}
    image = batch["image"]
    if mixup_alpha:
        return blend(batch, draw_beta(mixup_alpha, image))
    if cutmix_alpha:
        masks = draw_masks(draw_beta(cutmix_alpha, image), *image.shape[-2:])
        return cut_and_paste(batch, masks, original)
    return batch


def blend(batch: Batch, fraction: Tensor) -> Batch:
    """Mixup with `fraction` [B] or 1 - fraction, whichever is larger, of one's own image and
    labels."""
    fraction = torch.maximum(fraction, 1 - fraction)
    mine = fraction.view(-1, 1, 1, 1)
    image = batch["image"]
    mixed = joined_labels(batch, fraction)
    mixed["image"] = mine * image + (1 - mine) * image.flip(0)
    return mixed


def cut_and_paste(batch: Batch, masks: Tensor, original: bool = False) -> Batch:
    """CutMix: the partner's pixels where `masks` [B,1,H,W] is 1; labels weighted by area.

    original: every sample's labels are weighted by the mean area of all masks.
    """
    area = masks.mean((1, 2, 3))
    if original:
        area = area.mean().expand_as(area)
    mixed = joined_labels(batch, 1 - area)
    image = batch["image"]
    mixed["image"] = torch.where(masks > 0, image.flip(0), image)
    return mixed


def joined_labels(batch: Batch, fraction: Tensor) -> Batch:
    """Own labels weighted with `fraction` [B], then the partner's with the rest: [B,2K]."""
    labels = batch["labels"]
    weights = batch["label_weights"]
    mine = fraction.view(-1, 1)
    own = mine * weights
    partners = (1 - mine) * weights.flip(0)
    return {
        "labels": torch.cat([labels, labels.flip(0)], 1),
        "label_weights": torch.cat([own, partners], 1),
    }


def draw_beta(alpha: float, image: Tensor) -> Tensor:
    """float32 [B] from Beta(alpha, alpha) on the device of the images."""
    concentration = torch.full((2, len(image)), alpha, device=image.device)
    first, second = torch._standard_gamma(concentration)
    smallest = torch.finfo(first.dtype).tiny  # both may underflow to 0
    return first / (first + second).clamp(min=smallest)


def draw_masks(fraction: Tensor, height: int, width: int) -> Tensor:
    """Rectangles of about 1 - fraction of the area around uniform pixels, cut at the border:
    float32 [B,1,H,W] of 0, 1."""
    y = torch.randint(height, fraction.shape, device=fraction.device)
    x = torch.randint(width, fraction.shape, device=fraction.device)
    return rectangles(fraction, y, x, height, width)


def rectangles(fraction: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """`draw_masks` with given centres, int64 [B]: half sides are whole pixels, rounded down."""
    side = (1 - fraction).sqrt()

    def span(centre: Tensor, size: int) -> Tensor:
        half = ((side * size).long() // 2)[:, None]
        position = torch.arange(size, device=fraction.device)
        return (position >= centre[:, None] - half) & (position < centre[:, None] + half)

    rows = span(y, height)[:, None, :, None]
    columns = span(x, width)[:, None, None, :]
    return (rows & columns).float()
