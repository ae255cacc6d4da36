"""ALIGN's tokenizer."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from base.errors import UserError
from dataset.text.wordpiece import Tokenizer, padded


class AlignTokenizer:
    """BERT's lower-case WordPiece as TensorFlow Text does it: [CLS], pieces, [SEP], padding 0.

    Unlike transformers' tokenizer it folds case and compatibility characters by Unicode's rules (ß
    is ss, ™ is tm), and "[SEP]" in a caption is text. source: as in
    dataset.text.wordpiece.Tokenizer.
    """

    def __init__(self, source: str | Path = "bert-base-uncased", context_length: int = 64):
        self.source = source
        self.context_length = context_length
        self.pieces = Tokenizer(source)
        self.pieces.backend.encode_special_tokens = True
        self.vocab_size = self.pieces.vocab_size
        self.path = source
        if self.pieces.pad_id:
            raise UserError(
                f"tokenizer {source}: [PAD] must be its first entry, as in every BERT vocabulary"
            )

    def __reduce__(self):
        return AlignTokenizer, (self.source, self.context_length)

    def row(self, text: str) -> list[int]:
        """[CLS], the first pieces, [SEP]: at most `context_length` ids."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        ids = self.pieces.plain_ids(text)
        return [self.pieces.cls_id, *ids[: self.context_length - 2], self.pieces.sep_id]

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> Tensor:
        """int64 [B,L]. lengths: the allowed L; None for the whole context, () for multiples of
        8."""
        return padded([self.row(text) for text in texts], 0, self.context_length, lengths)
