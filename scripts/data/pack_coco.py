"""Pack COCO captions, or Localized Narratives of OpenImages, into WebDataset shards.

    python scripts/data/pack_coco.py --captions captions_train2017.json --images train2017 --target coco_wds/train
    python scripts/data/pack_coco.py --captions open_images_validation_captions.jsonl --images validation \\
        --target oi_wds/val

A sample is KEY.jpg, KEY.txt (all captions of the image joined by blanks) and KEY.json {path, cap,
split}; image files are copied as they are. Label the result with scripts/data/extract_nouns.py.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import BadSample, UserError
from base.reading import read_json_lines
from base.text import id_text, is_blank
from base.writing import check_folder_option
from dataset.images.decode import image_bytes
from dataset.sources.tar_writer import check_folder, shard_path, write_shard, write_statistics
from dataset.tasks.captions import coco_entries
from runtime.config.cli import knob, run_script


@dataclass
class Config:
    """What to pack."""

    captions: Path | None = knob(
        None, "COCO's captions_*.json, or a .jsonl with image_id and caption", required=True
    )
    images: Path | None = knob(None, "folder of the images", required=True)
    target: Path | None = knob(None, "folder to write shards to", required=True)
    split: str = knob("", "noted in KEY.json; empty = the name of the folder of images")
    samples_per_shard: int = knob(3000, "images a shard", low=1)


def images(config: Config) -> Iterator[tuple[str, list[str]]]:
    """`(file name, captions)` of every image."""
    if config.captions.suffix.lower() == ".json":
        for entry in coco_entries(config.captions):
            yield entry["image"].partition("/")[2], entry["caption"]
        return
    found: dict[str, list[str]] = {}
    for number, entry in enumerate(read_json_lines(config.captions)):
        try:
            name = entry["image_id"]
            name = name if isinstance(name, str) else id_text(name)
            found.setdefault(f"{name}.jpg", []).append(entry["caption"])
        except (KeyError, TypeError) as error:
            fault = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{config.captions}, entry {number}: {fault}") from None
    yield from found.items()


def sample_key(name: str, taken: set[str]) -> str:
    """The key of an image's members: its name up to the ending, once in all shards. A dot ends a
    key where shards are read, so that each becomes an underscore."""
    stem = Path(name).stem.replace(".", "_")
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}_{number}"
    taken.add(key)
    return key


def samples(
    rows: list[tuple[str, list[str]]], config: Config, split: str, keys: set[str], lost: Counter
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and content by ending of every image that is there and has a caption."""
    for name, captions in rows:
        text = " ".join(caption.strip() for caption in captions if isinstance(caption, str)).strip()
        try:
            image = image_bytes(config.images / name, name)
        except BadSample:
            image = b""
        if not image or is_blank(text):
            lost["without_caption" if is_blank(text) else "missing_images"] += 1
            continue
        note = {"path": name, "cap": text, "split": split}
        members = {"jpg": image, "txt": text.encode(), "json": json.dumps(note).encode()}
        yield sample_key(name, keys), members


def pack(config: Config) -> dict[str, int]:
    """Write the shards and their statistics."""
    split = config.split or config.images.name
    shards = 0
    packed = 0
    lost: Counter[str] = Counter(missing_images=0, without_caption=0)
    rows = list(images(config))
    keys = set()
    check_folder(config.target, -(-len(rows) // config.samples_per_shard))
    for start in range(0, len(rows), config.samples_per_shard):
        batch = rows[start : start + config.samples_per_shard]
        target = shard_path(config.target, shards)
        count = write_shard(target, samples(batch, config, split, keys, lost))
        if not count:
            raise UserError(
                f"{config.images}: holds none of {len(batch)} images such as {batch[0][0]} that have "
                "captions"
            )
        write_statistics(target, count)
        shards, packed = shards + 1, packed + count
    if not shards:
        raise UserError(f"{config.captions}: no captions in it")
    return {"shards": shards, "images": packed, **lost}


def main(config: Config) -> None:
    if not config.captions.is_file():
        raise UserError(f"{config.captions}: no such file of captions")
    check_folder_option(config.target, "--target")
    print(json.dumps(pack(config)))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
