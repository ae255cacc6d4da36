"""Lists of images with all their captions, as retrieval is evaluated on: Karpathy's, COCO's,
CLIP_benchmark's, and whatever trains."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.errors import MissingData, UserError, brief
from base.image_names import check_fetched, existing
from base.reading import (
    first_letter,
    is_file,
    parse_first_entry,
    read_json,
    read_lines,
    read_start,
)
from base.text import as_list
from base.zip_member import archive_of
from dataset.sources.json_entries import TOKEN_LINE, TOKENS
from dataset.sources.published_lists import HEAD
from dataset.sources.records import Records
from dataset.sources.tables import parse_address
from dataset.tasks.captions import coco_rows, karpathy_entries
from dataset.tasks.catalog import Entry
from dataset.tasks.record import by_image

FLICKR_LINE = re.compile(r"(.+?\.jpg),(.*)", re.IGNORECASE)  # the caption may have commas
QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # a cell of a CSV


def retrieval_list(entry: Entry) -> tuple[list[Path], list[list[str]]]:
    """The images of a list that are there, and the captions of each: Karpathy's JSON {images:
    [{filepath, filename, split, sentences: [{raw}]}]}, COCO's captions_*.json, CLIP_benchmark's
    *_karpathy.txt and .json, or whatever `Records` reads: lists of {image, caption}, tables,
    folders."""
    file = parse_address(entry.path).path
    if not (file.is_file() or file.is_dir()):
        raise MissingData(
            f"{entry.name}: no file {file}; put Karpathy's JSON (dataset_coco.json, dataset_flickr30k.json) there, or "
            "name another with --datasets retrieval:FILE"
        )
    ending = file.suffix.lower()
    if ending == ".json" and first_letter(file) == b"{" and not has_lines(file):
        rows = _rows_of_object(file, entry.split)
    elif ending == ".txt" and first_letter(file) not in b"[{":
        rows = list(_flickr_rows(file))
    else:
        records = Records(entry.path).complete()
        rows = [(record["image"], as_list(record["caption"])) for record in records]
    root = _image_root(entry, file, [image for image, _ in rows[:20]])
    found = by_image(rows, root)
    return [root / image for image in found], list(found.values())


def has_lines(file: Path) -> bool:
    """Whether a JSON file that begins with an object has one a line, as Hugging Face writes them."""
    first, _, rest = read_start(file, HEAD).lstrip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(parse_first_entry(first), dict)
    except (ValueError, RecursionError):
        return False


def _image_root(entry: Entry, file: Path, first: Sequence[str]) -> Path:
    """The folder that the images' paths start from: `images` of the entry, else that of the list,
    or the one above it, as COCO's lie in annotations/."""
    places = [Path(entry.images)] if entry.images else [file.parent, file.parent.parent]
    check_fetched(first)
    for place in places:
        files = [existing(place / image) for image in first]
        if not first or any(is_file(archive_of(file) or file) for file in files):
            return place
    raise MissingData(
        f"{entry.name}: none of the first images is there, e.g. {places[0] / first[0]}; put the images where the "
        f"paths of {file} lead from {places[0]}, or name their folder with --image-root"
    )


def _flickr_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(image, captions) of flickr30k_test_karpathy.txt, and of Kaggle's captions.txt, a CSV: a
    header, then IMAGE.jpg,CAPTION lines."""
    lines = read_lines(file)
    found = [FLICKR_LINE.fullmatch(line.strip()) for line in lines]
    # a CSV's captions stand in quotes where they have commas, those of the other file never do
    is_csv = all(QUOTED.fullmatch(row[2]) for row in found if row and "," in row[2])
    for number, (line, row) in enumerate(zip(lines, found, strict=True), 1):
        if row:
            quoted = QUOTED.fullmatch(row[2]) if is_csv else None
            caption = quoted[1].replace('""', '"') if quoted else row[2]
            yield row[1], [caption.strip()]
        elif number > 1 and line.strip():
            remedy = TOKENS if TOKEN_LINE.match(line.encode()) else "fix it"
            raise UserError(
                f"{file}, line {number}: {brief(line)} is not IMAGE.jpg,CAPTION; {remedy}"
            )


def _rows_of_object(file: Path, split: str) -> list[tuple[str, list[str]]]:
    """(image, captions) of the images of a split of Karpathy's JSON, or of all in COCO's, or in
    CLIP_benchmark's {image_paths: [...], annotations: [...]}. UserError."""
    content = read_json(file, dict)
    if "image_paths" in content:
        return _paths_rows(file, content)
    if "annotations" not in content:
        return [(row["image"], row["caption"]) for row in karpathy_entries(content, split, file)]
    rows = [(row["image"], row["caption"]) for row in coco_rows(file, content)]
    for image, captions in rows:
        if not all(isinstance(text, str) for text in captions):
            raise UserError(f"{file}: a caption of {image} is no text: {brief(captions)}; fix it")
    return rows


def _paths_rows(file: Path, content: dict) -> list[tuple[str, list[str]]]:
    try:
        images, texts = content["image_paths"], content["annotations"]
        if len(images) != len(texts):
            raise TypeError(f"{len(texts)} annotations of {len(images)} image_paths")
        rows = [(str(image), as_list(text)) for image, text in zip(images, texts, strict=True)]
        for _, captions in rows:
            if not all(isinstance(text, str) for text in captions):
                raise TypeError(f"the text of annotation {brief(captions)}")
        return rows
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: {error} is missing or malformed; retrieval takes CLIP_benchmark's image_paths and "
            "annotations, Karpathy's JSON, COCO's captions, or a list of {image, caption}"
        ) from None
