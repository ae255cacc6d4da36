"""Referring expressions (RefCOCO+): which annotated box an expression means, and the boxes a
detector found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from dataset.images.decode import decode_image
from dataset.text.wordpiece import pre_caption

Box = list[float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Target:
    """What an expression refers to."""

    image_id: int
    split: str  # val, testA, testB
    box: Box
    height: int  # of the image, pixels
    width: int


class ReferringExpressions:
    """The evaluation set: entries with `image`, `text`, `ref_id`, and for each its target and the
    detected boxes.

    refs: REFER's list of {ref_id, ann_id, image_id, split}; instances: COCO's {images,
    annotations}; detections: boxes by str(image_id). Raises UserError for a ref_id without
    annotation and for an image without detections.
    """

    def __init__(
        self,
        records: Sequence[dict],
        refs: Sequence[Mapping],
        instances: Mapping,
        detections: Mapping[str, Sequence[Box]],
        image_root: str | Path,
        transform: Callable,
        max_words: int = 30,
    ):
        self.image_root, self.transform = Path(image_root), transform
        known = targets(refs, instances)
        if not isinstance(detections, Mapping):
            raise UserError("det_file: expected an object, image_id: list of boxes [x, y, w, h]")
        self.images = [record["image"] for record in records]
        self.texts = [pre_caption(record["text"], max_words) for record in records]
        self.targets, self.boxes = [], []
        for number, record in enumerate(records):
            target = known.get(int(record["ref_id"]))
            where = f"test_file, entry {number} (the first is 0)"
            if target is None:
                raise UserError(
                    f"{where}: ref_id {record['ref_id']} is not among the references of refcoco_data, or its "
                    "annotation is missing in instances.json; use the files of one release"
                )
            boxes = detections.get(str(target.image_id))
            if not boxes:
                raise UserError(
                    f"{where}: det_file has no boxes for image_id {target.image_id} ({record['image']}); add its "
                    "detections or remove the entry"
                )
            self.targets.append(target)
            self.boxes.append([list(map(float, box)) for box in boxes])

    def __len__(self) -> int:
        return len(self.images)

    def file(self, index: int) -> Path:
        """Where the image of expression `index` lies."""
        return self.image_root / self.images[index]

    def load(self, index: int) -> dict:
        """`image` float32 [3,H,W] and `text`."""
        return {"image": self.transform(decode_image(self.file(index))), "text": self.texts[index]}


def targets(refs: Sequence[Mapping], instances: Mapping) -> dict[int, Target]:
    """By ref_id; references whose annotation or image `instances` lacks are left out. Raises
    UserError."""
    try:
        boxes = {entry["id"]: list(map(float, entry["bbox"])) for entry in instances["annotations"]}
        sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in instances["images"]}
        return {
            int(ref["ref_id"]): Target(
                ref["image_id"], ref["split"], boxes[ref["ann_id"]], *sizes[ref["image_id"]]
            )
            for ref in refs
            if ref["ann_id"] in boxes and ref["image_id"] in sizes
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"refcoco_data: refs need ref_id, ann_id, image_id and split, instances.json needs images (id, height, "
            f"width) and annotations (id, bbox): {error!r}"
        ) from None
