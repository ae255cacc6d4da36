"""Captions of the same images in several languages, as XTD, Flickr30k-200 and Crossmodal-3600
publish them."""

from collections.abc import Sequence
from pathlib import Path

from base.errors import MissingData, UserError
from base.image_names import existing
from base.names import did_you_mean
from base.reading import is_file, read_json_lines, read_lines
from dataset.images.formats import files_below
from dataset.tasks.catalog import Entry

Captioned = tuple[list[Path], list[list[str]]]  # images, and the captions of each
IMAGES = ("test_image_names.txt", "filenames.txt")  # XTD's, Flickr30k-200's
CAPTIONS = "test_1kcaptions_"  # before LANGUAGE.txt, of XTD10


def xtd(entry: Entry) -> Captioned:
    """The lists of XTD10, XTD200 and Flickr30k-200: of the images, and of the captions of each
    language, LANGUAGE.txt anywhere below `path`, a line an image; the images below `path`/images."""
    folder = Path(entry.path)
    files = files_below(folder) if folder.is_dir() else ()
    texts = sorted(file for file in files if file.suffix == ".txt")
    lists = [file for file in texts if file.name in IMAGES]
    if not lists:
        raise MissingData(
            f"{entry.name}: no {' or '.join(IMAGES)} below {folder}; put the lists there (XTD10: "
            "github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10; XTD200, Flickr30k-200: data/ "
            "of github.com/visheratin/nllb-clip), and the images in images/"
        )
    captioned = {file.stem.removeprefix(CAPTIONS): file for file in texts if file not in lists}
    file = captioned.get(entry.language)
    if file is None:
        raise UserError(_no_language(entry, folder, list(captioned)))
    names = [line for line in read_lines(lists[0]) if line.strip()]
    captions = list(read_lines(file))
    if len(captions) != len(names):
        raise UserError(
            f"{file}: {len(captions)} captions for {len(names)} images of {lists[0]}; fetch both again"
        )
    images = Path(entry.images or folder / "images")
    return [images / name.strip() for name in names], [[text.strip()] for text in captions]


def crossmodal(entry: Entry) -> Captioned:
    """Crossmodal-3600's captions.jsonl: {"image/key": ..., LANGUAGE: {"caption": [...]}}, images
    KEY.jpg below `path`/images. The first caption of an image counts, as in CLIP_benchmark."""
    folder = Path(entry.path)
    file = folder / "captions.jsonl"
    if not file.is_file():
        raise MissingData(
            f"{entry.name}: no file {file}; put captions.jsonl of Crossmodal-3600 there, and its "
            "images in images/"
        )
    root = Path(entry.images or folder / "images")
    images = []
    captions = []
    for row in read_json_lines(file):
        languages = [key for key, value in row.items() if isinstance(value, dict)]
        if entry.language not in languages:
            raise UserError(_no_language(entry, file, languages))
        texts = row[entry.language].get("caption")
        key = row.get("image/key")
        if not isinstance(key, str) or not isinstance(texts, list) or not texts:
            raise UserError(
                f"{file}: image {key!r} has no caption in {entry.language!r}; fetch the file again"
            )
        images.append(root / f"{key}.jpg")
        captions.append([str(texts[0])])
    return images, captions


def _no_language(entry: Entry, place: Path, there: Sequence[str]) -> str:
    return (
        f"{entry.name}: {place} has no captions in {entry.language!r}"
        f"{did_you_mean(entry.language, there)}; it has {', '.join(sorted(there)) or 'none'}"
    )


def check_images(entry: Entry, images: Sequence[Path]) -> None:
    """Captions without their images would count as misses: all images have to be there."""
    absent = [path for path in images if not is_file(existing(path))]
    if len(absent) == len(images):
        raise MissingData(f"{entry.name}: none of its images is there, e.g. {absent[0]}")
    if absent:
        raise UserError(
            f"{entry.name}: {len(absent)} of {len(images)} images are missing, e.g. {absent[0]}; "
            "add them"
        )
