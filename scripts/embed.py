"""Embeddings of images and captions by any dual encoder, or features by any image encoder.

    python scripts/embed.py --data 'shards/{00000..00099}.tar' --model open_clip/ViT-B-32 --checkpoint F
    torchrun --nproc_per_node=8 scripts/embed.py --data pairs.csv --image-root images --checkpoint output/main
    python scripts/embed.py --data imagenet/val --model timm/vit_base_patch16_224 --checkpoint F --texts false
    python scripts/embed.py --data shards/train --checkpoint F --slurm 16 --sbatch gpus-per-node=1 partition=gpu

Data is what scripts/data/pack.py and scripts/doctor.py take: shards, annotation files, tables, class
folders. Every shard, or PART entries of a list, becomes img_emb/img_emb_0000.npy and
text_emb/text_emb_0000.npy (a row a sample: unit embeddings, or features as they are), and
metadata/metadata_0000.parquet (key, image_path, caption, readable), the layout that clip-retrieval
reads. All processes work on each part together, the tasks of a Slurm job array (--slurm) on a range
of parts each; the numbers are the same on any number of them. Parts that are there, of the same
data and network, are kept.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval_knn
import eval_zeroshot
from base import distributed
from base.caches import digest, have_sizes, sizes_of
from base.distributed import World
from base.errors import BadSample, UserError
from base.names import name_of
from base.pixels import pixels_digest
from base.reading import read_json
from base.text import as_list, is_blank, lenient_text
from base.writing import atomic_write, check_folder_option, write_json
from dataset.health.survey import open_list
from dataset.images.clip import normalize, pixel_statistics
from dataset.images.decode import reading
from dataset.loading.eval import EvalLoader
from dataset.sources.records import state_of_entries
from dataset.sources.remote import state_of
from dataset.sources.shard_columns import columns_of, split_columns
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import list_shards
from dataset.tasks.classification import is_shards
from dataset.tasks.dual_inputs import image_side
from dataset.tasks.record import captions_of, image_of
from evaluation.predict import over_split
from evaluation.retrieval import units
from evaluation.zeroshot import embed_texts
from runtime.checkpoint import weights_file
from runtime.config.cli import knob, run_script, section
from runtime.config.from_checkpoint import description_of
from runtime.job_array import Sharing, need_all, own_range, submit_array
from runtime.options import EvaluationConfig
from runtime.run import evaluating

TEXTS = ("txt", "json")  # members of a sample that tell its captions
SHARED = ("model", "random_weights", "precision")  # options of the scripts that open networks


@dataclass
class Config(EvaluationConfig):
    """What to embed, and with what."""

    data: list[str] = knob([], "shards, annotation files, tables or class folders", required=True)
    root: Path = knob(Path("."), "folder that paths of images start from", aliases=("image_root",))
    out: Path = knob(Path("output/embeddings"), "folder to write to")
    checkpoint: Path | None = knob(None, "file or run directory; none = --model's own weights")
    model: str | None = knob(None, "open_clip/NAME:TAG, hf/NAME, timm/NAME; or a checkpoint's name")
    tokenizer: str | None = knob(
        None, "BPE merges, or ALIGN's vocabulary; none = the run's, else theirs"
    )
    texts: bool = knob(True, "embed captions too; false: an image encoder serves")
    score: str = knob("z", "which embedding: z, or h of the CL2L family; feats without texts")
    part: int = knob(10_000, "entries of a list in one part; a shard is one", low=1)
    half: bool = knob(True, "write float16")
    sharing: Sharing = section(Sharing, flat=True)


class BatchEmbedder(NamedTuple):
    """What embeds. images: uint8 or a library's inputs, on the device, -> embeddings by name;
    tokenize and texts: None without captions; signature: changes with the network."""

    model: torch.nn.Module
    view: Callable[[Tensor], Tensor]
    images: Callable[[Tensor], dict[str, Tensor]]
    tokenize: Callable[[Sequence[str]], Tensor] | None
    texts: Callable[[Tensor], dict[str, Tensor]] | None
    signature: str


class Part(NamedTuple):
    """Entries `start` to `stop` of a list, or (records None) a shard, opened when its turn comes."""

    data: str
    records: Sequence[dict] | None
    start: int = 0
    stop: int = 0


def dual_embedder(config: Config, world: World) -> BatchEmbedder:
    """Of images and captions."""
    options = {name: getattr(config, name) for name in SHARED}
    if config.checkpoint:
        options["checkpoint"] = weights_file(config.checkpoint)
    if config.tokenizer:
        options["bpe_path"] = Path(config.tokenizer)
        options["tokenizer"] = config.tokenizer
    encoder = eval_zeroshot.open_encoder(eval_zeroshot.Config(**options), world)
    opened, precision = encoder.opened, encoder.precision
    view, embed_image = image_side(opened, world.device)

    def images(image: Tensor) -> dict[str, Tensor]:
        with precision.autocast():
            return embed_image(image)

    def texts(text_ids: Tensor) -> dict[str, Tensor]:
        with precision.autocast():
            return opened.model.embed_text(text_ids)

    signature = digest(encoder.signature, opened.pixels)
    return BatchEmbedder(opened.model, view, images, opened.tokenize, texts, signature)


def image_embedder(config: Config, world: World) -> BatchEmbedder:
    """Of images alone: features as they are."""
    options = {name: getattr(config, name) for name in SHARED}
    encoder = eval_knn.load_encoder(eval_knn.Config(checkpoint=config.checkpoint, **options))
    encoder.choose(config.score if config.score != "z" else "feats")
    about = description_of(weights_file(config.checkpoint)) if config.checkpoint else {}
    view, in_words = eval_knn.view_of(encoder, about)
    encoder.to(world.device)
    autocast = eval_knn.Precision(config.precision, world.device).autocast
    statistics = pixel_statistics(world.device, encoder.pixels.mean, encoder.pixels.std)

    def images(image: Tensor) -> dict[str, Tensor]:
        with autocast():
            return {"z": encoder(image if encoder.view else normalize(image, statistics))}

    how = (in_words, encoder.pixels, config.score, config.precision, world.device.type)
    signature = digest(eval_knn.fingerprint(encoder), *how)
    return BatchEmbedder(encoder, view, images, None, None, signature)


def parts_of(data: str, size: int) -> list[Part]:
    """Shards one by one, lists in blocks."""
    if is_shards(data):
        return [Part(shard, None) for shard in list_shards(data)]
    records = open_list(data)
    starts = range(0, len(records), size)
    return [Part(data, records, start, min(start + size, len(records))) for start in starts]


def all_parts(config: Config) -> list[Part]:
    """Those of all data. UserError where the folder holds parts of others, which readers would take
    along."""
    parts = [part for data in config.data for part in parts_of(data, config.part)]
    names = part_names(len(parts))
    others = sorted({file.stem for file in (config.out / "parts").glob("*.json")} - {*names})
    if others:
        raise UserError(
            f"{config.out}: holds part {others[0]}, but this data has the parts {names[0]} to "
            f"{names[-1]}; write to another --out, or delete the folder"
        )
    return parts


def with_records(part: Part, error_budget: float) -> Part:
    """The part with its records; a shard is indexed by one process and read by all."""
    if part.records is not None:
        return part
    with distributed.rank_0_first():
        index = ShardIndex([part.data], part.data, error_budget).nonempty()
    return Part(part.data, index, 0, len(index))


def beside_image(records: Sequence[dict], number: int) -> dict:
    """A record without its image, which loader workers alone read where it lies in a tar; of one that
    lacks a named member the key."""
    own = isinstance(records, ShardIndex) and not columns_of(records.title)
    if not own or "txt" not in records.endings(number):
        try:
            return {**records[number], "index": number}
        except BadSample:
            return {"key": records.name(number)}
    endings = [ending for ending in TEXTS if ending in records.endings(number)]
    members = {ending: records.read(number, ending) for ending in endings}
    return {"key": records.name(number), "caption": lenient_text(members["txt"]), **members}


def first_caption(record: dict) -> str:
    """The first text beside an image that is not blank; empty where there is none."""
    try:
        return next((text for text in as_list(captions_of(record)) if not is_blank(text)), "")
    except BadSample:
        return ""


def image_path(row: dict, root: Path) -> str:
    """Where an image lies: the column that clip-retrieval shows results by. Of one that lies in a
    table itself the `url` that it came from, as it is."""
    image, url = row.get("image"), row.get("url")
    if isinstance(image, str | Path):
        return str(root / image)
    return url if isinstance(url, str) and url else name_of(row)


def image_of_part(
    part: Part, view: Callable[[Tensor], Tensor], root: Path, exif: bool, number: int
) -> dict:
    """An image of a part as the network sees it, and whether it could be read."""
    records, number = part.records, part.start + number
    if isinstance(records, ShardIndex):
        record = {"image": records.image(number), "key": records.name(number)}
    else:
        record = {**records[number], "index": number}
    with reading(exif, grey=True) as noticed:  # an unreadable image is a grey one
        image = view(image_of(record, root))
    return {"image": image, "readable": not noticed.unreadable}


def embed(part: Part, embedder: BatchEmbedder, config: Config, world: World) -> dict:
    """Embeddings [n,E] and columns of metadata of a part, the same on every process."""
    total = part.stop - part.start
    rows = [beside_image(part.records, number) for number in range(part.start, part.stop)]

    def predict(image: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
        found = choose(embedder.images(image), config.score).float()
        return F.normalize(found, dim=-1) if config.texts else found, readable

    own = [i for unit in units(total, config.batch_size, world) for i in unit]
    load = partial(image_of_part, part, embedder.view, config.root, config.exif)
    loader = EvalLoader(load, own, config.batch_size, default_collate, config.workers)
    images, readable = over_split(predict, loader, own, total, world, "images")
    if (~readable).sum() > config.error_budget * total:
        first = name_of(rows[int(readable.int().argmin())])
        raise UserError(
            f"{part.data}: {int((~readable).sum())} of {total} images are unreadable, such as "
            f"{first}; fix them, or raise --error-budget"
        )
    captions = [first_caption(row) for row in rows]
    result = {"image": images}
    if embedder.texts:
        size = {"world": world, "batch_size": config.batch_size}
        found = embed_texts(embedder.texts, embedder.tokenize, captions, **size)
        result["text"] = choose(found, config.score)
    result["metadata"] = {
        "key": [name_of(row) for row in rows],
        "image_path": [image_path(row, config.root) for row in rows],
        "caption": captions,
        "readable": readable.tolist(),
    }
    return result


def choose(found: dict[str, Tensor], score: str) -> Tensor:
    """The embedding that was asked for. UserError."""
    if score in found:
        return found[score]
    if len(found) == 1 and score in ("z", "feats"):
        return next(iter(found.values()))
    raise UserError(f"--score {score}: the network has {', '.join(found)}")


def write_part(name: str, found: dict, config: Config, key: str) -> None:
    """The files of a part; what says that it is whole goes first and comes last."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    part_file(name, config).unlink(missing_ok=True)
    written = [config.out / "metadata" / f"metadata_{name}.parquet"]
    for kind, folder in (("image", "img_emb"), ("text", "text_emb")):
        if kind in found:
            numbers = found[kind].to(torch.float16 if config.half else torch.float32).numpy()
            if config.half and np.isinf(numbers).any():
                raise UserError(
                    f"part {name}: {kind} embeddings have numbers that float16 does not hold; "
                    "add --half no"
                )
            target = config.out / folder / f"{folder}_{name}.npy"
            with atomic_write(target) as temporary, temporary.open("wb") as file:
                np.save(file, numbers)
            written.append(target)
    with atomic_write(written[0]) as temporary:
        parquet.write_table(pyarrow.table(found["metadata"]), temporary)
    about = {"key": key, "samples": len(found["image"]), "bytes": sizes_of(config.out, written)}
    write_json(part_file(name, config), about)


