"""Captions and questions: cleaning, WordPiece ids in a few fixed lengths, masked-language-model
targets."""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils.data import default_collate

from base.errors import BadSample, UserError, brief
from base.hub import from_hub
from base.reading import read_json, read_lines, read_text
from base.text import clean_surrogates, is_blank
from dataset.text.choice import choose, with_text
from dataset.text.sentencepiece import read_backend
from dataset.text.vocabulary import SPECIAL

MOST_OF_A_LETTER = 4  # tokens: BERT takes one of Korean's apart into three
DROPPED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


def pre_caption(text: str, max_words: int = 30) -> str:
    """Lower-cases, drops punctuation, joins runs of blanks and keeps the first `max_words` words
    (ALBEF's cleaning)."""
    text = text.lower().translate(DROPPED).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def pre_question(text: str, max_words: int = 30) -> str:
    """As `pre_caption`, but blanks stay as they are: only spaces at the end are cut (ALBEF's
    cleaning of questions)."""
    return " ".join(text.lower().translate(DROPPED).rstrip(" ").split(" ")[:max_words])


def choose_caption(
    caption: str | Sequence[str], max_words: int = 30, weights: Sequence[float] | None = None
) -> str:
    """The cleaned caption, of a list one chosen with Python's `random` among those of which
    something is left. weights: of each in that choice, none = equal. Raises BadSample where nothing
    is left of any."""
    if isinstance(caption, str):
        chosen = caption
    else:
        chosen = choose(caption, weights)
    text = pre_caption(chosen, max_words)
    if is_blank(text) and not isinstance(caption, str):
        cleaned = [pre_caption(each, max_words) for each in caption]
        left, weights = with_text(cleaned, weights)
        text = choose(left or [text], weights)
    if is_blank(text):
        raise BadSample(f"caption {chosen[:60]!r} is empty after cleaning")
    return text


