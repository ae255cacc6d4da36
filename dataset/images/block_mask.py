"""Block-wise patch masks (BEiT: BERT pre-training of image transformers, algorithm 1)."""

import math
import random

import torch

ATTEMPTS = 10
ASPECTS = 0.3, 1 / 0.3  # of a rectangle


class BlockMask:
    """Masks a fraction of a patch grid with random rectangles.

    side: of the square grid, in patches. ratio: fraction of patches to mask, the original's 75 of
    256 whatever the grid. min_block: patches of the smallest rectangle drawn, by default one
    sixteenth of the grid (16 of 256).
    Draws come from Python's `random` in the order area, aspect, top, left.
    """

    def __init__(self, side: int, ratio: float = 75 / 256, min_block: int | None = None):
        self.side = side
        self.total = round(ratio * side * side)
        self.min_block = min_block or max(1, side**2 // 16)

    def __call__(self) -> torch.Tensor:
        """bool [side, side], True where masked. At most, and nearly always exactly, `total` patches
        are True."""
        mask = torch.zeros(self.side, self.side, dtype=torch.bool)
        count = 0
        while count < self.total:
            added = self._add_block(mask, self.total - count)
            if not added:
                break
            count += added
        return mask

    def _add_block(self, mask: torch.Tensor, budget: int) -> int:
        """Masks one more rectangle in place and returns how many patches it added; 0 when no
        attempt fitted."""
        for _ in range(ATTEMPTS):
            area = random.uniform(self.min_block, budget)
            aspect = math.exp(random.uniform(*map(math.log, ASPECTS)))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if max(height, width) >= self.side:
                continue
            top = random.randint(0, self.side - height)
            left = random.randint(0, self.side - width)
            block = mask[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if 0 < new <= budget:
                block.fill_(True)
                return new
        return 0
