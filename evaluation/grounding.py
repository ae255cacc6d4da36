"""Referring expressions: which detected box a map points to, and how often it is the right one
(RefCOCO+)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import World, gather_rows

# a box's sum of heat is divided by area ** this: neither tiny nor huge boxes win by size
AREA_EXPONENT = 0.5


@dataclass
class Pointing:
    """What was found for one expression."""

    box: int  # number of the chosen box
    iou: float  # of it with the annotated box
    hit: bool  # whether the map's maximum lies inside the annotated box
    chance: float  # fraction of the boxes that would have been right
    inside: float  # fraction of the image's pixels inside the annotated box


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes [x, y, w, h] in pixels, as RefCOCO counts: the last pixel
    belongs to the box.

    An overlap of one pixel's width or height or less counts as none.
    """
    width = min(a[0] + a[2], b[0] + b[2]) - 1 - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - 1 - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = (width + 1) * (height + 1)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def enlarge(heat: Tensor, height: int, width: int) -> Tensor:
    """A map [g,g] at the size of its image, float32 [height,width] (bicubic)."""
    heat = heat[None, None].float()
    large = F.interpolate(heat, size=(height, width), mode="bicubic", align_corners=False)
    return large[0, 0]


def box_scores(heat: Tensor, boxes: Sequence[Sequence[float]]) -> Tensor:
    """Heat inside each box divided by the root of its area, float64 [K]: heat [height,width], boxes
    [x, y, w, h]."""
    height, width = heat.shape
    # total[i,j] = sum of the first i rows, j columns
    total = heat.double().cumsum(0).cumsum(1)
    total = F.pad(total, (1, 0, 1, 0))
    x, y, box_width, box_height = torch.tensor(boxes, dtype=torch.float64).unbind(1)
    right = (x + box_width).long().clamp(0, width)
    bottom = (y + box_height).long().clamp(0, height)
    left = torch.minimum(x.long().clamp(min=0), right)
    top = torch.minimum(y.long().clamp(min=0), bottom)
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    area = box_width * box_height
    return inside / area.clamp(min=1e-9) ** AREA_EXPONENT


def point(
    heat: Tensor, boxes: Sequence[Sequence[float]], target: Sequence[float], height: int, width: int
) -> Pointing:
    """Rank the boxes of an image of height x width pixels by the map [g,g]; target is the annotated
    box."""
    large = enlarge(heat, height, width)
    chosen = int(box_scores(large, boxes).argmax())  # the first of equals, whatever the sign
    row, column = divmod(int(large.argmax()), width)
    x, y, target_width, target_height = target
    columns = [at for at in range(width) if x <= at + 0.5 < x + target_width]
    rows = [at for at in range(height) if y <= at + 0.5 < y + target_height]
    overlaps = [iou(box, target) for box in boxes]
    chance = sum(overlap >= 0.5 for overlap in overlaps) / len(boxes)
    inside = len(columns) * len(rows) / (width * height)
    return Pointing(chosen, overlaps[chosen], column in columns and row in rows, chance, inside)


def point_all(
    heat: Tensor, targets: Sequence, boxes: Sequence[Sequence[Sequence[float]]], world: World
) -> list[Pointing]:
    """`point` for all expressions, shared among the processes: heat [R,g,g]; targets with box,
    height, width."""
    own = range(world.rank, len(heat), world.size)
    rows = torch.zeros(len(own), 5, dtype=torch.float64)
    for row, i in enumerate(own):
        target = targets[i]
        found = point(heat[i], boxes[i], target.box, target.height, target.width)
        rows[row, 0] = found.box
        rows[row, 1] = found.iou
        rows[row, 2] = found.hit
        rows[row, 3] = found.chance
        rows[row, 4] = found.inside
    numbers = torch.tensor(own, dtype=torch.int64)  # a process may have none
    table = gather_rows(rows.to(world.device), numbers, len(heat))
    results = []
    for box, overlap, hit, chance, inside in table.tolist():
        results.append(Pointing(int(box), overlap, bool(hit), chance, inside))
    return results


def grounding_accuracy(
    found: Sequence[Pointing], splits: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per split in percent: `accuracy` (IoU of the chosen box at least 0.5), `pointing` (maximum
    inside), `chance` of the accuracy and `pointing_chance` of the pointing game."""
    groups: dict[str, list[Pointing]] = defaultdict(list)
    for result, split in zip(found, splits, strict=True):
        groups[split].append(result)
    metrics = {}
    for split, results in sorted(groups.items()):
        count = len(results)
        metrics[split] = {
            "accuracy": 100 * sum(result.iou >= 0.5 for result in results) / count,
            "pointing": 100 * sum(result.hit for result in results) / count,
            "chance": 100 * sum(result.chance for result in results) / count,
            "pointing_chance": 100 * sum(result.inside for result in results) / count,
            "expressions": count,
        }
    return metrics


def choosing_metric(targets: Sequence, boxes: Sequence[Sequence]) -> str | None:
    """The score of the split val that chooses the best checkpoint: the accuracy, or the pointing
    game where every image has one box, which any network chooses; None without that split."""
    counts = [
        len(found) for target, found in zip(targets, boxes, strict=True) if target.split == "val"
    ]
    if not counts:
        return None
    return "accuracy" if max(counts) > 1 else "pointing"
