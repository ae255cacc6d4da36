"""Pictures and captions as COYO-ALIGN prepares them."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.errors import DataError
from dataset.text import Tokenizer, padded_length

MARGIN = 346 / 289  # side of the squashed picture over that of the cut


class AlignView:
    """Squash to a square 346 / 289 times as large, without antialiasing and whatever the aspect ratio; cut a square.

    train: cut anywhere and mirror with probability `flip`; otherwise cut the middle. exact: float32 with the original's
    unrounded values 0..255; otherwise uint8 within one grey level of them, in a quarter of the time.
    """

    def __init__(self, side: int, train: bool = False, flip: float = 0.5, exact: bool = False):
        self.side, self.train, self.flip, self.exact = side, train, flip, exact
        self.large = round(side * MARGIN)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3,H,W] -> [3,side,side]."""
        room = self.large - self.side
        top, left = torch.randint(room + 1, (2,)).tolist() if self.train else (room // 2, room // 2)
        source = image[None].float() if self.exact else image[None]
        squashed = F.interpolate(source, (self.large, self.large), mode="bilinear", align_corners=False)[0]
        cut = squashed[:, top : top + self.side, left : left + self.side]
        return cut.flip(-1) if self.train and torch.rand(()) < self.flip else cut


class AlignViews(AlignView):
    """The same for training data, whose samples may have local views too; ALIGN's have none."""

    def __call__(self, image: Tensor) -> tuple[Tensor, None]:
        return super().__call__(image), None


class AlignTokenizer:
    """BERT's lower-case WordPiece as TensorFlow Text does it: [CLS], pieces, [SEP], padding 0.

    Unlike transformers' tokenizer it folds case and compatibility characters by Unicode's rules (ß is ss, ™ is tm), and
    "[SEP]" in a caption is text. source: as in dataset.text.Tokenizer.
    """

    def __init__(self, source: str | Path = "bert-base-uncased", context_length: int = 64):
        self.source, self.context_length = source, context_length
        self.pieces = Tokenizer(source)
        self.pieces.backend.encode_special_tokens = True
        self.vocab_size, self.path = self.pieces.vocab_size, source
        if self.pieces.pad_id:
            raise DataError(f"tokenizer {source}: [PAD] must be its first entry, as in every BERT vocabulary")

    def __reduce__(self):
        return AlignTokenizer, (self.source, self.context_length)

    def row(self, text: str) -> list[int]:
        """[CLS], the first pieces, [SEP]: at most `context_length` ids."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        ids = self.pieces.backend.encode(text, add_special_tokens=False).ids
        return [self.pieces.cls_id, *ids[: self.context_length - 2], self.pieces.sep_id]

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> Tensor:
        """int64 [B,L]. lengths: the allowed L; None for the whole context, () for multiples of 8."""
        rows = [self.row(text) for text in texts]
        width = self.context_length
        if lengths is not None:
            width = padded_length(max(map(len, rows)), self.context_length, lengths)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])
