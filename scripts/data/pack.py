"""Pack images and captions of any form into WebDataset shards with statistics.

    python scripts/data/pack.py --data pairs.csv --image-root images --target shards/train
    python scripts/data/pack.py --data hub_folder/train --target shards/train --resize 384
    python scripts/data/pack.py --data pairs.parquet --target shards/train --slurm 16 --sbatch partition=cpu

Data is an annotation file (JSON, JSON lines, CSV, TSV, Parquet, a folder of images and texts, a data
set that Hugging Face's datasets saved), with paths of images or the encoded images in it. A sample is
KEY.jpg (or .png ...), KEY.txt with a caption a line, and KEY.json with the other fields.

An image that training could not read is named, counted and left out.

Shards are written by several processes, with --slurm by the tasks of a job array. A shard that is
there already, of the same data, images and settings, is kept: start the command again after an
interruption.
Other shards in the folder, such as those of an earlier, larger packing, are refused.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.caches import digest, have_sizes, sizes_of
from base.errors import BadSample, UserError
from base.limits import WORKERS
from base.names import name_of
from base.pixels import pixels_digest
from base.processes import in_processes, usable_cores
from base.reading import read_json
from base.text import as_list, clean_surrogates, is_blank
from base.writing import check_folder_option, make_folder, strict_json
from base.zip_member import image_source
from dataset.images.decode import (
    ORIENTATION,
    decode_image,
    image_bytes,
    image_ending,
    orientation,
    reading,
)
from dataset.sources.encoded_table import encoded_table
from dataset.sources.records import Records, state_of_entries
from dataset.sources.tables import address_state, plain
from dataset.sources.tar_writer import (
    check_folder,
    shard_path,
    statistics_file,
    write_shard,
    write_statistics,
)
from dataset.tasks.record import captions_of
from runtime.config.cli import knob, run_script, section
from runtime.job_array import Sharing, need_all, own_range, submit_array

JPEG_SIDE = 65_500  # pixels that libjpeg writes at most
SHOWN = 3  # complaints of a shard that its statistics keep


@dataclass
class Config:
    """What to pack."""

    data: str = knob(
        "", "annotation file, table or folder; FILE?caption=COLUMN names columns", required=True
    )
    image_root: Path = knob(Path("."), "folder that paths of images start from")
    target: Path | None = knob(None, "folder to write shards to", required=True)
    samples_per_shard: int = knob(5000, "samples a shard", low=1)
    resize: int = knob(
        0, "shorter side in pixels that larger images are reduced to; 0 = as is", low=0
    )
    quality: int = knob(92, "of the JPEG that a reduced image becomes", low=1, high=100)
    workers: int = knob(usable_cores(), "processes", low=1, high=WORKERS)
    sharing: Sharing = section(Sharing, flat=True)


def open_rows(config: Config) -> Sequence[dict]:
    """Entries with `image`, a path or bytes, and `caption`. UserError."""
    table = encoded_table(config.data, ("image", "caption"))
    rows = Records(config.data) if table is None else table
    if not len(rows):
        raise UserError(f"{config.data}: no rows in it; fetch it again")
    return rows


def reduced(content: bytes, config: Config, name: str) -> bytes:
    """The encoded image, its shorter side at most `resize`, with the EXIF orientation it had; as it
    is without `resize`, where a JPEG cannot be so long, and where the file ends early, which training
    shall see. Raises BadSample for what training could not read."""
    from PIL import Image

    with reading() as noticed:
        pixels = decode_image(content, name).permute(1, 2, 0).numpy()
    shorter = min(pixels.shape[:2])
    if not config.resize or shorter <= config.resize or noticed.truncated:
        return content
    image = Image.fromarray(pixels)
    scale = config.resize / shorter
    size = (round(image.width * scale), round(image.height * scale))
    if max(size) > JPEG_SIDE:
        return content
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation(content)
    smaller = image.resize(size, Image.Resampling.BICUBIC)
    smaller.save(file, "JPEG", quality=config.quality, exif=exif)
    return file.getvalue()


def members_of(row: dict, config: Config) -> dict[str, bytes]:
    """Content by ending. Raises BadSample."""
    image = row["image"]
    if not isinstance(image, bytes):
        source = image_source(config.image_root, str(image))
        image = source if isinstance(source, bytes) else image_bytes(source, str(source))
    image = reduced(image, config, name_of(row))
    captions = [" ".join(text.split()) for text in as_list(captions_of(row))]
    if all(map(is_blank, captions)):
        raise BadSample(f"{name_of(row)}: no caption")
    about = {name: plain(row[name]) for name in row if name not in ("image", "caption")}
    if not isinstance(row["image"], bytes):
        about["path"] = row["image"]
    if len(captions) > 1:
        about["captions"] = captions
    return {
        image_ending(image, name_of(row)): image,
        "txt": "\n".join(captions).encode(),
        "json": clean_surrogates(strict_json(about, ensure_ascii=False)).encode(),
    }


def samples(
    rows: Sequence[dict], numbers: range, config: Config, complaints: list[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard; what cannot be packed is noted in `complaints`."""
    for number in numbers:
        try:
            yield f"{number:09d}", members_of(rows[number], config)
        except BadSample as error:
            complaints.append(str(error))


