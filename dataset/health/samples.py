"""What can be wrong with one sample: its images, its texts, its boxes."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from base.errors import BadSample
from base.image_names import existing
from base.names import name_of
from base.reading import is_file
from base.text import as_list, is_blank, lenient_text
from base.zip_member import image_source
from dataset.images.decode import decode_image, image_bytes, is_turned, reading
from dataset.tasks.grounding import is_coordinate
from dataset.tasks.record import (
    CAPTION_FIELDS,
    captions_of,
    is_nothing,
    labels_of,
    weights_of,
)

TINY = 32  # pixels of the shorter side below which an image is called tiny
HUGE = 25_000_000  # pixels
THIN = 6.0  # longer side / shorter side
FLAT = 2.0  # levels of 255 between an image's darkest and lightest pixel
HASHED = 8  # side of the grid that the difference hash is made of
THUMBNAIL = 24  # side of what near duplicates are compared by
TEXT_FIELDS = ("caption", "question", "sentence", "text")
ID_FIELDS = ("question_id",)  # not ref_id: a box has several expressions
# Problems after which a sample cannot be trained on; the others are remarks.
FATAL = frozenset(
    {"missing", "unreadable", "no caption", "no text", "no image", "no box", "damaged shard"}
)


@dataclass(slots=True)
class Image:
    """An image that was looked at. digest: of its bytes; signature: see `signature`."""

    name: str
    problems: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    signature: bytes = b""


@dataclass(slots=True)
class Facts:
    """A sample that was looked at: problem -> what it is about, and what is compared between
    samples."""

    number: int
    name: str
    problems: dict[str, str] = field(default_factory=dict)
    images: list[Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lost: int = 1  # samples it stands for: more than one where a shard is damaged

    @property
    def usable(self) -> bool:
        """Whether it can be trained on."""
        return not FATAL & self.problems.keys()


@dataclass(frozen=True)
class Examiner:
    """Looks at samples. tokens: the number of tokens of a text, of which a model takes `most`.
    answers: those a question may have; none = any. clean: what a method makes of a text first."""

    root: Path
    tokens: Callable[[str], int]
    most: int
    answers: frozenset[str] = frozenset()
    clean: Callable[[str], str] = str

    def __call__(self, number: int, record: dict | BadSample) -> Facts:
        if isinstance(record, BadSample):
            return Facts(number, "", {"damaged shard": str(record)}, lost=record.lost or 1)
        facts = Facts(number, name_of(record))
        facts.labels = label_texts(record)
        self._look_at_images(record, facts)
        self._look_at_texts(record, facts)
        self._look_at_answers(record, facts)
        facts.ids = [f"{name} {record[name]}" for name in ID_FIELDS if name in record]
        return facts

    def _look_at_images(self, record: dict, facts: Facts) -> None:
        given = as_list(record.get("image") or record.get("images") or record.get("url") or [])
        if isinstance(record.get("image"), list):
            given = []  # only `images` are several
        if not given:
            facts.problems["no image"] = "neither image nor images"
        for image in given:
            if isinstance(image, bytes):
                found = examine_image(image, facts.name)
            else:
                found = examine_file(self.root, str(image))
            facts.images.append(found)
            for problem in found.problems:
                facts.problems[problem] = found.name
        if has_odd_box(record):
            facts.problems["no box"] = facts.name
        for box in boxes_of(record):
            if facts.images and not box_inside(box, facts.images[0].size):
                height, width = facts.images[0].size
                facts.problems["box outside"] = f"{facts.name}: {box} in {width} x {height}"

    def _look_at_texts(self, record: dict, facts: Facts) -> None:
        try:
            facts.texts = texts_of(record)
            weights_of(record, facts.texts)  # says what is wrong with them
        except BadSample:
            problem = "empty text" if facts.labels else "no caption"  # which labels do without
            facts.problems[problem] = facts.name
            return
        cleaned = [self.clean(text) for text in facts.texts]
        if facts.texts and all(map(is_blank, cleaned)) and not facts.labels:
            facts.problems["no text"] = facts.name
        for text, clean in zip(facts.texts, cleaned, strict=True):
            facts.lengths.append(self.tokens(clean))
            for problem in text_problems(text, facts.lengths[-1], self.most):
                facts.problems.setdefault(problem, text)

    def _look_at_answers(self, record: dict, facts: Facts) -> None:
        if "answer" not in record:
            return
        answers = [str(answer) for answer in as_list(record["answer"])]
        if all(map(is_blank, answers)):
            facts.problems["no answer"] = facts.name
        elif self.answers and not self.answers & {answer.strip() for answer in answers}:
            facts.problems["answer not in the list"] = f"{facts.name}: {answers[0]}"


# ---- images
def examine_file(root: Path, image: str) -> Image:
    """The image at a path below `root`."""
    try:
        source = image_source(Path(), str(existing(root / image)))
        if isinstance(source, Path) and not is_file(source):
            return Image(image, ("missing",))
    except BadSample:
        return Image(image, ("missing",))
    try:
        content = source if isinstance(source, bytes) else image_bytes(source, image)
    except BadSample:
        return Image(image, ("unreadable",))
    return examine_image(content, image)


def examine_image(content: bytes, name: str) -> Image:
    """The encoded image."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        with reading() as noticed:
            pixels = decode_image(content, name)
    except BadSample:
        return Image(name, ("unreadable",), digest=digest)
    height, width = pixels.shape[1:]
    problems = []
    if noticed.truncated:
        problems.append("truncated")
    if min(height, width) < TINY:
        problems.append("tiny")
    if height * width > HUGE:
        problems.append("huge")
    if max(height, width) > THIN * min(height, width):
        problems.append("thin")
    if is_turned(content):
        problems.append("rotated by EXIF")
    small = shrunk(pixels)
    coarse = F.adaptive_avg_pool2d(small, HASHED)
    if float(coarse.max() - coarse.min()) < FLAT:
        problems.append("one colour")
    return Image(name, tuple(problems), (height, width), digest, signature(small))


