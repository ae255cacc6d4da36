"""What a scene shows: one to three coloured handwritten digits on a coloured ground, and where they
stand.

The handwriting is scikit-learn's bundled copy of the UCI optical digits (1,797 samples of 8x8 grey
values, no download). It is stored form by form: every writer's form begins with 0 1 2 ... 9 three
times over. The cuts below fall between forms, so the writers of the test split are never trained
on.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from base.errors import UserError

SPLITS = ("train", "val", "test")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = {1: "one", 2: "two", 3: "three"}
COLOURS = {
    "red": (228, 36, 36),
    "yellow": (250, 214, 30),
    "green": (40, 200, 70),
    "blue": (80, 165, 255),
    "pink": (255, 130, 200),
    "white": (248, 248, 248),
}
GROUNDS = {
    "black": (14, 14, 14),
    "grey": (112, 112, 112),
    "brown": (104, 62, 24),
    "navy": (16, 26, 96),
    "purple": (84, 20, 112),
}
FORM_STARTS = {"train": (0, 1287), "val": (1287, 1545), "test": (1545, 1797)}
COUNT_SHARES = (0.15, 0.45, 0.40)
SIZES = {"small": (0.34, 0.37), "large": (0.45, 0.49)}
LONE_LARGE = (0.50, 0.70)

# Cells (left, top, right, bottom) in fractions of the image, in the order in which captions name
# the digits. The cells of an arrangement do not overlap, so digits cannot.
UPPER_LEFT, UPPER_RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)
LOWER_LEFT, LOWER_RIGHT = (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)
ARRANGEMENTS = {
    1: {
        "middle": ((0.1, 0.1, 0.9, 0.9),),
        "upper left": (UPPER_LEFT,),
        "upper right": (UPPER_RIGHT,),
        "lower left": (LOWER_LEFT,),
        "lower right": (LOWER_RIGHT,),
    },
    2: {
        "row": ((0.0, 0.15, 0.5, 0.85), (0.5, 0.15, 1.0, 0.85)),
        "column": ((0.15, 0.0, 0.85, 0.5), (0.15, 0.5, 0.85, 1.0)),
        "falling": (UPPER_LEFT, LOWER_RIGHT),
        "rising": (LOWER_LEFT, UPPER_RIGHT),
    },
    3: {
        "triple row": ((0.0, 0.2, 1 / 3, 0.8), (1 / 3, 0.2, 2 / 3, 0.8), (2 / 3, 0.2, 1.0, 0.8)),
        "one above two": ((0.2, 0.0, 0.8, 0.5), LOWER_LEFT, LOWER_RIGHT),
        "one below two": ((0.2, 0.5, 0.8, 1.0), UPPER_LEFT, UPPER_RIGHT),
    },
}


@dataclass(frozen=True)
class Digit:
    """One digit: `sample` is its row in scikit-learn's digits, `box` is (x, y, w, h) in pixels
    around its ink."""

    digit: int
    colour: str
    size: str
    sample: int
    box: tuple[int, int, int, int]

    @property
    def word(self) -> str:
        return DIGITS[self.digit]

    @property
    def name(self) -> str:
        """Colour and digit: "red three"; no two digits of a scene share it."""
        return f"{self.colour} {self.word}"


@dataclass(frozen=True)
class Scene:
    """One image: `path` is relative to the data folder, digits come in the order of their
    arrangement's cells."""

    image_id: int
    split: str
    path: str
    width: int
    height: int
    ground: str
    arrangement: str
    digits: tuple[Digit, ...]

    @property
    def content(self) -> Hashable:
        """What any caption names whatever its wording: the ground and the coloured digits, without
        their places."""
        return self.ground, frozenset(d.name for d in self.digits)

    @property
    def description(self) -> Hashable:
        """The content with its arrangement."""
        return self.ground, self.arrangement, tuple(d.name for d in self.digits)


