"""Pack a split of Karpathy's COCO or Flickr30k with its images and captions into a few files.

    python scripts/data/pack_karpathy.py dataset_coco.json --images coco --out coco_test.tfrecord
    python scripts/data/pack_karpathy.py dataset_flickr30k.json --images flickr30k-images \\
        --out flickr30k --format webdataset

tfrecord    one file, COYO-ALIGN's features: image, image/id, image/filename, captions/text, captions/id
webdataset  a folder of CLIP_benchmark's layout, which eval_zeroshot.py reads: OUT/<split>/0.tar ...

All captions of an image are kept, the encoded images stay as they are. Images are looked for at
<images>/<filepath>/<filename>, where the JSON names a filepath.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import BadSample, UserError
from base.reading import read_json
from base.text import whole_number
from base.writing import check_folder_option, write_text
from dataset.images.decode import image_bytes, image_ending
from dataset.sources.tar_writer import write_shard
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.captions import karpathy_entries
from runtime.advice import ends_with_advice

PER_SHARD = 1000


def rows_of(annotations: Path, images: Path, split: str) -> Iterator[dict]:
    """{image: bytes, id, filename, captions, caption_ids} of every image of the split. UserError
    names what lacks."""
    content = read_json(
        annotations, dict, "name Karpathy's dataset_coco.json or dataset_flickr30k.json"
    )
    found = False
    for entry in karpathy_entries(content, split, annotations):
        found = True
        try:
            image = image_bytes(images / entry["image"], str(images / entry["image"]))
        except BadSample as error:
            remedy = "set --images to the folder that the paths of the JSON start from"
            raise UserError(f"{error}; {remedy}") from None
        yield {
            "image": image,
            "id": _ids([entry["id"]]),
            "filename": entry["filename"],
            "captions": entry["caption"],
            "caption_ids": _ids(entry["caption_ids"]),
        }
    if not found:
        raise UserError(
            f"{annotations}: no images of split {split!r}; use train, restval, val or test"
        )


def _ids(given: list) -> list[int] | list[str]:
    """Ids as numbers of 64 bits, or as texts where they are none; none where one is missing."""
    numbers = [whole_number(each) if not isinstance(each, str) else None for each in given]
    if all(number is not None and abs(number) < 2**63 for number in numbers):
        return numbers
    return [] if None in given else [str(each) for each in given]


def write_tfrecord(rows: Iterator[dict], out: Path) -> int:
    """Number of images written."""
    names = {"image": "image", "id": "image/id", "filename": "image/filename"}
    names |= {"captions": "captions/text", "caption_ids": "captions/id"}
    examples = ({names[key]: value for key, value in row.items() if value} for row in rows)
    return write_records(out, map(encode_example, examples))


def members_of(row: dict) -> dict[str, bytes]:
    """Content by ending of a sample; the .txt has a caption a line."""
    about = {
        "imgid": next(iter(row["id"]), None),
        "filename": row["filename"],
        "sentids": row["caption_ids"],
    }
    captions = "\n".join(" ".join(caption.split()) for caption in row["captions"])
    return {
        image_ending(row["image"], row["filename"]): row["image"],
        "txt": captions.encode(),
        "json": json.dumps(about).encode(),
    }


def write_webdataset(rows: Iterator[dict], out: Path, split: str) -> int:
    """Number of images written, PER_SHARD a tar file; nshards.txt comes last."""
    folder = out / split
    count = 0
    shards = 0
    (folder / "nshards.txt").unlink(missing_ok=True)  # of an earlier packing
    while block := list(islice(rows, PER_SHARD)):
        samples = ((f"{count + i:07d}", members_of(row)) for i, row in enumerate(block))
        count += write_shard(folder / f"{shards}.tar", samples)
        shards += 1
    write_text(out / "dataset_type.txt", "retrieval\n")
    write_text(folder / "nshards.txt", f"{shards}\n")
    return count


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="Karpathy's JSON")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that its paths start from"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="file (tfrecord) or folder (webdataset)"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--format", choices=("tfrecord", "webdataset"), default="tfrecord")
    arguments = parser.parse_args(argv)
    try:
        in_file = arguments.format == "tfrecord"
        check_folder_option(arguments.out.parent if in_file else arguments.out, "--out")
        rows = rows_of(arguments.annotations, arguments.images, arguments.split)
        if in_file:
            count = write_tfrecord(rows, arguments.out)
        else:
            count = write_webdataset(rows, arguments.out, arguments.split)
    except BadSample as error:
        raise UserError(str(error)) from None
    print(f"{arguments.out}: {count} images of split {arguments.split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