def shrunk(pixels: torch.Tensor) -> torch.Tensor:
    """float32 [3,h,w] of uint8 [3,H,W], 0 to 255: large images need not be read whole."""
    step = max(1, min(pixels.shape[1:]) // (8 * HASHED))
    return pixels[:, ::step, ::step].float()


def signature(small: torch.Tensor) -> bytes:
    """8 bytes of difference hash (is each grey value above its right neighbour?), then the
    thumbnail [3,24,24] as 1,728 bytes, of a float32 [3,h,w] image."""
    grey = F.adaptive_avg_pool2d(small, (HASHED, HASHED + 1)).mean(0)
    bits = (grey[:, :-1] > grey[:, 1:] + 0.5).flatten()
    number = sum(1 << place for place, bit in enumerate(bits.tolist()) if bit)
    colours = F.adaptive_avg_pool2d(small, (THUMBNAIL, THUMBNAIL)).round().byte()
    return number.to_bytes(8, "little") + colours.numpy().tobytes()


# ---- boxes
def boxes_of(record: dict) -> Iterable[list[float]]:
    """[x, y, w, h] of every box of a record."""
    boxes = record.get("boxes") or ([record["bbox"]] if record.get("bbox") else [])
    for box in boxes if isinstance(boxes, list) else []:
        if isinstance(box, list) and len(box) >= 4 and all(map(is_coordinate, box[:4])):
            yield box[:4]


def has_odd_box(record: dict) -> bool:
    """Whether a record names a box that is none: other than four finite numbers."""
    given = [] if record.get("bbox") is None else [record["bbox"]]
    boxes = record.get("boxes") or given
    return len(list(boxes_of(record))) < (len(boxes) if isinstance(boxes, list) else 1)


def box_inside(box: list[float], size: tuple[int, int]) -> bool:
    """Whether a box has an area and lies within an image of size (height, width), a pixel of
    rounding allowed."""
    x, y, w, h = box
    height, width = size
    inside = x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
    return w > 0 and h > 0 and (inside or not height)


# ---- texts
def texts_of(record: dict) -> list[str]:
    """The texts of a sample; an empty list where its kind has none. Raises BadSample."""
    for name in TEXT_FIELDS:
        if name != "caption" and isinstance(record.get(name), str):
            return [record[name]]
    if not any(field in record for field in CAPTION_FIELDS) and label_texts(record):
        return []
    return as_list(captions_of(record))


def label_texts(record: dict) -> list[str]:
    """The labels of a sample, as training reads them: of its fields, its .cls or .json; an empty list
    where its kind has none."""
    try:
        field, values = labels_of(record)
    except BadSample:  # a damaged .json, which captions alone do not need
        return []
    given = [each for each in as_list(values[field]) if not is_nothing(each)] if field else []
    return [lenient_text(each).strip() if isinstance(each, bytes) else str(each) for each in given]


def text_problems(text: str, length: int, most: int) -> list[str]:
    """What is wrong with a text of `length` tokens."""
    from ftfy.badness import is_bad

    problems = []
    if is_blank(text):
        problems.append("empty text")
    if "\ufffd" in text or is_bad(text):
        problems.append("wrongly encoded")
    if length > most:
        problems.append("overlong")
    return problems
