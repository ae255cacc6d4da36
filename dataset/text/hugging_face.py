"""The tokenizer of a text encoder of transformers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from base.errors import UserError
from base.libraries import hugging_face_tokenizer
from dataset.text.wordpiece import padded


class FolderTokenizer:
    """transformers' tokenizer of `hf/FOLDER` (or of a name of the hub), padded with its own id.

    Called with texts it gives int64 [B,L], L at most `context_length`. whole: always as long, as
    SigLIP is trained.
    """

    def __init__(self, source: str | Path, context_length: int = 77, whole: bool = False):
        self.source = str(source)
        self.context_length = context_length
        self.whole = whole
        self.path = self.source.removeprefix("hf/")
        self.backend = hugging_face_tokenizer(self.path)
        self.vocab_size = len(self.backend)
        self.pad_id = self.backend.pad_token_id
        if self.pad_id is None:
            raise UserError(
                f"{source}: its tokenizer has no padding token; name one in tokenizer_config.json "
                "(pad_token)"
            )

    def __reduce__(self):
        return FolderTokenizer, (self.source, self.context_length, self.whole)

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> Tensor:
        """lengths: the allowed L; None for the whole context, () for multiples of 8."""
        longest = self.context_length
        rows = self.backend(list(texts), truncation=True, max_length=longest)["input_ids"]
        return padded(rows, self.pad_id, longest, None if self.whole else lengths)
