"""CLIP's text pipeline: cleaning, byte-level BPE, and rows of ids."""

import gzip
import html
import importlib.util
import io
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from base.addresses import where_from
from base.errors import UserError
from base.limits import VOCABULARY_BYTES
from base.reading import read_bytes
from dataset.text.wordpiece import padded

START, END = "<|startoftext|>", "<|endoftext|>"
# special tokens, English contractions, words, single digits, runs of anything else
PIECES = (
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace(
        "|>", r"\|>"
    )
)
PIECES = PIECES.replace("<|", r"<\|")
CLIP_MERGES = 48_894  # of the file's lines, CLIP takes so many
MERGES = "bpe_simple_vocab_16e6.txt.gz"  # of CLIP


def clean_text(text: str) -> str:
    """Repairs encoding damage (ftfy), resolves HTML entities twice, joins blanks, lower-cases."""
    if not (
        text.isascii() and text.isprintable() and "&" not in text
    ):  # otherwise there is nothing to repair
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def find_merges(path: str | Path | None = None) -> Path:
    """The file of BPE merges: `path`, or the one in the package open_clip_torch. UserError names
    both ways."""
    if path is not None:
        if not Path(path).is_file():
            raise UserError(
                f"bpe_path {path}: no such file{where_from(MERGES)}; or leave it out and "
                "`pip install open_clip_torch`, which brings the file"
            )
        return Path(path)
    package = importlib.util.find_spec("open_clip")  # its files without importing it
    for folder in package.submodule_search_locations if package else ():
        if (Path(folder) / MERGES).is_file():
            return Path(folder) / MERGES
    raise UserError(
        "CLIP's BPE merges are not on this machine: `pip install open_clip_torch`, which brings them, or name a copy "
        "of bpe_simple_vocab_16e6.txt.gz with --bpe-path"
    )


class ClipTokenizer:
    """CLIP's byte-level BPE: the ids of OpenAI's tokenizer for its merges file, or of any file of
    that layout.

    Layout: a gzipped (or plain) text; the first line is skipped, each other holds two symbols to
    merge. Vocabulary:
    256 bytes, 256 bytes that end a word, one entry a merge, start and end of text; id 0 pads.
    """

    def __init__(self, merges: str | Path | None = None, context_length: int = 77):
        self.path = find_merges(merges)
        self.context_length = context_length
        self.merges = read_merges(self.path)
        self.backend = _backend(self.merges)
        self.vocab_size = 512 + len(self.merges) + 2
        self.start_id = self.vocab_size - 2
        self.end_id = self.vocab_size - 1

    def __reduce__(self):
        return ClipTokenizer, (self.path, self.context_length)

    def encode(self, text: str) -> list[int]:
        """Ids of a text after cleaning, without start and end. Special tokens written out become
        special ids."""
        words = pieces().findall(clean_text(text))
        return self.backend.encode(words, is_pretokenized=True, add_special_tokens=False).ids

    def row(self, text: str) -> list[int]:
        """Start, ids, end; a longer text is cut to the context length and still ends with the end
        token."""
        ids = [self.start_id, *self.encode(text)][: self.context_length - 1]
        return [*ids, self.end_id]

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> torch.Tensor:
        """int64 [B,L], padded with 0. lengths: the allowed L; None for the whole context, () for
        multiples of 8."""
        return padded([self.row(text) for text in texts], 0, self.context_length, lengths)

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids, with a blank after every word."""
        data = bytearray()
        for number in ids:
            symbols = self.backend.id_to_token(int(number))
            data += bytes(BYTES[symbol] for symbol in symbols.removesuffix(WORD_END))
            data += b" " if symbols.endswith(WORD_END) else b""
        return data.decode("utf-8", "replace")


@cache
def pieces():
    """The compiled pattern that cuts a text into words."""
    import regex

    return regex.compile(PIECES, regex.IGNORECASE)


def _byte_alphabet() -> dict[str, int]:
    """Symbol in a merges file -> byte, in the order of the vocabulary: printable bytes stand for
    themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return alphabet


BYTES = _byte_alphabet()
WORD_END = "</w>"


def _backend(merges: list[tuple[str, str]]):
    """The `tokenizers.Tokenizer` of these merges, for words cut out by `pieces`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    symbols = [*BYTES, *(symbol + WORD_END for symbol in BYTES)]
    symbols += [left + right for left, right in merges]
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, START, END])}
    model = models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([START, END])
    return backend


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Merges of a file, the first ones first. UserError where a line is no pair of symbols that
    the lines before it make."""
    data = read_bytes(path, "fetch it again", VOCABULARY_BYTES)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(VOCABULARY_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no gzipped text ({error}); fetch it again") from None
    if len(data) > VOCABULARY_BYTES:
        raise UserError(f"{path}: more than {VOCABULARY_BYTES:,} bytes of text; fetch it again")
    known = {*BYTES, *(symbol + WORD_END for symbol in BYTES)}
    merges = []
    for number, line in enumerate(text.split("\n")[1 : CLIP_MERGES + 1], 2):
        if not line.strip():
            continue
        pair = tuple(line.split())
        if len(pair) != 2 or not known.issuperset(pair) or pair[0].endswith(WORD_END):
            raise UserError(
                f"{path}: line {number}, {line[:40]!r}, is no pair of known symbols; fetch it again"
            )
        merges.append(pair)
        known.add(pair[0] + pair[1])
    if not merges:
        raise UserError(f"{path}: no merges below its first line; fetch it again")
    return merges
