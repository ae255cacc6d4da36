"""Images that are the same: byte by byte, or to the eye.

Two images look alike where their difference hashes are close and, at a second look, their
thumbnails agree nearly everywhere once brightness and a small crop are undone. The hash alone takes
a circle for a square of its size: it sees where an image gets darker, not its outlines.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product

import numpy as np

BITS = 16  # of 64 in which the difference hashes of near duplicates may differ
BANDS = 8  # parts of a hash, one of which near duplicates share
COARSE = 4  # side of what is compared first
COARSE_LEVELS = 12.0  # of 255, mean difference of the coarse images at most
LEVELS = 56.0  # of 255 by which their thumbnails may differ, in the colour that differs most
OUTLIERS = 0.01  # fraction of a thumbnail that may differ more
GAIN = 1.35  # in brightness between near duplicates at most
CROP = 0.05  # of a side that one of them may lack
CROWD = 400  # images of one part of a hash that are compared with each other; more tell nothing


def same_bytes(digests: Iterable[bytes]) -> list[list[int]]:
    """Groups of two and more numbers of equal digests, in order. Empty digests have no equal."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for number, digest in enumerate(digests):
        if digest:
            found[digest].append(number)
    return [group for group in found.values() if len(group) > 1]


def near_duplicates(signatures: Sequence[bytes]) -> list[list[int]]:
    """Groups of two and more numbers whose images look alike (see `samples.signature`), in order.

    Only images whose hashes share one of their 8 bytes are compared. Hashes that differ in fewer
    than 8 bits always do, others nearly always.
    """
    numbers = [number for number, each in enumerate(signatures) if each]
    if not numbers:
        return []
    table = np.frombuffer(b"".join(signatures[number] for number in numbers), np.uint8)
    images = _Images(table.reshape(len(numbers), -1))
    for band in range(BANDS):
        own = images.hashes[:, band]
        neighbour = images.hashes[:, (band + 1) % BANDS]
        images.join(own.astype(np.uint16) << 8 | neighbour)
        images.join(own)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(numbers):
        groups[images.root(position)].append(number)
    return [group for group in groups.values() if len(group) > 1]


