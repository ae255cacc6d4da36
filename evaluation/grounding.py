"""Referring expressions: which detected box a map points to, and how often it is the right one
(RefCOCO+)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import World, gather_rows

AREA_EXPONENT = (
    0.5  # a box's sum of heat is divided by area ** this: neither tiny nor huge boxes win by size
)


@dataclass
class Pointing:
    """What was found for one expression."""

    box: int  # number of the chosen box
    iou: float  # of it with the annotated box
    hit: bool  # whether the map's maximum lies inside the annotated box
    chance: float  # share of the boxes that would have been right


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
    size = (height, width)
    return F.interpolate(heat[None, None].float(), size=size, mode="bicubic", align_corners=False)[
        0, 0
    ]


def box_scores(heat: Tensor, boxes: Sequence[Sequence[float]]) -> Tensor:
    """Heat inside each box divided by the root of its area, float64 [K]: heat [height,width], boxes
    [x, y, w, h]."""
    total = F.pad(
        heat.double().cumsum(0).cumsum(1), (1, 0, 1, 0)
    )  # total[i,j] = sum of the first i rows, j columns
    corners = torch.tensor([[int(x), int(y), int(x + w), int(y + h)] for x, y, w, h in boxes])
    left, top, right, bottom = corners.clamp(min=0).unbind(1)
    right, bottom = right.clamp(max=heat.shape[1]), bottom.clamp(max=heat.shape[0])
    left, top = torch.minimum(left, right), torch.minimum(top, bottom)
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    area = torch.tensor([w * h for *_, w, h in boxes], dtype=torch.float64)
    return inside / area.clamp(min=1e-9) ** AREA_EXPONENT


def point(
    heat: Tensor, boxes: Sequence[Sequence[float]], target: Sequence[float], height: int, width: int
) -> Pointing:
    """Rank the boxes of an image of height x width pixels by the map [g,g]; target is the annotated
    box."""
    large = enlarge(heat, height, width)
    chosen = int(box_scores(large, boxes).argmax())  # the first of equals, whatever the sign
    row, column = divmod(int(large.argmax()), width)
    inside = (
        target[0] <= column + 0.5 < target[0] + target[2]
        and target[1] <= row + 0.5 < target[1] + target[3]
    )
    overlaps = [iou(box, target) for box in boxes]
    return Pointing(chosen, overlaps[chosen], inside, sum(o >= 0.5 for o in overlaps) / len(boxes))


def point_all(
    heat: Tensor, targets: Sequence, boxes: Sequence[Sequence[Sequence[float]]], world: World
) -> list[Pointing]:
    """`point` for all expressions, shared among the processes: heat [R,g,g]; targets with box,
    height, width."""
    own = range(world.rank, len(heat), world.size)
    rows = torch.zeros(len(own), 4, dtype=torch.float64)
    for row, i in enumerate(own):
        target = targets[i]
        found = point(heat[i], boxes[i], target.box, target.height, target.width)
        rows[row] = torch.tensor(
            [found.box, found.iou, found.hit, found.chance], dtype=torch.float64
        )
    table = gather_rows(rows.to(world.device), torch.tensor(own), len(heat)).tolist()
    return [Pointing(int(box), overlap, bool(hit), chance) for box, overlap, hit, chance in table]


def grounding_accuracy(
    found: Sequence[Pointing], splits: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per split in percent: `accuracy` (IoU of the chosen box at least 0.5), `pointing` (maximum
    inside), `chance`."""
    groups: dict[str, list[Pointing]] = defaultdict(list)
    for result, split in zip(found, splits, strict=True):
        groups[split].append(result)
    return {
        split: {
            "accuracy": 100 * sum(r.iou >= 0.5 for r in results) / len(results),
            "pointing": 100 * sum(r.hit for r in results) / len(results),
            "chance": 100 * sum(r.chance for r in results) / len(results),
            "expressions": len(results),
        }
        for split, results in sorted(groups.items())
    }
