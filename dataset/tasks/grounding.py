"""Referring expressions (RefCOCO+): which annotated box an expression means, and the boxes a
detector found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import BadSample, UserError, brief
from base.limits import IMAGE_PIXELS
from base.reading import read_json
from base.text import id_text
from dataset.images.decode import decode_image, size_of
from dataset.text.wordpiece import pre_caption

Box = list[float]  # x, y, width, height in pixels
FARTHEST = 1e9  # pixels from an image's corner: farther numbers are no coordinates


@dataclass(frozen=True)
class Target:
    """What an expression refers to."""

    image_id: int | str
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
        self.image_root = Path(image_root)
        self.transform = transform
        known = targets(refs, instances)
        if not isinstance(detections, Mapping):
            raise UserError("det_file: expected an object, image_id: list of boxes [x, y, w, h]")
        detections = {id_text(image): boxes for image, boxes in detections.items()}
        self.images = [record["image"] for record in records]
        self.written = [record["text"] for record in records]
        self.texts = [pre_caption(text, max_words) for text in self.written]
        self.targets = []
        self.boxes = []
        for number, record in enumerate(records):
            target = known.get(id_text(record["ref_id"]))
            where = f"test_file, entry {number} (the first is 0)"
            if target is None:
                raise UserError(
                    f"{where}: ref_id {record['ref_id']} is not among the references of refcoco_data, or its "
                    "annotation is missing in instances.json; use the files of one release"
                )
            boxes = detections.get(id_text(target.image_id))
            boxes = read_boxes(boxes, f"det_file, image_id {target.image_id}")
            if not boxes:
                raise UserError(
                    f"{where}: det_file has no boxes for image_id {target.image_id} ({record['image']}); add its "
                    "detections or remove the entry"
                )
            self.targets.append(target)
            self.boxes.append(boxes)

    def __len__(self) -> int:
        return len(self.images)

    def file(self, index: int) -> Path:
        """Where the image of expression `index` lies."""
        return self.image_root / self.images[index]

    def load(self, index: int) -> dict:
        """`image` uint8 [3,H,W] and `text`."""
        return {"image": self.transform(decode_image(self.file(index))), "text": self.texts[index]}


def referred_boxes(
    records: Sequence[dict], image_root: str | Path
) -> tuple[list[dict], list[dict], dict]:
    """Expressions that carry their own boxes, in REFER's form: (records with ref_id, refs,
    instances), where an image's id is its path.

    records: {image, text, bbox: [x, y, w, h]} and, where there are several, `split` ("test").
    Raises UserError for an image that cannot be read, and for what is no box.
    """
    refs, annotations, named = [], [], []
    boxes: dict[tuple, int] = {}  # (image, box) -> its annotation: several expressions may mean one
    for number, record in enumerate(records):
        image, split = record["image"], record.get("split", "test")
        (box,) = read_boxes([record["bbox"]], f"test_file, entry {number} (the first is 0)")
        known = boxes.setdefault((image, *box), len(boxes))
        if known == len(annotations):
            annotations.append({"id": known, "image_id": image, "bbox": box})
        named.append({**record, "ref_id": number})
        refs.append({"ref_id": number, "ann_id": known, "image_id": image, "split": split})
    images = []
    for image in dict.fromkeys(record["image"] for record in records):
        try:
            width, height = size_of(Path(image_root) / image)
        except BadSample as error:
            raise UserError(f"test_file: {error}; fix it or remove its entries") from None
        images.append({"id": image, "height": height, "width": width})
    return named, refs, {"images": images, "annotations": annotations}


def read_detections(path: Path | None, instances: Mapping) -> Mapping:
    """Boxes by image_id: of an object {image_id: boxes}, of a detector's results in COCO's form, a
    list of {image_id, bbox}, or, without a file, the annotated ones. UserError."""
    if path is None:
        found = instances.get("annotations", [])
        remedy = "instances.json: annotations need image_id and bbox; or give det_file"
    else:
        found = read_json(path, None, "check det_file")
        remedy = f"{path}: expected an object, image_id: boxes, or a list of {{image_id, bbox}}"
    if isinstance(found, Mapping):
        return found
    boxes: dict[str, list] = {}
    try:
        for each in found:
            boxes.setdefault(id_text(each["image_id"]), []).append(each["bbox"])
    except (KeyError, TypeError):
        raise UserError(remedy) from None
    return boxes


def read_boxes(detections: object, where: str) -> list[Box]:
    """Boxes [x, y, w, h] of a detector's list: each [x, y, w, h] with or without a score behind,
    or an object with such a `box` or `bbox`; or of an object with a list of `boxes`.
    UserError begins with `where`."""
    if detections is None:
        return []
    if isinstance(detections, Mapping) and "boxes" in detections:
        detections = detections["boxes"]
    if not isinstance(detections, Sequence) or isinstance(detections, str):
        raise UserError(f"{where}: expected a list of boxes, found {brief(detections)}")
    boxes = []
    for each in detections:
        box = each.get("box", each.get("bbox")) if isinstance(each, Mapping) else each
        fits = isinstance(box, Sequence) and not isinstance(box, str) and len(box) in (4, 5)
        if not fits or not all(map(is_coordinate, box)):
            raise UserError(f"{where}: {brief(each)} is no box [x, y, w, h] in pixels; fix it")
        if box[2] < 0 or box[3] < 0:
            raise UserError(f"{where}: {brief(each)} has a width or height below 0; fix it")
        boxes.append([float(value) for value in box[:4]])
    return boxes


def is_coordinate(value: object) -> bool:
    """Whether a value is a number of pixels; NaN is none."""
    return type(value) in (int, float) and abs(value) < FARTHEST


def _check_size(image: str, height: int, width: int) -> None:
    if min(height, width) < 1 or height * width > IMAGE_PIXELS:
        raise UserError(
            f"instances.json, image {image}: {height} x {width} pixels is no size of an image; "
            "fix its height and width"
        )


def targets(refs: Sequence[Mapping], instances: Mapping) -> dict[str, Target]:
    """By ref_id as text; references whose annotation or image `instances` lacks are left out.

    Ids are matched by their text: one file may write 5 where another has "5". Raises UserError.
    """
    try:
        found = {}
        boxes = {id_text(entry["id"]): entry["bbox"] for entry in instances["annotations"]}
        sizes = {
            id_text(entry["id"]): (int(entry["height"]), int(entry["width"]))
            for entry in instances["images"]
        }
        for ref in refs:
            name = id_text(ref["ref_id"])
            annotation = id_text(ref["ann_id"])
            image = id_text(ref["image_id"])
            if annotation not in boxes or image not in sizes:
                continue
            (box,) = read_boxes([boxes[annotation]], f"instances.json, annotation {annotation}")
            _check_size(image, *sizes[image])
            target = Target(ref["image_id"], str(ref["split"]), box, *sizes[image])
            if found.setdefault(name, target) != target:
                raise UserError(f"refcoco_data: ref_id {name} has two targets; remove one")
        return found
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"refcoco_data: refs need ref_id, ann_id, image_id and split, instances.json needs images (id, height, "
            f"width) and annotations (id, bbox): {error!r}"
        ) from None
