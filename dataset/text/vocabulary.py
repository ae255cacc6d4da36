"""Small vocabularies trained on one's own texts: BERT's WordPiece, CLIP's merges and LLaMA's
SentencePiece. The same texts make the same vocabulary, in whatever order they come."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dataset.text.prompts import CAPTION_PROMPTS, LABEL_PROMPTS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The trainers number symbols in a hash map's order, another in each process, and ties are broken by
# number: the symbols named beforehand, as special tokens, have fixed numbers.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!:;'-"
OTHER_LETTERS = 2000  # at most, of other scripts: what a vocabulary must hold to spell its words
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_wordpiece(folder: Path, texts: Iterable[str], size: int = 1000) -> None:
    """A Hugging Face folder of a lower-casing BERT tokenizer with about `size` pieces, never fewer
    than its letters; ids 0-4 are SPECIAL."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = sorted(set(texts))
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = letters_of(tokenizer.normalizer.normalize_str(text) for text in texts)
    alphabet = [*letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(size, len(SPECIAL) + len(alphabet)),
        special_tokens=[*SPECIAL, *alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_bert(plain_copy(tokenizer), folder)


def letters_of(texts: Iterable[str]) -> list[str]:
    """LETTERS, then the commonest other letters of the texts."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    others = [letter for letter in counts if letter not in LETTERS and not letter.isspace()]
    others.sort(key=lambda letter: (-counts[letter], letter))
    return [*LETTERS, *others[:OTHER_LETTERS]]


def save_bert(tokenizer, folder: Path) -> None:
    """The files of a Hugging Face folder: tokenizer.json, vocab.txt, tokenizer_config.json."""
    from tokenizers import decoders, processors

    tokenizer.decoder = decoders.WordPiece()
    ids = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=list(ids.items()),
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces))
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        **dict(zip(roles, SPECIAL, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def plain_copy(trained):
    """The tokenizer with the same vocabulary, in which only SPECIAL are special."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_merges(path: Path, texts: Iterable[str], merges: int = 500) -> None:
    """Byte-pair merges in the layout of CLIP's `bpe_simple_vocab_16e6.txt.gz`: a header line, then
    one merge per line.

    The vocabulary that belongs to n merges has 512 + n + 2 entries, <|startoftext|> and
    <|endoftext|> last.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(LETTERS))
    letters = [*LETTERS, *others]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + merges,
        special_tokens=symbols,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in learned)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def write_pieces(path: Path, texts: Iterable[str], size: int = 640) -> None:
    """A SentencePiece model in LLaMA's manner, of the texts and the prompts of recognition. It has a
    piece for the comma, which ends a label, also where every image has one label alone."""
    from dataset.text.sentencepiece import train_pieces

    texts = list(texts)
    if not any("," in text for text in texts):
        texts = [f"{text}," for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    train_pieces(
        [*sorted(texts), *LABEL_PROMPTS * 20, *CAPTION_PROMPTS * 20], size, path.write_bytes
    )
