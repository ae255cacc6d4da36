"""Referring expressions as their makers publish them, as the lists that Grounding.py reads.

REFER (Yu et al. 2016; RefCOCO, RefCOCO+, RefCOCOg): refs(unc).p beside instances.json. MDETR and
UNINEXT: COCO's {images, annotations}, an expression with the image (MDETR's `caption`) or with the
box (UNINEXT's `phrases`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from base.errors import UserError, brief
from base.text import as_list, id_text

IN_IMAGES = ("caption", "expressions")
IN_ANNOTATIONS = ("phrases", "phrase", "expressions", "expression", "sentences")


def refs_file(folder: Path) -> Path:
    """REFER's refs(…).p in `folder` or in its refcoco+, UNC's split where there are several.
    UserError where there is none."""
    if (folder / "refcoco+").is_dir():
        folder = folder / "refcoco+"
    found = sorted(folder.glob("refs(*).p"), key=lambda file: file.name != "refs(unc).p")
    if not found:
        raise UserError(
            f"{folder}: no refs(unc).p in it; name a folder of REFER's, such as refer/data/refcoco+"
        )
    return found[0]


def refer_expressions(refs: Sequence[Mapping], instances: Mapping, source: Path) -> Iterator[dict]:
    """{image, text, bbox, ref_id, split} of every sentence; image: COCO's file name. UserError
    begins with `source`."""
    try:
        files = {id_text(entry["id"]): entry["file_name"] for entry in instances["images"]}
        boxes = {id_text(entry["id"]): entry["bbox"] for entry in instances["annotations"]}
        for ref in refs:
            for sentence in ref["sentences"]:
                yield {
                    "image": files[id_text(ref["image_id"])],
                    "text": sentence.get("sent") or sentence["raw"],
                    "bbox": boxes[id_text(ref["ann_id"])],
                    "ref_id": ref["ref_id"],
                    "split": ref["split"],
                }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: not REFER's layout, or instances.json is of another release ({error!r}); "
            "use the two files of one folder"
        ) from None


def coco_expressions(content: Mapping, split: str, source: Path) -> Iterator[dict]:
    """{image, text, bbox, split} of every expression in COCO's form. UserError begins with
    `source`."""
    try:
        images = {id_text(entry["id"]): entry for entry in content["images"]}
        for annotation in content["annotations"]:
            image = images[id_text(annotation["image_id"])]
            for text in texts_of(annotation, image):
                box = annotation["bbox"]
                yield {"image": image["file_name"], "text": text, "bbox": box, "split": split}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: not MDETR's or UNINEXT's layout ({error!r}); expected images (id, file_name, "
            "caption) and annotations (image_id, bbox), or phrases with the annotations"
        ) from None


def texts_of(annotation: Mapping, image: Mapping) -> list[str]:
    """The expressions of a box: its own, or those of its image. KeyError where there are none."""
    for entry, keys in ((annotation, IN_ANNOTATIONS), (image, IN_IMAGES)):
        for key in keys:
            if key in entry:
                found = entry[key]
                texts = as_list(found)
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"{key} {brief(found)} is no text")
                return texts
    raise KeyError("caption")
