"""Image-text retrieval: training pairs that know which captions share an image, and the evaluation
set."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from base.image_names import ImageKeys
from base.text import as_list
from dataset.images.decode import decode_image
from dataset.tasks.record import image_of, weights_of
from dataset.text.wordpiece import TextCollate, choose_caption, pre_caption


def number_images(names: Iterable[str | int], root: str | Path = "") -> torch.Tensor:
    """int32 [n] in shared memory: for every image below `root` its number in the order of first
    appearance."""
    keys = ImageKeys(root)
    numbers: dict = {}
    column = array("i", (numbers.setdefault(keys(name), len(numbers)) for name in names))
    return torch.frombuffer(column, dtype=torch.int32).clone().share_memory_()


class RetrievalPair:
    """Makes a sample of a record with `image`, `caption`: `image` uint8 [3,H,W], `caption` str,
    `image_id` int.

    image_ids: the number of every record's image (see number_images), so that captions of one image
    know it.
    field: what the caption is called in the records.
    """

    def __init__(
        self,
        transform: Callable,
        image_root: str | Path,
        image_ids: torch.Tensor,
        max_words: int = 30,
        field: str = "caption",
    ):
        self.transform = transform
        self.image_root = Path(image_root)
        self.image_ids = image_ids
        self.max_words = max_words
        self.field = field

    def __call__(self, record: dict) -> dict:
        captions = record[self.field]
        return {
            "caption": choose_caption(captions, self.max_words, weights_of(record, captions)),
            "image": self.transform(image_of(record, self.image_root)),
            "image_id": int(self.image_ids[record["index"]]),
        }


class RetrievalCollate(TextCollate):
    """image uint8 [B,3,H,W] · text_ids int64, text_mask bool [B,L] · image_id int64 [B]."""

    field = "caption"


class RetrievalSet:
    """The evaluation set of records with `image` and `caption` (a list): every image once, all
    captions in a row.

    images: paths. captions: cleaned texts; written: the same as the file has them. txt2img[t]: the
    image of caption t. img2txt[i]: the captions of image i.
    """

    def __init__(
        self,
        records: Sequence[dict],
        image_root: str | Path,
        transform: Callable,
        max_words: int = 30,
    ):
        self.image_root = Path(image_root)
        self.transform = transform
        self.images = []
        self.captions = []
        self.txt2img = []
        self.img2txt = []
        self.written: list[str] = []
        keys = ImageKeys(image_root)
        numbers: dict = {}  # image -> its index in `images`
        for record in records:
            number = numbers.setdefault(keys(record["image"]), len(numbers))
            if number == len(self.images):
                self.images.append(record["image"])
                self.img2txt.append([])
            for caption in as_list(record["caption"]):
                self.img2txt[number].append(len(self.captions))
                self.txt2img.append(number)
                self.captions.append(pre_caption(caption, max_words))
                self.written.append(caption)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> torch.Tensor:
        """uint8 [3,H,W] of image `index`; BadSample when it cannot be read."""
        return self.transform(decode_image(self.image_root / self.images[index]))
