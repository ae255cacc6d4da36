"""CLIP's tokenizer with a small merges file, and random views of captions."""

import gzip
import pickle
import random
from collections import Counter

import pytest

from base.errors import UserError
from dataset.text import bpe
from dataset.text.augment import TextOptions, TextViews, remove_stop_words
from dataset.text.bpe import ClipTokenizer, clean_text

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "a t</w>", "th a", "Ġ Ġ"]


@pytest.fixture
def tokenizer(tmp_path) -> ClipTokenizer:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(("version\n" + "\n".join(MERGES) + "\n").encode()))
    return ClipTokenizer(path, context_length=8)


def test_earlier_merges_come_first(tokenizer):
    the, cat, tha = 512 + 1, 512 + 3, 512 + 5
    assert tokenizer.vocab_size == 512 + len(MERGES) + 2
    assert tokenizer.encode("the cat") == [the, cat]
    letter = {char: ord(char) - 33 for char in "athc"}
    assert tokenizer.encode("that") == [512, 512 + 4]  # "a t</w>" is earlier than "th a"
    assert tokenizer.encode("thaa") == [tha, letter["a"] + 256]
    assert tokenizer.encode("a1") == [letter["a"] + 256, ord("1") - 33 + 256]
    assert tokenizer.decode(tokenizer.encode("the cat that thé")) == "the cat that thé "


def test_rows(tokenizer):
    start, end = tokenizer.start_id, tokenizer.end_id
    ids = tokenizer(["the", "", "the the the the the the the the the"])
    assert ids.tolist() == [
        [start, 513, end, 0, 0, 0, 0, 0],
        [start, end] + [0] * 6,
        [start] + [513] * 6 + [end],
    ]
    assert tokenizer(["the"], lengths=[4]).shape == (1, 4) and tokenizer(
        ["the"], lengths=()
    ).shape == (1, 8)
    assert tokenizer.encode("<|endoftext|> the") == [end, 513]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the cat") == tokenizer.encode("the cat") and again.context_length == 8


def test_cleaning():
    assert clean_text("  A  photo\tof &amp;amp; <b>") == "a photo of & <b>"
    assert clean_text("cafÃ© Don’t") == "café don't"


def test_unusable_merges(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x\nt h\nzz yy\n"))
    with pytest.raises(UserError, match=r"a\.gz: line 3"):
        ClipTokenizer(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x\nt h\n")[:-5])
    with pytest.raises(UserError, match=r"b\.gz"):
        ClipTokenizer(tmp_path / "b.gz")
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"<!doctype html>"))
    with pytest.raises(UserError, match=r"c\.gz: no merges below its first line; fetch it again"):
        ClipTokenizer(tmp_path / "c.gz")


def test_merges_with_any_byte_flipped_are_read_or_refused_in_one_sentence(tmp_path):
    data = gzip.compress(b"x\n" + b"t h\nth e</w>\na n\n" * 50)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        (tmp_path / "a.gz").write_bytes(damaged)
        try:
            ClipTokenizer(tmp_path / "a.gz")
        except UserError as error:
            assert "a.gz" in str(error)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "VOCABULARY_BYTES", 1 << 20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\n" * (1 << 24)))
    with pytest.raises(UserError, match="more than 1,048,576 bytes"):
        ClipTokenizer(tmp_path / "bomb.gz")


def test_stop_words_leave_punctuation_and_contractions_apart():
    assert (
        remove_stop_words("I don't know what it is. The dog (room 12), evening.")
        == "n't know . dog ( room 12 ) , evening ."
    )


def test_without_text_augment_captions_stay_as_they_are():
    views = TextViews(TextOptions(), local=3)
    assert views(["The dog is in the park"]) == ["The dog is in the park"] * 4
    original = TextViews(TextOptions(remove_stopwords_prob=1.0), local=1, stop_words_always=True)
    assert original(["The dog is in the park"]) == ["dog park"] * 2


def test_views_of_one_or_many_captions():
    random.seed(0)
    captions = [f"caption{i}" for i in range(20)]
    single = TextViews(TextOptions(), local=3)
    assert all(len(set(single(captions))) == 1 for _ in range(20))
    multi = TextViews(TextOptions(caption_sampling="multi"), local=3)
    assert max(len(set(multi(captions))) for _ in range(20)) > 1


def test_the_four_operations():
    pytest.importorskip("textaugment")
    random.seed(0)
    options = TextOptions(text_augment=True, remove_stopwords_prob=0.0, clean_before_augment=True)
    views = TextViews(options, local=1, synonyms={"dog": ("hound",), "park": ("",)}.get)
    views.words._get_synonyms = lambda word: {"dog": ("hound",)}.get(word, ())
    state = random.getstate()
    TextViews(options, local=1, synonyms=lambda word: ())
    assert random.getstate() == state  # textaugment's own constructor seeds the generator
    seen = Counter(views(["Big DOG barks"])[1] for _ in range(600))
    assert seen["big hound barks"] == pytest.approx(240, abs=60)  # synonym replacement, 0.4
    swaps = sum(seen[text] for text in ("dog big barks", "barks dog big", "big barks dog"))
    assert swaps == pytest.approx(240, abs=60)
    assert {"big dog", "dog barks", "big barks"} & seen.keys()
    assert views(["", ""])[1] == "" and views([" "])[1] == ""
    assert all(views(["Big DOG barks"])[0] == "big dog barks" for _ in range(20))


def test_options_are_checked():
    with pytest.raises(UserError, match="caption_sampling"):
        TextOptions(caption_sampling="some")
    with pytest.raises(UserError, match="weights"):
        TextOptions(random_swap_prob=-1)
