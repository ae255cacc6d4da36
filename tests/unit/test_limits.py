"""The quick ones among the attacks of tests/fuzz: a sentence within seconds, in little memory."""

import mmap

import pytest

from tests.fuzz.attacks import ATTACKS, read
from tests.helpers.bounded import read_bounded

QUICK = {
    "memo index",
    "doubled tuples as a key",
    "doubled frozensets",
    "doubled lists",
    "deep tuple as a key",
    "long bytearray",
    "array of doubled lists",
    "doubled key in a checkpoint",
    "doubled key for torch",
    "doubled value",
    "overlapping tensors",
    "expanded tensor",
    "doubled modules",
    "doubled key",
    "tensors left out",
    "negative size",
    "sparse file of 20 GB",
    "record of 2^62 bytes",
    "aliases of aliases",
    "99999999999 shards",
}


@pytest.mark.parametrize(
    "attack",
    [attack for attack in ATTACKS if attack.name in QUICK],
    ids=lambda attack: f"{attack.reader}: {attack.name}",
)
def test_attack(attack, tmp_path):
    path = tmp_path / "hostile"
    path.write_bytes(attack.data())
    outcome = read_bounded(read, attack.reader, path, seconds=30)
    assert outcome.mib < 100, outcome
    if attack.words:
        assert outcome.error in ("UserError", "BadSample"), outcome
        assert attack.words in outcome.text and "\n" not in outcome.text, outcome


def test_a_hang_and_a_crash_are_seen(tmp_path):
    def hang():
        while True:
            pass

    def hoard():
        return bytearray(3 << 30)

    def fill():
        pages = mmap.mmap(-1, 200 << 20)  # new: what was freed before the fork counts already
        for place in range(0, len(pages), mmap.PAGESIZE):
            pages[place] = 1

    with pytest.raises(AssertionError, match="killed"):
        read_bounded(hang, seconds=1)
    assert read_bounded(hoard, gib=1.0).error == "MemoryError"
    assert read_bounded(fill).mib > 150