def pack_shard(shard: int, config: Config, state: str) -> tuple[int, list[str]]:
    """Write one shard; returns its number of samples and what could not be packed."""
    rows = open_rows(config)
    numbers = numbers_of(shard, rows, config)
    made_of = state_of_shard(shard, rows, config, state)
    target = shard_path(config.target, shard)
    complaints: list[str] = []
    count = write_shard(target, samples(rows, numbers, config, complaints))
    about = {"count": len(numbers), "failed": len(complaints), "errors": complaints[:SHOWN]}
    sizes = sizes_of(config.target, [target])
    write_statistics(target, count, **about, made_of=made_of, bytes=sizes)
    return count, complaints


def numbers_of(shard: int, rows: Sequence[dict], config: Config) -> range:
    """Which rows a shard holds."""
    start = shard * config.samples_per_shard
    return range(start, min(start + config.samples_per_shard, len(rows)))


def state_of(config: Config) -> str:
    """Changes with the data and with every setting that shapes the shards."""
    state = address_state(config.data)
    return digest(config.data, state, config.samples_per_shard, config.resize, config.quality)


def state_of_shard(shard: int, rows: Sequence[dict], config: Config, state: str) -> str:
    """Changes with `state_of` and with the files of the shard's images, where they are not in the
    data themselves."""
    if not isinstance(rows, Records):
        return state
    return pixels_digest(
        state, state_of_entries(rows, numbers_of(shard, rows, config), config.image_root)
    )


def is_packed(shard: int, rows: Sequence[dict], config: Config, state: str) -> bool:
    """Whether a shard is there, whole, of the same data, images and settings."""
    target = shard_path(config.target, shard)
    try:
        done = read_json(statistics_file(target), dict)
    except UserError:  # missing or damaged: packed again
        return False
    if not (target.is_file() and have_sizes(config.target, done.get("bytes", {}))):
        return False
    return done.get("made_of") == state_of_shard(shard, rows, config, state)


def number_of_shards(rows: Sequence[dict], config: Config) -> int:
    """How many shards the data become."""
    return -(-len(rows) // config.samples_per_shard)


def pack(config: Config) -> dict[str, int]:
    """Write the shards of this task's range that are not there; returns what was done."""
    from tqdm import tqdm

    rows = open_rows(config)
    total = number_of_shards(rows, config)
    state = state_of(config)
    check_folder(config.target, total)
    make_folder(config.target, "--target")
    own = own_range(config.sharing, total)
    todo = [shard for shard in own if not is_packed(shard, rows, config, state)]
    if again := sum(shard_path(config.target, shard).exists() for shard in todo):
        why = "damaged or of other data, images or settings"
        print(f"{config.target}: {again} shards there are {why}: replacing them", file=sys.stderr)
    done = {"shards": len(own), "kept": len(own) - len(todo), "samples": 0, "failed": 0}
    work = partial(pack_shard, config=config, state=state)
    results = in_processes(work, todo, config.workers)
    for count, complaints in tqdm(results, total=len(todo), unit="shard", disable=None):
        done["samples"] += count
        done["failed"] += len(complaints)
        for complaint in complaints[:SHOWN]:
            print(complaint, file=sys.stderr)
    if todo and not done["samples"]:
        raise UserError(f"{config.data}: none of its images can be read below {config.image_root}")
    return done


def merge(config: Config) -> dict[str, int]:
    """What all shards hold together. UserError names the ranges that are missing."""
    rows = open_rows(config)
    total = number_of_shards(rows, config)
    state = state_of(config)
    done = [is_packed(shard, rows, config, state) for shard in range(total)]
    need_all(done, str(config.target), "shards")
    files = [statistics_file(shard_path(config.target, shard)) for shard in range(total)]
    counts = [read_json(file, dict) for file in files]
    samples = sum(count["successes"] for count in counts)
    failed = sum(count["failed"] for count in counts)
    return {"shards": total, "samples": samples, "failed": failed}


def main(config: Config) -> None:
    check_folder_option(config.target, "--target")
    if config.sharing.slurm:
        total = number_of_shards(open_rows(config), config)
        check_folder(config.target, total)
        submit_array(config.sharing, total, config.target)
        return
    print(json.dumps(merge(config) if config.sharing.merge else pack(config)))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
