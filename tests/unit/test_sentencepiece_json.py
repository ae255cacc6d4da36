"""A decoder's tokenizer.json in place of its tokenizer.model."""

import json
import pickle

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from base.errors import UserError
from dataset.text import wordpiece
from dataset.text.sentencepiece import EMPTY, IMAGE, PieceTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")


def write_tokenizer(folder, special=("<|begin_of_text|>", "<|end_of_text|>"), text="a dog, a cat"):
    """A byte-level BPE as LLaMA 3 has one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text] * 10, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return backend


def test_ids_are_those_of_tokenizers(tmp_path):
    backend = write_tokenizer(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        pieces = PieceTokenizer(source)
        size = backend.get_vocab_size()
        assert pieces.vocab_size == size + 2 and pieces.pad == size + 1 and pieces.image == size
        assert (pieces.bos, pieces.eos) == (0, 1)
        assert pieces.delimiter == backend.token_to_id(",")
        text = "a dog, ein Hündchen </s>"
        assert pieces.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert pieces.decode(pieces.encode(text)) == text
        assert pieces.encode(f"{IMAGE}a{EMPTY}")[0] == pieces.image
        assert pickle.loads(pickle.dumps(pieces)).encode("a cat") == pieces.encode("a cat")


def test_special_tokens_in_a_text_are_text(tmp_path):
    write_tokenizer(tmp_path)
    pieces = PieceTokenizer(tmp_path)
    assert pieces.eos not in pieces.encode("<|end_of_text|>")
    assert pieces.decode([pieces.bos, *pieces.encode("a dog"), pieces.eos]) == "a dog"


def test_ids_without_an_embedding_are_refused(tmp_path):
    write_tokenizer(tmp_path, special=SPECIAL)
    file = tmp_path / "tokenizer.json"
    assert PieceTokenizer(file).vocab_size and wordpiece.Tokenizer(file).vocab_size
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zz"] = 9999
    file.write_text(json.dumps(content))
    for opens in (PieceTokenizer, wordpiece.Tokenizer):
        with pytest.raises(
            UserError, match=r"'zz' has the id 9,999, but there are only \d+ tokens"
        ):
            opens(file)


def test_tokenizer_model_comes_first_and_faults_are_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer\.model: no SentencePiece model"):
        PieceTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    write_tokenizer(tmp_path, special=("<pad>",))
    with pytest.raises(UserError, match="lacks BOS, EOS"):
        PieceTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: .*fetch it again"):
        PieceTokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # whole, and another file
    with pytest.raises(UserError, match="or the folder that holds it"):
        PieceTokenizer(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("about", "bos", "eos"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}, 1, 2),  # SmolLM2
        ({"bos_token": None, "eos_token": "<|endoftext|>"}, 0, 0),  # Qwen2
        (None, 0, 0),
    ],
)
def test_other_decoders_say_their_tokens_beside_the_file(about, bos, eos, tmp_path):
    write_tokenizer(tmp_path, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    if about is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    pieces = PieceTokenizer(tmp_path)
    assert (pieces.bos, pieces.eos) == (bos, eos)
