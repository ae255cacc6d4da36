"""LLaMA's tokenizer, SentencePiece or LLaMA 3's tokenizer.json, with special tokens of our own
behind its vocabulary."""

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from base.addresses import where_from
from base.errors import UserError, first_line
from base.reading import read_json, read_text
from base.text import clean_surrogates

JSON = "tokenizer.json"
NAME_IT = "name LLaMA's tokenizer.model or tokenizer.json, or the folder that holds it"
IMAGE, EMPTY = "<|image|>", "<|empty|>"


class PieceTokenizer:
    """Text <-> ids. Special tokens follow the model's own pieces: `<|image|>`, then `<|empty|>`,
    which pads.

    model: a SentencePiece file, a `tokenizer.json` of Hugging Face, or a folder with
    `tokenizer.model` in it or beside it, as Meta's download has it, or else with `tokenizer.json`.
    vocab_size counts the special tokens. `delimiter` is the piece "," that ends a label. Raises
    UserError where the file is neither, or lacks BOS, EOS or the comma.
    """

    def __init__(self, model: str | Path):
        self.path = find_model(Path(model))
        self.pieces = _load(self.path)
        self.image = len(self.pieces)
        self.pad = self.image + 1
        self.vocab_size = self.image + 2
        self.ids = {IMAGE: self.image, EMPTY: self.pad}
        self.names = {number: token for token, number in self.ids.items()}
        self.bos = self.pieces.bos_id()
        self.eos = self.pieces.eos_id()
        self.delimiter = self.pieces.piece_to_id(",")
        if min(self.bos, self.eos) < 0 or self.delimiter == self.pieces.unk_id():
            raise UserError(
                f"{self.path}: the tokenizer lacks BOS, EOS or a piece ',' to tell labels apart with"
            )
        self._split = re.compile("|".join(f"({re.escape(token)})" for token in self.ids))

    def __reduce__(self):
        return PieceTokenizer, (self.path,)

    def __str__(self) -> str:
        return str(self.path)

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS; what stands between special tokens is encoded by itself."""
        ids = []
        for part in self._split.split(clean_surrogates(text)):
            if part in self.ids:
                ids.append(self.ids[part])
            elif part:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; what stands between special tokens is decoded by itself."""
        text = ""
        run = []
        for number in ids:
            if number in self.names:
                text += self.pieces.decode(run) + self.names[number]
                run = []
            else:
                run.append(number)
        return text + self.pieces.decode(run)


def find_model(path: Path) -> Path:
    """The SentencePiece file that `path` means. UserError where there is none."""
    places = [path]
    if path.is_dir():
        places = [path / "tokenizer.model", path.parent / "tokenizer.model", path / JSON]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"tokenizer {path}: no such file; {NAME_IT}{where_from(path) or where_from(path.parent)}"
        )
    return found


def read_backend(file: Path):
    """The `tokenizers.Tokenizer` of a tokenizer.json. UserError where it is none, or where ids are
    beyond the number of its tokens, for which networks have embeddings."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(read_text(file))
    except Exception as error:  # the library raises bare exceptions
        what = first_line(error)
        raise UserError(f"tokenizer {file}: {what}; fetch it again") from None
    size = backend.get_vocab_size()
    token, last = max(backend.get_vocab().items(), key=itemgetter(1), default=("", -1))
    if last >= size:
        raise UserError(
            f"tokenizer {file}: {token!r:.60} has the id {last:,}, but there are only {size:,} tokens; "
            "number them without gaps"
        )
    return backend


class JsonPieces:
    """A `tokenizer.json` with the methods of a SentencePieceProcessor that PieceTokenizer uses."""

    def __init__(self, path: Path):
        if "model" not in read_json(path, dict):  # which reports where it is damaged
            raise UserError(f"tokenizer {path}: no {JSON} (it has no model); {NAME_IT}")
        beside = path.with_name("tokenizer_config.json")
        stated = read_json(beside, dict) if beside.is_file() else {}
        self.stated = {key: text_of(stated.get(key)) for key in ("bos_token", "eos_token")}
        self.backend = read_backend(path)
        self.backend.encode_special_tokens = True  # </s> in a text is text, as in SentencePiece

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def piece_to_id(self, piece: str) -> int:
        found = self.backend.token_to_id(piece)
        return -1 if found is None else found

    def unk_id(self) -> int:
        return -1

    def bos_id(self) -> int:
        """What begins a text: LLaMA's, else bos_token beside the file, else eos_token (Qwen)."""
        stated = self.stated["bos_token"] or self.stated["eos_token"]
        return self.first_of("<s>", "<|begin_of_text|>", stated, "<|endoftext|>")

    def eos_id(self) -> int:
        stated = self.stated["eos_token"]
        return self.first_of("</s>", "<|end_of_text|>", stated, "<|endoftext|>")

    def first_of(self, *names: str | None) -> int:
        """Id of the first of these pieces that there is; -1 for none."""
        ids = [self.piece_to_id(name) for name in names if name]
        return next((number for number in ids if number >= 0), -1)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)


def text_of(token: object) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _load(path: Path):
    if path.suffix == ".json":
        return JsonPieces(path)
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeError) as error:  # the last of damaged pieces' names
        what = first_line(error)
        raise UserError(
            f"tokenizer {path}: no SentencePiece model ({what}); fetch it again"
        ) from None


def train_pieces(texts: Sequence[str], size: int, write: Callable[[bytes], object]) -> None:
    """Train byte-pair pieces with byte fallback in LLaMA's manner (unk 0, bos 1, eos 2, no pad);
    write(model file).

    size: wanted number of pieces; fewer where the texts have no more. The result depends on the
    texts alone.
    """
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        hard_vocab_limit=False,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    write(model.getvalue())