class _Images:
    """Images by their signatures uint8 [n,8+3*S*S], and the groups that they were joined to."""

    def __init__(self, table: np.ndarray):
        side = math.isqrt((table.shape[1] - 8) // 3)
        self.hashes = table[:, :8]
        self.thumbnails = table[:, 8:].reshape(-1, 3, side, side)
        blocks = self.thumbnails.reshape(-1, 3, COARSE, side // COARSE, COARSE, side // COARSE)
        self.coarse = blocks.mean((3, 5), dtype=np.float32).reshape(len(table), -1)
        self.leader = np.arange(len(table))
        self.refused: set[tuple[int, int]] = set()  # at the second look

    def join(self, key: np.ndarray) -> None:
        """Join the images of equal keys that look alike."""
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            if 1 < len(members) <= CROWD:
                for place, one in enumerate(members[:-1]):
                    self.join_those_like(int(one), members[place + 1 :])

    def join_those_like(self, one: int, others: np.ndarray) -> None:
        """Join image `one` with those of the others [m] that look like it."""
        bits = np.unpackbits(self.hashes[others] ^ self.hashes[one], axis=1).sum(1)
        others = others[bits <= BITS]
        mine, theirs = _equally_bright(self.coarse[one], self.coarse[others])
        near = others[np.abs(mine - theirs).mean(1) <= COARSE_LEVELS]
        root = self.root(one)
        new = [self.root(other) != root and (one, other) not in self.refused for other in near]
        others = near[np.array(new, bool)]
        if not len(others):
            return
        alike = look_alike(self.thumbnails[one], self.thumbnails[others])
        for other in others[alike]:
            first, second = sorted((self.root(one), self.root(other)))
            self.leader[second] = first
        self.refused.update((one, other) for other in others[~alike].tolist())

    def root(self, place: int) -> int:
        """The first image of the group that an image is in."""
        while self.leader[place] != place:
            self.leader[place] = self.leader[self.leader[place]]
            place = self.leader[place]
        return int(place)


# ---- the second look
def look_alike(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [m]: which uint8 [m,3,S,S] thumbnails show the image of thumbnail [3,S,S], up to
    brightness and a crop."""
    mine, theirs = _equally_bright(one.astype(np.float32), others.astype(np.float32))
    # cheap, and below what the crops give: every pixel against those around it
    alike = np.maximum(_beyond(mine, theirs), _beyond(theirs, mine)) <= LEVELS
    for place in np.flatnonzero(alike):
        cut = _most(np.abs(_crops(mine[place]) - theirs[place]))
        added = _most(np.abs(mine[place] - _crops(theirs[place])))
        alike[place] = min(cut.min(), added.min()) <= LEVELS
    return alike


def _equally_bright(one: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [...] and [m,...], the darker of each pair brightened up to GAIN, where it is cut off
    at 255 as the brighter one was: both [m,...]."""
    axes = tuple(range(1, others.ndim))
    gain = np.maximum(others.mean(axes, keepdims=True), 1) / max(float(one.mean()), 1.0)
    brightened = np.minimum(one * np.clip(gain, 1, GAIN), 255)
    return brightened, np.minimum(others * np.clip(1 / gain, 1, GAIN), 255)


def _beyond(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[m]: by how much pixels [m,3,S,S] lie outside of what `others` have in the 3 x 3 pixels
    around each."""
    highest, lowest = others, others
    for axis in (-1, -2):
        highest = np.maximum(highest, np.maximum(*_neighbours(highest, axis)))
        lowest = np.minimum(lowest, np.minimum(*_neighbours(lowest, axis)))
    return _most(np.maximum(pixels - highest, lowest - pixels))


def _neighbours(pixels: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """What is before and behind each pixel along an axis; at the edges the pixel itself."""
    size = pixels.shape[axis]
    before = np.maximum(np.arange(size) - 1, 0)
    behind = np.minimum(np.arange(size) + 1, size - 1)
    return pixels.take(before, axis), pixels.take(behind, axis)


def _most(difference: np.ndarray) -> np.ndarray:
    """The difference [...] of float32 [...,3,S,S] that all but OUTLIERS of the S x S positions keep
    below."""
    positions = difference.max(-3).reshape(*difference.shape[:-3], -1)
    kept = positions.shape[-1] - 1 - int(OUTLIERS * positions.shape[-1])
    return np.partition(positions, kept)[..., kept]


def _crops(image: np.ndarray) -> np.ndarray:
    """float32 [10,3,S,S]: the image [3,S,S] whole, without CROP at a side, in a corner and around,
    enlarged to S again."""
    rows, columns = _crop_weights(image.shape[-1])
    return rows[:, None] @ image @ columns[:, None].swapaxes(-1, -2)


@cache
def _crop_weights(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [10,S,S] that make rows and columns of a crop out of those of the whole."""
    cuts = [(0.0, 0.0), (CROP, 0.0), (0.0, CROP)]  # before and behind
    pairs = [*product(cuts, cuts), ((CROP / 2, CROP / 2), (CROP / 2, CROP / 2))]
    weights = {cut: _enlarge(side, *cut) for pair in pairs for cut in pair}
    rows = np.stack([weights[vertical] for vertical, _ in pairs])
    columns = np.stack([weights[horizontal] for _, horizontal in pairs])
    return rows, columns


def _enlarge(side: int, before: float, behind: float) -> np.ndarray:
    """Weights [S,S] of linear interpolation for a line without these fractions at its ends."""
    centres = (np.arange(side) + 0.5) * (1 - before - behind) + before * side - 0.5
    distance = np.abs(np.clip(centres, 0, side - 1)[:, None] - np.arange(side))
    return np.maximum(1 - distance, 0).astype(np.float32)
