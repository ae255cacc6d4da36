"""Cleaning, WordPiece in fixed lengths and masked-language-model targets."""

import json
import pickle
import random
import warnings

import pytest
import torch

from base.errors import BadSample, UserError
from dataset.sources.records import Records
from dataset.text.align import AlignTokenizer
from dataset.text.augment import TextOptions, TextViews
from dataset.text.sentencepiece import PieceTokenizer, train_pieces
from dataset.text.wordpiece import (
    SPECIAL,
    Tokenizer,
    choose_caption,
    mask_tokens,
    mlm_targets,
    padded_length,
    pre_caption,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "red", "ball", "狗"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_a_vocabulary_is_read_as_its_configuration_says(tmp_path, stated):
    import transformers

    words = [*SPECIAL, "Dog", "dog", "cafe", "café", "Café", "Cafe", "狗", "##狗"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    text = "Dog Café 狗狗"
    assert Tokenizer(tmp_path).plain_ids(text) == theirs.encode(text, add_special_tokens=False)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "no"}')
    with pytest.raises(UserError, match="lowercase is 'no', not true or false"):
        Tokenizer(tmp_path)


def test_captions():
    assert pre_caption("Long " * 10_000) == " ".join(["long"] * 30)
    assert choose_caption("红色的 СОБАКА") == "红色的 собака"
    assert choose_caption(["A Dog!"] * 3) == "a dog"
    for empty in ("", "...", " \t\n", [" !? "]):
        with pytest.raises(BadSample, match="empty after cleaning"):
            choose_caption(empty)


def test_tokens(tokenizer):
    assert tokenizer.encode("Dogs [SEP] 狗 qq") == [2, 6, 7, 3, 10, 1]
    assert tokenizer.encode("a " * 10_000, max_length=25) == [2] + [5] * 24
    ids, mask = tokenizer(["a", "a red dog"])
    assert ids.shape == (2, 8) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert (
        ids[0].tolist() == [2, 5, 0, 0, 0, 0, 0, 0]
        and mask[0].tolist() == [True, True] + [False] * 6
    )
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("red ball") == tokenizer.encode("red ball")


@pytest.mark.filterwarnings("ignore:.*its last line has no end")
def test_tokenizer_sources(tokenizer, tmp_path):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("Red dogs") == tokenizer.encode("Red dogs")
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert Tokenizer(tmp_path / "tokenizer.json").vocab_size == len(WORDS)
    with pytest.raises(UserError, match=r"no tokenizer.json or vocab.txt"):
        Tokenizer(tmp_path / "missing")
    (tmp_path / "vocab.txt").write_text("a\nb\n[UNK]")
    with pytest.raises(UserError, match=r"no \[PAD\]"):
        Tokenizer(tmp_path / "vocab.txt")


def test_a_vocabulary_that_is_cut_off_or_names_a_token_twice(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Tokenizer(vocabulary)
    vocabulary.write_text("\n".join(WORDS[:-1])[:-2])
    with pytest.warns(UserWarning, match=r"vocab\.txt: its last line has no end; is it whole\?"):
        assert Tokenizer(vocabulary).vocab_size == whole.vocab_size - 1
    for more in ("a\n", "\n\n\n"):  # a token named twice is taken as BERT's own tokenizer does
        vocabulary.write_text("\n".join(WORDS) + "\n" + more)
        assert Tokenizer(vocabulary).encode("red dogs") == whole.encode("red dogs")


def test_padded_lengths():
    assert [padded_length(n, 25, ()) for n in (1, 8, 9, 24, 25)] == [8, 8, 16, 24, 25]
    assert [padded_length(n, None, ()) for n in (1, 30, 33)] == [8, 32, 40]
    assert [padded_length(n, 30, (12, 30)) for n in (3, 12, 13)] == [12, 12, 30]
    assert padded_length(13, 30, None) == 13


def test_masking_follows_the_80_10_10_rule():
    ids = torch.randint(5, 1000, (400, 50))
    ids[:, 0], ids[:, -3:] = 2, 0
    masked, labels = mask_tokens(ids, 0.15, 4, 1000, (0, 2, 3, 4), torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, -3:].any()
    assert torch.equal(masked[~chosen], ids[~chosen]) and torch.equal(labels[chosen], ids[chosen])
    assert chosen[:, 1:-3].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (masked[chosen] == 4).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (masked[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.02)


def test_targets_list_the_chosen_places():
    labels = torch.full((4, 25), -100)
    labels[1, 3], labels[3, 24] = 17, 9
    positions, targets = mlm_targets(labels)
    assert positions.tolist() == [28, 99] + [0] * 30
    assert targets.tolist() == [17, 9] + [-100] * 30
    assert len(mlm_targets(torch.full((2, 3), -100))[0]) == 32
    assert len(mlm_targets(torch.zeros(3, 11, dtype=torch.int64))[0]) == 64


def test_half_an_emoji_is_the_replacement_character_in_every_tokenizer(tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join([*SPECIAL, "a", "red", "seven", "\ufffd", ""]).encode()
    )
    tokenizer = Tokenizer(vocab)
    assert tokenizer.encode("a red seven \ud83d") == tokenizer.encode("a red seven \ufffd")
    assert tokenizer.encode("a red seven \ud83d")[:4] == [2, 5, 6, 7]
    align = AlignTokenizer(vocab)
    assert align.row("seven \ud83d") == align.row("seven \ufffd")
    file = tmp_path / "pieces.model"
    train_pieces(["a red seven, a blue three \ufffd"] * 9, 300, file.write_bytes)
    pieces = PieceTokenizer(file)
    assert pieces.encode("a \ud83d") == pieces.encode("a \ufffd") != pieces.encode("a")


def test_a_record_with_half_an_emoji_is_read(tmp_path):
    (tmp_path / "a.json").write_text(
        r'[{"image": "a.jpg", "caption": ["x \ud83d", "\ud83d\ude00"]}]'
    )
    record = Records(tmp_path / "a.json")[0]
    assert record["caption"] == ["x \ufffd", "😀"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.txt", b"[PAD]\n\xff\xfe"),
        ("tokenizer.json", b'{"model": '),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unheard"}}'),
        ("tokenizer.json", b"[1]"),
    ],
)
def test_a_damaged_vocabulary_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        Tokenizer(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_empty_caption_of_several_condemns_no_other():
    random.seed(0)
    assert {choose_caption(["", "a cat", "...", "\u200b", "a dog"]) for _ in range(60)} == {
        "a cat",
        "a dog",
    }
    with pytest.raises(BadSample, match="empty after cleaning"):
        choose_caption(["", "!"])
    views = TextViews(TextOptions(text_augment=False), local=1)
    assert {text for _ in range(30) for text in views(["", "a cat", " \ufeff"])} == {"a cat"}


def test_the_draw_among_captions_without_an_empty_one_is_as_it_was():
    captions = ["one", "two", "three"]
    random.seed(3)
    drawn = [choose_caption(captions) for _ in range(20)]
    random.seed(3)
    assert drawn == [random.choice(captions) for _ in range(20)]
