"""Randomness that depends only on (seed, epoch, sample), so that neither workers nor restarts
change what is drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

MASK64 = (1 << 64) - 1
ROUNDS = 4


def mix(*values: int) -> int:
    """Hashes integers to one 64-bit seed (the splitmix64 finaliser, chained)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def permuted(place: int, length: int, key: int) -> int:
    """Element at `place` of the pseudo-random permutation of `range(length)` chosen by `key`, in
    O(1) memory.

    A four-round Feistel network over the next even power of two, walked until it lands inside the
    range: a shuffle of any number of samples needs no array in any worker (five million as int64
    would be 40 MB per worker and epoch).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(key + turn, right) & low)
        place = left << half | right
        if place < length:
            return place


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the global generators of torch (CPU), `random` and NumPy after the block."""
    # default_generator, not torch.manual_seed: the latter also seeds every GPU.
    kept = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


def seed_generators(seed: int) -> None:
    """Seeds those generators; a tenth of the time that keeping and restoring them takes."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators inside the block and restores them after it."""
    with generators_kept():
        seed_generators(seed)
        yield