def part_names(count: int) -> list[str]:
    """0000, 0001 …: readers pair the files of the folders in alphabetical order."""
    digits = max(4, len(str(count - 1)))
    return [f"{number:0{digits}d}" for number in range(count)]


def part_file(name: str, config: Config) -> Path:
    """What says that a part is whole, and of what."""
    return config.out / "parts" / f"{name}.json"


def is_written(name: str, key: str, config: Config) -> bool:
    """Whether a part of the same data and network is there, with its files as they were written."""
    try:
        done = read_json(part_file(name, config), dict)
    except UserError:  # missing or damaged: made again
        return False
    return done.get("key") == key and have_sizes(config.out, done.get("bytes", {}))


def identity(part: Part, root: Path) -> str:
    """Changes with what the samples of a part are made of."""
    if part.records is None:
        name, query = split_columns(part.data)
        return digest(state_of(name), *([query] if query else []))
    return state_of_entries(part.records, range(part.start, part.stop), root)


def key_of(part: Part, embedder: BatchEmbedder, config: Config) -> str:
    """Changes with what a part is made of, the network and the settings: the same on every process."""
    about = partial(identity, part, config.root)
    what = (distributed.on_main(about), part.start, part.stop)
    how = (config.score, config.half, config.precision, config.batch_size, config.exif)
    return pixels_digest(embedder.signature, what, how)


