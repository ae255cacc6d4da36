"""Images with the names of what they show, as sequences for next-token prediction; and the images
of a split.

Two kinds of sources: list files, one `path : name,name,...` a line (ImageNet's layout of NXTP), or
JSON entries {image, labels}; and WebDataset shards whose members `.nouns`
scripts/data/extract_nouns.py made of the captions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from base import distributed
from base.caches import cached_path
from base.errors import BadSample, UserError, brief
from base.names import name_of
from base.pixels import OPENAI, timm_statistics
from base.reading import read_lines
from base.text import as_list, is_blank
from dataset.images.albef import random_box, resized_crop
from dataset.images.clip import EvalView, pixel_statistics
from dataset.images.decode import check_image_root, decode_image
from dataset.loading.filtered import Filtered
from dataset.loading.stream import RecordSource, Stream
from dataset.sources.cached_tables import made_once
from dataset.sources.left_out import LeftOut
from dataset.sources.records import Records
from dataset.sources.shard_index import ERROR_BUDGET, ShardIndex
from dataset.sources.shard_list import list_shards
from dataset.sources.shards import shard_sources
from dataset.sources.tables import TABLES, is_table, parse_address
from dataset.tasks.record import captions_of, image_of, weights_of
from dataset.text.choice import with_text
from dataset.text.nouns import parse_nouns
from dataset.text.prompts import CAPTION_PROMPTS, LABEL_PROMPTS
from dataset.text.sentencepiece import PieceTokenizer
from dataset.text.wordpiece import mlm_targets

IGNORED = -100  # target of a position without one
STEP = 8  # texts are padded to multiples of it
NO_NAMES = "no caption has a noun; is scripts/data/extract_nouns.py's output complete?"
EXTRACT = "run scripts/data/extract_nouns.py over the shards first"


# ---- sequences
@dataclass(frozen=True)
class Sequences:
    """Makes the text behind the image tokens: <|image|>, BOS, prompt, labels.

    A token has a segment (models.recognition.nxtp.text_mask): 0 for the prompt, which every later
    position sees, j for label j and
    the delimiter that ends it. Every label is ended, so that the end of each is learned.
    max_text: tokens at most. many_prompts: a prompt is drawn for each sample, else the first is
    taken.
    original: as the published code: the last label stays open and sees not even itself, EOS follows
    it (and is a target where `end_target`), what is too long is cut off anywhere, and labels may be
    missing. decouple: no: labels see those before them.
    """

    tokenizer: PieceTokenizer
    max_text: int = 256
    many_prompts: bool = True
    original: bool = False
    end_target: bool = False
    decouple: bool = True

    def __post_init__(self):
        longest = max(len(self.start(text)) for text in (*LABEL_PROMPTS, *CAPTION_PROMPTS))
        if self.max_text < longest + 2:
            raise UserError(
                f"max_text {self.max_text}: the longest prompt alone takes {longest} tokens; allow more"
            )

    def start(self, prompt: str) -> list[int]:
        """<|image|>, BOS and the prompt."""
        return [self.tokenizer.image, self.tokenizer.bos, *self.tokenizer.encode(prompt)]

    @property
    def opening(self) -> list[int]:
        """What inference begins with."""
        return self.start(LABEL_PROMPTS[0])

    def labels(self, names: Sequence[str], prompt: str | None = None) -> dict[str, list[int]]:
        """`text_ids`, `segments` and `targets` of the names in random order (as given, where a
        prompt is given).

        Names that do not fit are left out; another epoch draws others. Raises BadSample where there
        is no name, or not one fits.
        """
        if not names and not self.original:
            raise BadSample(
                "no labels: the caption has no nouns; scripts/data/extract_nouns.py leaves such samples out"
            )
        shuffled = prompt is None
        if shuffled:
            names = [names[i] for i in torch.randperm(len(names)).tolist()]
            prompt = LABEL_PROMPTS[self._drawn(len(LABEL_PROMPTS))]
        before = len(self.start(prompt))
        ids = self.start(f"{prompt} {', '.join(names)}")
        if self.original:  # its last label ends in EOS, or where it is cut off
            ids = [*ids, self.tokenizer.eos][: self.max_text]
        else:
            ids = self._whole_labels([*ids, self.tokenizer.delimiter], before, names)
        return {
            "text_ids": ids,
            "segments": self._segments(ids, before),
            "targets": self._targets(ids, self.end_target),
        }

    def _whole_labels(self, ids: list[int], before: int, names: Sequence[str]) -> list[int]:
        """`ids` up to the last delimiter that fits; the prompt's `before` tokens come first."""
        if len(ids) <= self.max_text:
            return ids
        for last in range(self.max_text - 1, before - 1, -1):
            if ids[last] == self.tokenizer.delimiter:
                return ids[: last + 1]
        room = self.max_text - before
        raise BadSample(f"label {names[0]!r:.60}: longer than the {room} tokens left of it")

    def _segments(self, ids: list[int], before: int) -> list[int]:
        """0 for the prompt's `before` tokens, then the number of the label, from 1; its delimiter
        belongs to it."""
        if not self.decouple:
            return [0] * len(ids)
        segments = [0] * before
        current = 1
        for token in ids[before:]:
            segments.append(current)
            current += token == self.tokenizer.delimiter
        if self.original:  # nobody sees its last label, which no delimiter ends
            segments = [-1 if number == current else number for number in segments]
        return segments

    def caption(self, text: str, prompt: str | None = None) -> dict[str, list[int]]:
        """The same of a whole caption, read and predicted from left to right, EOS included."""
        prompt = CAPTION_PROMPTS[self._drawn(len(CAPTION_PROMPTS))] if prompt is None else prompt
        ids = (self.start(f"{prompt} {text}") + [self.tokenizer.eos])[: self.max_text]
        return {"text_ids": ids, "segments": [0] * len(ids), "targets": self._targets(ids, True)}

    def _targets(self, ids: list[int], with_end: bool) -> list[int]:
        return [
            IGNORED if token == self.tokenizer.eos and not with_end else token for token in ids[1:]
        ] + [IGNORED]

    def _drawn(self, count: int) -> int:
        return int(torch.randint(count, ())) if self.many_prompts else 0