class Handwriting:
    """The 1,797 handwritten digits and their split.

    `ink` float32 [1797, 8, 8] in [0, 1] and `crops`, the same cut to their ink; `labels` int64
    [1797];
    `samples[split][digit]` the rows of one class.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        bundle = load_digits()
        self.ink = (bundle.images / 16).astype(np.float32)
        self.labels = bundle.target.astype(np.int64)
        self.crops = [crop(ink) for ink in self.ink]
        self.samples = {}
        for split, (start, stop) in FORM_STARTS.items():
            labels = self.labels[start:stop]
            self.samples[split] = [start + np.flatnonzero(labels == digit) for digit in range(10)]


def crop(ink: np.ndarray) -> np.ndarray:
    """A sample [8, 8] cut to its ink, with a rim of one empty pixel, [h + 2, w + 2]."""
    rows = np.flatnonzero(ink.max(1) > 0.15)
    columns = np.flatnonzero(ink.max(0) > 0.15)
    return np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)


def choose_names(rng: np.random.Generator, count: int) -> list[tuple[int, str]]:
    """`count` different (digit, colour) pairs; a third of the later ones repeat the digit or colour
    before."""
    colours = list(COLOURS)
    names: list[tuple[int, str]] = []
    while len(names) < count:
        digit = int(rng.integers(10))
        colour = colours[rng.integers(len(colours))]
        if names and rng.random() < 1 / 3:
            digit, colour = (names[-1][0], colour) if rng.random() < 0.5 else (digit, names[-1][1])
        if (digit, colour) not in names:
            names.append((digit, colour))
    return names


def place(
    rng: np.random.Generator,
    cell: tuple,
    long_side: float,
    crop: np.ndarray,
    width: int,
    height: int,
) -> tuple:
    """Box (x, y, w, h) of a digit inside its cell: the longer side is `long_side` of the image's
    shorter one."""
    rows, columns = crop.shape[0] - 1, crop.shape[1] - 1  # half of the empty rim belongs to the box
    scale = long_side * min(width, height) / max(rows, columns)
    left = cell[0] * width
    top = cell[1] * height
    right = cell[2] * width
    bottom = cell[3] * height
    w = min(round(columns * scale), int(right - left))
    h = min(round(rows * scale), int(bottom - top))
    x = int(np.ceil(left) + rng.random() * max(0.0, np.floor(right) - np.ceil(left) - w))
    y = int(np.ceil(top) + rng.random() * max(0.0, np.floor(bottom) - np.ceil(top) - h))
    return x, y, w, h


def random_scene(
    rng: np.random.Generator,
    handwriting: Handwriting,
    split: str,
    image_id: int,
    path: str,
    side: int,
    names: list[tuple[int, str]] | None = None,
) -> Scene:
    """A scene of about `side` pixels; `names` [(digit, colour)] fixes what is shown, otherwise it
    is drawn too."""
    if names is None:
        names = choose_names(rng, int(rng.choice(3, p=COUNT_SHARES)) + 1)
    scale = side * rng.uniform(0.95, 1.15)
    aspect = rng.uniform(0.9, 1.1) ** 0.5
    width, height = round(scale * aspect), round(scale / aspect)
    arrangement, cells = list(ARRANGEMENTS[len(names)].items())[
        rng.integers(len(ARRANGEMENTS[len(names)]))
    ]
    digits = []
    for (digit, colour), cell in zip(names, cells, strict=True):
        size = "small" if arrangement == "triple row" or rng.random() < 0.5 else "large"
        span = LONE_LARGE if (arrangement, size) == ("middle", "large") else SIZES[size]
        sample = int(rng.choice(handwriting.samples[split][digit]))
        box = place(rng, cell, rng.uniform(*span), handwriting.crops[sample], width, height)
        digits.append(Digit(digit, colour, size, sample, box))
    ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    return Scene(image_id, split, path, width, height, ground, arrangement, tuple(digits))


def unique_scenes(
    handwriting: Handwriting,
    split: str,
    count: int,
    first_id: int,
    side: int,
    seed: int,
    key: Callable[[Scene], Hashable],
) -> list[Scene]:
    """`count` scenes no two of which agree in `key`. Raises UserError if so many different ones
    cannot be found."""
    scenes: list[Scene] = []
    seen: set[Hashable] = set()
    for image_id in range(first_id, first_id + count):
        rng = np.random.default_rng([seed, image_id])
        path = f"images/{split}2017/{image_id:012d}.jpg"
        for _ in range(1000):
            scene = random_scene(rng, handwriting, split, image_id, path, side)
            if key(scene) not in seen:
                break
        else:
            raise UserError(
                f"no {count} different scenes exist for the {split} split: ask for fewer (--{split})"
            )
        seen.add(key(scene))
        scenes.append(scene)
    return scenes


def class_scenes(
    handwriting: Handwriting, split: str, count: int, first_id: int, side: int, seed: int
) -> list[Scene]:
    """`count` images of a single digit for the class folders, the ten classes in turn."""
    scenes = []
    colours = list(COLOURS)
    for i in range(count):
        rng = np.random.default_rng([seed, 1, SPLITS.index(split), i])
        digit = i % 10
        path = f"imagefolder/{split}/{DIGITS[digit]}/{split}_{i + 1:08d}.jpg"
        names = [(digit, colours[rng.integers(len(colours))])]
        scenes.append(random_scene(rng, handwriting, split, first_id + i, path, side, names))
    return scenes
