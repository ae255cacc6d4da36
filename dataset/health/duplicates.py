"""Images that are the same: byte by byte, or to the eye."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

BITS = 6  # of 64 in which the difference hashes of near duplicates may differ
LEVELS = 9.0  # of 255, mean difference of their thumbnails
BANDS = 8  # hashes that differ in fewer bits than this agree in one of as many parts
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

    Hashes that differ in at most BITS of 64 bits agree in one of their 8 bytes at least, so that
    only images that share one are compared.
    """
    numbers = [number for number, each in enumerate(signatures) if each]
    if not numbers:
        return []
    table = np.frombuffer(b"".join(signatures[number] for number in numbers), np.uint8)
    table = table.reshape(len(numbers), -1)
    hashes = table[:, :8]
    thumbnails = table[:, 8:].astype(np.int16)
    leader = np.arange(len(numbers))
    for band in range(BANDS):
        own = hashes[:, band]
        neighbour = hashes[:, (band + 1) % BANDS]
        both = own.astype(np.uint16) << 8 | neighbour
        _join(both, hashes, thumbnails, leader)
        _join(own, hashes, thumbnails, leader)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(numbers):
        groups[_root(leader, position)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _join(key: np.ndarray, hashes: np.ndarray, thumbnails: np.ndarray, leader: np.ndarray) -> None:
    """Join the images of equal keys that look alike."""
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if not 1 < len(members) <= CROWD:
            continue
        for place, one in enumerate(members[:-1]):
            others = members[place + 1 :]
            bits = np.unpackbits(hashes[others] ^ hashes[one], axis=1).sum(1)
            levels = np.abs(thumbnails[others] - thumbnails[one]).mean(1)
            for other in others[(bits <= BITS) & (levels <= LEVELS)]:
                _unite(leader, one, other)


def _root(leader: np.ndarray, place: int) -> int:
    while leader[place] != place:
        leader[place] = leader[leader[place]]
        place = leader[place]
    return int(place)


def _unite(leader: np.ndarray, one: int, other: int) -> None:
    first, second = sorted((_root(leader, one), _root(leader, other)))
    leader[second] = first