def pad_batch(
    texts: Sequence[dict[str, list[int]]], pad: int, length: int | None = None
) -> dict[str, torch.Tensor]:
    """text_ids, segments int64 [B,T]; positions int64 [K], flat in B*T, of tokens with a target;
    labels int64 [K].

    T is a multiple of STEP (or `length`), K of 32, filled up with position 0 and label IGNORED.
    """
    longest = max(len(text["text_ids"]) for text in texts)
    length = length or -(-longest // STEP) * STEP
    fill = {"text_ids": pad, "segments": -1, "targets": IGNORED}
    rows: dict[str, list] = {key: [] for key in fill}
    for key, empty in fill.items():
        for text in texts:
            room = length - len(text[key])
            rows[key].append(text[key] + [empty] * room)
    batch = {key: torch.tensor(value) for key, value in rows.items()}
    batch["positions"], batch["labels"] = mlm_targets(batch.pop("targets"))
    return batch


# ---- samples
def image_statistics(tower: str | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std in grey levels of the images of timm's tower, or by default of CLIP's, for
    `dataset.images.clip.normalize`."""
    return pixel_statistics(device, *(timm_statistics(tower) if tower else OPENAI))


class ImageView:
    """uint8 [3,H,W] -> uint8 [3,S,S], bicubic: the centre at S pixels of the shorter side, or the
    whole image.

    crop: < 1: a random box instead, of at least this fraction of the image.
    """

    def __init__(self, side: int, whole: bool = False, crop: float = 1.0):
        self.side = side
        self.whole = whole
        self.crop = crop
        self.centre = EvalView(side, "bicubic")

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.crop < 1:
            return resized_crop(image, random_box(image, (self.crop, 1.0)), self.side)
        if self.whole:
            return resized_crop(image, None, self.side)
        return self.centre(image)


class RecognitionSample:
    """Makes a training sample of a record: `image` uint8 [3,S,S], `text` and, if wanted, `caption`
    (see Sequences).

    record: of a list, with `image` (path below root) and `labels`; or of a shard, with `image` and
    `nouns` as bytes.
    Its `caption` is a text, or several of which one is drawn.
    """

    def __init__(
        self, view: ImageView, sequences: Sequences, root: str | Path = "", captions: bool = False
    ):
        self.view = view
        self.sequences = sequences
        self.root = Path(root)
        self.captions = captions

    def __call__(self, record: dict) -> dict:
        names = names_of(record)
        try:
            sample = {"text": self.sequences.labels(names)}
        except BadSample as error:
            raise BadSample(f"{name_of(record)}: {error}") from None
        if self.captions:
            texts = as_list(captions_of(record))
            weights = weights_of(record, texts)
            if not all(map(is_blank, texts)):
                texts, weights = with_text(texts, weights)
            if weights is None:
                chosen = torch.randint(len(texts), ())
            else:
                chosen = torch.multinomial(torch.tensor(weights), 1)
            sample["caption"] = self.sequences.caption(texts[int(chosen)])
        return sample | {"image": self.view(image_of(record, self.root))}


def names_of(record: dict) -> list[str]:
    """The labels of a record of a list or of a shard. Raises BadSample where a shard has none for
    it."""
    field = "labels" if "labels" in record else "nouns"
    if field not in record:
        raise BadSample(f"{name_of(record)}: no member .nouns; {EXTRACT}")
    given = record[field]
    texts = [each for each in as_list(given) if each is not None]
    if not all(isinstance(text, str | bytes) for text in texts):
        raise BadSample(f"{name_of(record)}: {field} is {brief(given)}, not a list of texts")
    return [name for text in texts for name in parse_nouns(text)]


def has_names(record: dict) -> bool:
    """Whether there is a name to learn; captions without nouns stay in shards for evaluation."""
    try:
        return bool(names_of(record))
    except BadSample:
        return True  # for the stream to count


class RecognitionCollate:
    """image uint8 [B,3,S,S] and what `pad_batch` makes of the labels; of captions the same names
    with `caption_`."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"image": torch.stack([sample["image"] for sample in samples])}
        batch |= pad_batch([sample["text"] for sample in samples], self.pad)
        if "caption" in samples[0]:
            captions = pad_batch([sample["caption"] for sample in samples], self.pad)
            batch |= {f"caption_{key}": value for key, value in captions.items()}
        return batch


# ---- files
def label_records(path: str | Path) -> Records:
    """Records {image, labels: [names]} of a list file or of JSON entries with these fields.

    A list file is converted once, into the cache of `Records`. Raises UserError that names file and
    line.
    """
    if is_table(path) or Path(path).suffix.lower() in (".json", ".jsonl"):
        return Records(path, required=("image", "labels"))
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such list; each line is `path : name,name,...`")
    converted = made_once(cached_path(path, ".jsonl", "labels"), path, partial(read_list, path))
    return Records(converted, required=("image", "labels"))


def read_list(path: Path, left_out: LeftOut | None = None) -> Iterator[dict]:
    """`{image, labels}` of every line `path : name,name,...`; a path may hold colons if blanks
    stand around the one. An image may have no names: evaluation keeps it, training passes over.
    Other lines go to `left_out`. UserError."""
    left_out = left_out or LeftOut(path)
    found = False
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        image, colon, names = line.partition(" : ")
        if not colon:
            image, colon, names = line.partition(":")
        labels = [name.strip() for name in names.split(",") if name.strip()]
        left_out.total += 1
        if image.strip() and colon:
            found = True
            yield {"image": image.strip(), "labels": labels}
        else:
            given = brief(line.strip())
            left_out.add(f"{path}, line {number}: expected `path : name,name,...`, found {given}")
    left_out.check()
    if not found:
        raise UserError(f"{path}: an empty list; each line is `path : name,name,...`")


def training_stream(
    view: ImageView,
    sequences: Sequences,
    data,
    captions: bool,
) -> Stream:
    """Batches of RecognitionCollate: of list files with images below `root`, and of shards with
    nouns. A collective: the first process looks through lists and shards for all.

    data: has `train_list` and `image_root`, `shards`, `samples` and `shuffle_buffer` (see
    `shard_sources`), `weights` and `exif` (see `Stream`). captions: whether samples have the
    caption, too.
    """
    root = data.image_root
    build = RecognitionSample(view, sequences, root, captions)
    sources: list = []
    for file in data.train_list:
        with distributed.rank_0_first():
            records = label_records(file)
        check_image_root(root, (record["image"] for record in records))
        sources.append(RecordSource(records, build, str(file)))
    sources += shard_sources(data.shards, build, data.shuffle_buffer, data.samples)
    if not sequences.original:  # there, such images are trained on without labels
        sources = [Filtered(source, has_names, NO_NAMES) for source in sources]
    collate = RecognitionCollate(sequences.tokenizer.pad)
    return Stream(sources, collate, data.weights, data.exif)


class ImageSet:
    """The images of a split in order, with what they show: of a list (below `root`), or of .tar
    shards. The samples of shards are those that training reads."""

    def __init__(
        self,
        source: str | Path,
        view: Callable,
        root: str | Path = ".",
        error_budget: float = ERROR_BUDGET,
    ):
        self.view = view
        self.root = Path(root)
        self.source = str(source)
        endings = (".list", ".txt", ".json", ".jsonl", *TABLES)
        self.is_list = parse_address(source).path.suffix.lower() in endings
        if self.is_list:
            self.records = label_records(source).complete()
            check_image_root(self.root, (record["image"] for record in self.records))
        else:
            index = ShardIndex(list_shards(self.source), self.source, error_budget)
            self.records = index.nonempty()
        try:
            self.references = [self._names(index) for index in range(len(self))]
        except BadSample as error:
            raise UserError(str(error)) from None

    def __len__(self) -> int:
        return len(self.records)

    def _names(self, index: int) -> list[str]:
        """What image `index` shows. Raises BadSample."""
        if self.is_list:
            return names_of(self.records[index])
        try:
            return parse_nouns(self.records.read(index, "nouns"))
        except KeyError:
            raise BadSample(f"{self.name(index)}: no member .nouns; {EXTRACT}") from None

    def image(self, index: int) -> bytes | Path:
        """The encoded image, or its file."""
        if self.is_list:
            return self.root / self.records[index]["image"]
        return self.records.image(index)

    def name(self, index: int) -> str:
        """Its path as the list has it, or SHARD/KEY."""
        return self.records[index]["image"] if self.is_list else self.records.name(index)

    @property
    def names(self) -> list[str]:
        """Of all images."""
        return [self.name(index) for index in range(len(self))]

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """`image` uint8 [3,S,S]"""
        return {"image": self.view(decode_image(self.image(index), self.name(index)))}


def read_image(path: Path) -> torch.Tensor:
    """uint8 [3,H,W] of one image that somebody asks about, turned as its EXIF orientation says.
    UserError where it cannot be read."""
    try:
        return decode_image(path, exif=True)
    except BadSample as error:
        raise UserError(f"{error}; give a JPEG, PNG, WebP or another common image file") from None