class Tokenizer:
    """BERT WordPiece as the originals use it: [CLS] + pieces and no [SEP]; literal "[SEP]" or
    "[MASK]" are special ids.

    source: a Hugging Face folder (tokenizer.json or vocab.txt), a vocab.txt, a tokenizer.json, or
    the name of a tokenizer on the Hugging Face hub. Raises UserError when it is none of these.
    """

    def __init__(self, source: str | Path = "bert-base-uncased"):
        self.backend = _load_backend(str(source))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab_size = self.backend.get_vocab_size()
        ids = [self.backend.token_to_id(name) for name in SPECIAL]
        if None in ids:
            raise UserError(
                f"tokenizer {source}: no {SPECIAL[ids.index(None)]} in its vocabulary; give that of a BERT model"
            )
        self.backend.add_special_tokens(list(SPECIAL))
        self.special_ids = ids
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """[CLS] and the pieces of one text, at most `max_length` ids in all."""
        return [self.cls_id, *self.plain_ids(text)][:max_length]

    def plain_ids(self, text: str) -> list[int]:
        """The pieces of one text alone; a lone surrogate in it counts as U+FFFD."""
        return self.backend.encode(clean_surrogates(text), add_special_tokens=False).ids

    def __call__(
        self,
        texts: Iterable[str],
        max_length: int | None = None,
        lengths: Sequence[int] | None = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(text_ids int64 [B,L], text_mask bool [B,L])`; the mask is True on tokens.

        max_length: ids kept per text, None keeps all. lengths: the allowed L, of which the smallest
        that holds the longest text is taken (few shapes: few compilations); empty for multiples of
        8 up to max_length, None for exactly the longest text.
        """
        rows = [self.encode(text, max_length) for text in texts]
        width = padded_length(max(map(len, rows)), max_length, lengths)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, pieces in enumerate(rows):
            ids[row, : len(pieces)] = torch.tensor(pieces)
            mask[row, : len(pieces)] = True
        return ids, mask


class TextCollate:
    """Makes the batch of samples with `text`: text_ids int64, text_mask bool [B,L]; whatever else
    they have is stacked.

    max_tokens: ids kept of a text, None keeps all.
    """

    field = "text"  # what samples call their text

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None = None):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        rest = [key for key in samples[0] if key != self.field]
        batch = {key: default_collate([sample[key] for sample in samples]) for key in rest}
        texts = [sample[self.field] for sample in samples]
        ids, mask = self.tokenizer(texts, self.max_tokens)
        return {**batch, "text_ids": ids, "text_mask": mask}


class WholeTexts(TextCollate):
    """As TextCollate, of texts that are not cut.

    positions: the most tokens that the network takes.
    """

    def __init__(self, tokenizer: Tokenizer, positions: int):
        super().__init__(tokenizer)
        self.positions = positions

    def check_sample(self, sample: dict) -> None:
        """BadSample for a text of more tokens: few words may be many, as in Chinese, which has no
        blanks."""
        text = sample[self.field]
        if len(text) <= self.positions // MOST_OF_A_LETTER:
            return
        count = len(self.tokenizer.encode(text))
        if count > self.positions:
            raise BadSample(
                f"text {brief(text)} has {count:,} tokens, of which the network takes "
                f"{self.positions:,} (max_position_embeddings of bert_config); shorten it"
            )


def padded_length(longest: int, max_length: int | None, lengths: Sequence[int] | None) -> int:
    """Smallest allowed length that holds `longest` tokens (see Tokenizer)."""
    if lengths is None:
        return longest
    for length in sorted(lengths):
        if length >= longest:
            return length
    rounded = -(-longest // 8) * 8
    return rounded if max_length is None else max(longest, min(rounded, max_length))


def padded(
    rows: Sequence[list[int]], pad: int, longest: int, lengths: Sequence[int] | None
) -> torch.Tensor:
    """Ids int64 [B,L]. lengths: the allowed L; None for `longest`, () for multiples of 8."""
    width = longest
    if lengths is not None:
        width = padded_length(max(map(len, rows)), longest, lengths)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def mask_tokens(
    ids: torch.Tensor,
    probability: float,
    mask_id: int,
    vocab_size: int,
    never: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: of the chosen tokens 80 % become [MASK], 10 % a random id, 10 % stay (Devlin
    et al., 2019, 3.1).

    ids int64 [B,L]; never: ids that are never chosen. Returns `(masked ids, labels)`, both int64
    [B,L]; labels hold the original id where chosen and -100 elsewhere. Draws four [B,L] matrices in
    a fixed order from `generator`.
    """
    draw = torch.full(ids.shape, probability)
    chosen = torch.bernoulli(draw, generator=generator).bool()
    to_mask = torch.bernoulli(draw.fill_(0.8), generator=generator).bool()
    to_random = torch.bernoulli(draw.fill_(0.5), generator=generator).bool()
    random_ids = torch.randint(vocab_size, ids.shape, generator=generator)
    chosen &= ~torch.isin(ids, torch.tensor(never))
    labels = torch.where(chosen, ids, -100)
    masked = torch.where(chosen & to_random, random_ids, ids)
    return torch.where(chosen & to_mask, mask_id, masked), labels


def mlm_targets(labels: torch.Tensor, multiple: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """`(positions, labels)`, both int64 [K]: flat positions of the chosen tokens of labels [B,L]
    and their original ids.

    K is rounded up to a `multiple` (few shapes, never empty); padding is position 0 with label
    -100.
    """
    flat = labels.flatten()
    places = flat.ne(-100).nonzero().flatten()
    size = max(multiple, -(-len(places) // multiple) * multiple)
    positions = torch.zeros(size, dtype=torch.int64)
    targets = torch.full((size,), -100, dtype=torch.int64)
    positions[: len(places)] = places
    targets[: len(places)] = flat[places]
    return positions, targets


def _normalizing(vocabulary: Path) -> dict[str, bool | None]:
    """Options of BertNormalizer from tokenizer_config.json beside a vocab.txt. UserError."""
    file = vocabulary.with_name("tokenizer_config.json")
    stated = read_json(file, dict) if file.is_file() else {}
    found = {
        "lowercase": stated.get("do_lower_case", True),
        "strip_accents": stated.get("strip_accents"),
        "handle_chinese_chars": stated.get("tokenize_chinese_chars", True),
    }
    for name, value in found.items():
        if not isinstance(value, bool) and (value is not None or name != "strip_accents"):
            raise UserError(f"{file}: {name} is {brief(value)}, not true or false; fetch it again")
    return found


def _load_backend(source: str):
    """The `tokenizers.Tokenizer` behind a folder, file or hub name; a vocab.txt is taken to be
    lower-casing BERT's, where no tokenizer_config.json beside it says otherwise."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    path = Path(source)
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file and file.suffix == ".json":
        read_json(file, dict)  # says where it is damaged
        return read_backend(file)
    if file:
        lines = read_lines(file)
        vocabulary = {token: number for number, token in enumerate(lines)}
        if not read_text(file).endswith("\n"):
            warnings.warn(f"tokenizer {file}: its last line has no end; is it whole?", stacklevel=3)
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(**_normalizing(file))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return backend
    if path.exists() or path.is_absolute() or source.startswith("."):
        raise UserError(
            f"tokenizer {source}: no tokenizer.json or vocab.txt there; give a folder or file that has one"
        )
    with from_hub(f"tokenizer {source}", source, ", or a vocab.txt"):
        return Backend.from_pretrained(source)
