"""CLIP's text pipeline: cleaning, byte-level BPE, and rows of ids."""

import gzip
import html
import importlib.util
import io
import itertools
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from base.errors import UserError
from base.files import read_bytes
from dataset.text.wordpiece import padded_length

START, END = "<|startoftext|>", "<|endoftext|>"
# special tokens, English contractions, words, single digits, runs of anything else
PIECES = (
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace(
        "|>", r"\|>"
    )
)
PIECES = PIECES.replace("<|", r"<\|")
CLIP_MERGES = 48_894  # of the file's lines, CLIP takes so many
MERGES_LIMIT = 64 << 20  # bytes of the text; CLIP's has 3 million
REMEMBERED = (
    1 << 18
)  # words whose ids are kept; the commonest words of web captions are a few ten thousand


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
                f"bpe_path {path}: no such file; name CLIP's bpe_simple_vocab_16e6.txt.gz, or leave it out and "
                "`pip install open_clip_torch`, which brings the file"
            )
        return Path(path)
    package = importlib.util.find_spec("open_clip")  # its files without importing it
    for folder in package.submodule_search_locations if package else ():
        if (Path(folder) / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
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
        self.path, self.context_length = find_merges(merges), context_length
        self.merges = read_merges(self.path)
        self.vocab_size = 512 + len(self.merges) + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.words: dict[str, tuple[int, ...]] = {START: (self.start_id,), END: (self.end_id,)}

    def __reduce__(self):
        return ClipTokenizer, (self.path, self.context_length)

    def encode(self, text: str) -> list[int]:
        """Ids of a text after cleaning, without start and end. Special tokens written out become
        special ids."""
        ids: list[int] = []
        for word in pieces().findall(clean_text(text)):
            ids += self.words.get(word) or self._remember(word)
        return ids

    def _remember(self, word: str) -> tuple[int, ...]:
        ids = self.word_ids(word)
        if len(self.words) < REMEMBERED:
            self.words[word] = ids
        return ids

    def word_ids(self, word: str) -> tuple[int, ...]:
        """Byte-pair encoding of one word: of all neighbours those of the earliest merge are joined,
        again and again."""
        ids = [BYTE_IDS[byte] for byte in word.encode()]
        ids[-1] += 256
        while len(ids) > 1:
            joined = min(self.merges.get(pair, self.vocab_size) for pair in itertools.pairwise(ids))
            if joined == self.vocab_size:
                break
            place, merged = 0, []
            while place < len(ids):
                hit = self.merges.get(tuple(ids[place : place + 2])) == joined
                merged.append(joined if hit else ids[place])
                place += 2 if hit else 1
            ids = merged
        return tuple(ids)

    def row(self, text: str) -> list[int]:
        """Start, ids, end; a longer text is cut to the context length and still ends with the end
        token."""
        ids = [self.start_id, *self.encode(text)][: self.context_length - 1]
        return [*ids, self.end_id]

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> torch.Tensor:
        """int64 [B,L], padded with 0. lengths: the allowed L; None for the whole context, () for
        multiples of 8."""
        rows = [self.row(text) for text in texts]
        width = self.context_length
        if lengths is not None:
            width = padded_length(max(map(len, rows)), self.context_length, lengths)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids, with a blank after every word."""
        symbols: dict[int, bytes] = {}
        for byte, number in BYTE_IDS.items():
            symbols |= {number: bytes([byte]), number + 256: bytes([byte]) + b" "}
        for (left, right), number in self.merges.items():
            symbols[number] = symbols[left] + symbols[right]
        symbols |= {self.start_id: START.encode(), self.end_id: END.encode()}
        return b"".join(symbols[int(number)] for number in ids).decode("utf-8", "replace")


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
    return {chr(byte): byte for byte in plain} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


BYTE_IDS = {byte: number for number, byte in enumerate(_byte_alphabet().values())}


def read_merges(path: Path) -> dict[tuple[int, int], int]:
    """Merges of a file as (left id, right id) -> id of both together; smaller ids are merged
    first."""
    data = read_bytes(path, "fetch it again", MERGES_LIMIT)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MERGES_LIMIT + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no gzipped text ({error}); fetch it again") from None
    if len(data) > MERGES_LIMIT:
        raise UserError(f"{path}: more than {MERGES_LIMIT:,} bytes of text; fetch it again")
    ids = {symbol: number for number, symbol in enumerate(_byte_alphabet())}
    ids |= {f"{symbol}</w>": number + 256 for symbol, number in list(ids.items())}
    merges: dict[tuple[int, int], int] = {}
    for number, line in enumerate(text.split("\n")[1 : CLIP_MERGES + 1], 2):
        if not line.strip():
            continue
        try:
            left, right = line.split()
            pair = ids[left], ids[right]
        except (ValueError, KeyError):
            raise UserError(
                f"{path}: line {number}, {line[:40]!r}, is no pair of known symbols; fetch it again"
            ) from None
        merges[pair] = ids[left + right] = 512 + len(merges)
    return merges