def main(config: Config) -> None:
    check_folder_option(config.out, "--out")
    if config.sharing.slurm:
        if config.checkpoint:
            weights_file(config.checkpoint)  # says at once that it is missing
        submit_array(config.sharing, len(all_parts(config)), config.out)
        return
    world = distributed.init(config.device)
    embedder = (dual_embedder if config.texts else image_embedder)(config, world)
    with distributed.rank_0_first():
        parts = all_parts(config)
    if config.sharing.merge:
        merge(parts, embedder, config)
        return
    own = own_range(config.sharing, len(parts))
    names = part_names(len(parts))
    kept = 0
    with evaluating(embedder.model):
        for number in own:
            part, name = parts[number], names[number]
            key = key_of(part, embedder, config)
            if distributed.on_main(partial(is_written, name, key, config)):
                kept += 1
                continue
            part = with_records(part, config.error_budget)
            found = embed(part, embedder, config, world)
            distributed.on_main(partial(write_part, name, found, config, key), share=False)
            samples = f"{part.stop - part.start:,} samples"
            distributed.say(f"{number + 1} of {len(parts)}: {part.data}, {samples}")
    distributed.say(f"{config.out}: {len(own)} parts, {kept} of them kept")


def merge(parts: list[Part], embedder: BatchEmbedder, config: Config) -> None:
    """Say what all parts hold. UserError names the ranges that are missing."""
    keys = [key_of(part, embedder, config) for part in parts]
    names = part_names(len(parts))
    done = [is_written(name, key, config) for name, key in zip(names, keys, strict=True)]
    need_all(done, str(config.out), "parts")
    samples = sum(read_json(part_file(name, config), dict)["samples"] for name in names)
    distributed.say(f"{config.out}: {len(parts)} parts are whole, {samples:,} samples")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
