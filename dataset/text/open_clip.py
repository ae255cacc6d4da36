"""The tokenizer of a model of open_clip."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from base.libraries import dual_inputs, open_clip_tokenizer


class OpenClipTokenizer:
    """open_clip's tokenizer of `open_clip/NAME[:TAG]`: texts -> int64 [B,L], always padded to the
    whole context, as SigLIP is trained."""

    def __init__(self, model: str):
        self.path = model
        self.backend = open_clip_tokenizer(model.removeprefix("open_clip/"))
        self.context_length = dual_inputs(model).context_length
        words = getattr(self.backend, "tokenizer", None)
        self.vocab_size = getattr(self.backend, "vocab_size", None) or len(words)

    def __reduce__(self):
        return OpenClipTokenizer, (self.path,)

    def __call__(self, texts: Iterable[str], lengths: Sequence[int] | None = None) -> Tensor:
        return self.backend(list(texts))
