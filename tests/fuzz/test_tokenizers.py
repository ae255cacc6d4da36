"""CLIP's ids and OpenAI's: the same for any text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.text.bpe import ClipTokenizer

pytestmark = pytest.mark.slow
ODD = [  # not OpenAI's special tokens, which open_clip spells otherwise
    "'s",
    "'LL",
    "&amp;lt;",
    "</w>",
    "ſ",
    "İ",
    "👍🏽",
    "ﬁ",
    "\u0300",
]
texts = st.lists(st.text(max_size=8) | st.sampled_from(ODD) | st.just(" "), max_size=8).map("".join)


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


def test_ids_are_openais(openai):
    ours = ClipTokenizer()

    @settings(
        max_examples=300,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(texts)
    def run(text):
        assert ours.encode(text) == openai.encode(text)
        row = ours.row(text)
        assert ours.decode(row[1:-1]) == openai.decode(row[1:-1])

    run()
