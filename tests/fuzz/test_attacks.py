"""Every bomb of tests/fuzz/attacks.py is refused in one sentence or read, within 700 MiB and 60 s.

`pytest -s -m slow tests/fuzz/test_attacks.py` prints what each took.
"""

import re

import pytest

from tests.fuzz.attacks import ATTACKS, read
from tests.helpers.bounded import read_bounded

pytestmark = pytest.mark.slow
MIB, SECONDS = 700, 60
REFUSALS = ("UserError", "BadSample", "MissingData")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.reader}: {attack.name}")
def test_attack(attack, tmp_path):
    path = tmp_path / "hostile"
    path.write_bytes(attack.data())
    outcome = read_bounded(read, attack.reader, path, seconds=SECONDS)
    said = re.sub(r"\S*/hostile", "hostile", outcome.text.replace(str(tmp_path), ""))
    size = path.stat().st_size if path.exists() else 0
    print(
        f"\n| {attack.reader} | {attack.name} | {size:,} | {outcome.mib:.0f} | "
        f"{outcome.seconds:.1f} | {outcome.error} {said[:160]} |",
        end="",
    )
    assert outcome.mib < MIB
    if attack.words:
        assert outcome.error in REFUSALS, outcome
        assert attack.words in outcome.text and "\n" not in outcome.text, outcome
    else:
        assert outcome.error in ("", *REFUSALS), outcome
