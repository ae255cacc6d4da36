"""Image-caption collections for dual encoders: YFCC15M, CC3M, CC12M, COCO, RedCaps and plain pairs,
as one format.

Whatever the collection, its metadata becomes JSON lines {image: path below the root, caption:
[texts]} once, which `Records` maps into memory: all loader workers of a machine share one copy, of
15 million samples too. A path may lead into a zip file: `images/00/001.zip/007.jpg`.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import default_collate

from base.caches import cached_path
from base.distributed import on_main, rank_0_first
from base.errors import BadSample, UserError, brief, unknown
from base.image_names import check_fetched
from base.knobs import knob
from base.names import name_of
from base.reading import first_letter, read_json
from base.text import as_list, id_text, is_blank
from dataset.images.clip import ImageViews
from dataset.loading.stream import RecordSource
from dataset.sources.cached_tables import made_once
from dataset.sources.left_out import LeftOut
from dataset.sources.records import Records, published_remedy
from dataset.sources.shards import shard_sources
from dataset.sources.tables import is_table
from dataset.tasks.record import captions_of, image_of, weights_of
from dataset.text.augment import TextViews
from dataset.text.bpe import ClipTokenizer

SPLIT_OF_2014 = re.compile("COCO_([a-z]+2014)_")  # of COCO's images of 2014
KARPATHY = (
    "expected Karpathy's dataset_coco.json or dataset_flickr30k.json, whose images have filename, "
    "split and sentences with raw"
)


# ---- metadata
def caption_records(
    kind: str, metadata: str | Path, read_plain: Callable[[Path], object]
) -> Records:
    """The samples of a collection: records {image, caption: [texts]}.

    kind: one of FORMATS. metadata: the file the collection comes with, or what
    scripts/data/convert_metadata.py made of it (JSON or JSON lines with `image` and `caption`), or
    a table or folder of `dataset.sources.tables`, whatever the kind. Other files are converted at the first use,
    into the cache of `Records`. read_plain: reads pickles and .npy object arrays without running
    what is in them.
    """
    if is_table(metadata):
        return Records(metadata)
    path = Path(metadata)
    if not path.is_file():
        raise UserError(
            f"metadata {path}: no such file; give the file that belongs to --dataset {kind}"
        )
    if kind == "pairs" or path.suffix.lower() == ".jsonl":
        return Records(path)
    rows = partial(metadata_rows, kind, path, read_plain)
    return Records(made_once(cached_path(path, ".jsonl", kind), path, rows))


def metadata_rows(
    kind: str,
    path: Path,
    read_plain: Callable[[Path], object],
    left_out: LeftOut | None = None,
) -> Iterator[dict]:
    """`{image, caption: [texts]}` of every usable entry of a collection's own metadata file; the
    others go to `left_out`. UserError names a bad entry where there are too many."""
    left_out = left_out or LeftOut(path)
    if kind not in FORMATS:
        raise unknown("dataset", kind, FORMATS)
    read, convert = FORMATS[kind]
    entries = read_plain(path) if read is None else read(path)
    if isinstance(entries, str | bytes | dict) or not hasattr(entries, "__iter__"):
        raise UserError(f"{path}: expected a list of entries of {kind}, found {brief(entries)}")
    empty = 0
    number = -1
    for number, entry in enumerate(entries):
        left_out.total += 1
        try:
            row = convert(entry)
            row["caption"] = [text for text in row["caption"] if text is not None]
            if type(row["image"]) is not str or not all(
                type(text) is str for text in row["caption"]
            ):
                raise TypeError
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            where = f"{path}, entry {number} (the first is 0)"
            left_out.add(f"{where}: {brief(entry)} is no entry of {kind}")
            continue
        if row["caption"]:
            yield row
        else:
            empty += 1
    left_out.check()
    if left_out.total == empty:
        raise UserError(f"{path}: no entry with a caption; name the metadata of {kind}")
    if empty:
        message = f"{path}: {empty:,} of {number + 1:,} entries have no caption and are left out"
        warnings.warn(message, stacklevel=2)


def yfcc_row(entry: Sequence) -> dict:
    """(index, title, description): the image is member FGH.jpg of images/AB/CDE.zip for the index
    ABCDEFGH."""
    index, *texts = entry
    line = int(id_text(index))
    if not 0 <= line < 10**8:
        raise ValueError(f"{line} is no line of YFCC100M")
    digits = f"{line:08d}"
    texts = [text for text in texts[:2] if text] or [""]
    return {"image": f"images/{digits[:2]}/{digits[2:5]}.zip/{digits[5:]}.jpg", "caption": texts}


def cc_row(entry: dict, name: str) -> dict:
    """Of CC3M and CC12M, which call the image's name otherwise."""
    return {"image": _image_name(entry[name]), "caption": _texts(entry["captions"])}


def _image_name(value: object) -> str:
    """A file's name as it is; a number as its text. Raises TypeError for None, NaN and others."""
    return value if isinstance(value, str) else id_text(value)


def _texts(captions: object) -> list[str]:
    """A list or array of texts as a list, one text as a list of one."""
    if isinstance(captions, str):
        return [captions]
    return list(captions.tolist() if hasattr(captions, "tolist") else captions)


def coco_entries(path: Path) -> Iterator[dict]:
    """Captions of COCO, grouped by image."""
    yield from coco_rows(path, _load_json(path, "images", "annotations"))


def coco_rows(path: Path, content: dict) -> Iterator[dict]:
    """{image, caption: [texts]} of COCO's captions. The folder is the list's split,
    captions_train2017.json -> train2017, or that of the image's name, COCO_val2014_... -> val2014.
    """
    listed = path.stem.startswith("captions_") and path.stem.removeprefix("captions_")
    try:
        named = [image for image in content["images"] if image.get("id") is not None]
        names = {id_text(image["id"]): image.get("file_name") for image in named}
        captions: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            number = id_text(annotation["image_id"])
            captions.setdefault(number, []).append(annotation["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: not COCO's captions ({fault}); name captions_*.json, whose annotations have "
            "image_id and caption"
        ) from None
    for number, texts in captions.items():
        file = names.get(number) or f"{number:0>12}.jpg"
        split = SPLIT_OF_2014.match(str(file))
        folder = listed or (split[1] if split else "train2017")
        yield {"image": f"{folder}/{file}", "caption": texts}


def karpathy_entries(content: dict, split: str, path: Path) -> Iterator[dict]:
    """The images of a split of what Karpathy's dataset_coco.json or dataset_flickr30k.json holds:
    {image: path, filename, id, caption: [texts], caption_ids}; ids are None where the file has none.
    UserError names `path`."""
    images = content.get("images")
    if not isinstance(images, list):
        raise UserError(f"{path}: {published_remedy(content) or KARPATHY}")
    for number, entry in enumerate(images):
        try:
            row = _karpathy_row(entry) if entry["split"] == split else None
        except (KeyError, TypeError, AttributeError) as error:
            fault = f"no {error}" if isinstance(error, KeyError) else str(error)
            where = f"{path}, image {number} (the first is 0)"
            raise UserError(f"{where}: {fault}; {KARPATHY}") from None
        if row:
            yield row


def _karpathy_row(entry: dict) -> dict:
    name = entry["filename"]
    if type(name) is not str or type(entry["sentences"]) is not list:
        raise TypeError("filename must be a text and sentences a list")
    return {
        "image": f"{entry.get('filepath') or ''}/{name}".lstrip("/"),
        "filename": name,
        "id": entry.get("imgid"),
        "caption": [_raw(sentence) for sentence in entry["sentences"]],
        "caption_ids": [sentence.get("sentid") for sentence in entry["sentences"]],
    }


def _raw(sentence: dict) -> str:
    if type(sentence["raw"]) is not str:
        raise TypeError(f"raw of {brief(sentence)} is no text")
    return sentence["raw"]


def redcaps_entries(path: Path) -> Iterable[dict]:
    """A list of all subreddits, or the published file of one."""
    if first_letter(path) == b"[":
        return Records(path, required=("image_id", "subreddit", "caption"))
    return _load_json(path, "annotations")["annotations"]


def redcaps_row(entry: dict) -> dict:
    folder, name = _image_name(entry["subreddit"]), _image_name(entry["image_id"])
    return {"image": f"{folder}/{name}.jpg", "caption": [entry["caption"]]}


def _load_json(path: Path, *keys: str) -> dict:
    expected = f"expected an object with the lists {' and '.join(keys)}"
    content = read_json(path, dict, expected)
    if not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: {expected}")
    return content


# collection -> (how its file is read, None: a pickle or .npy array of plain data; how an entry
# becomes a row)
FORMATS: dict[str, tuple[Callable[[Path], Iterable] | None, Callable[..., dict]]] = {
    "yfcc15m": (None, yfcc_row),
    "cc3m": (None, partial(cc_row, name="image_id")),
    "cc12m": (None, partial(cc_row, name="image_name")),
    "coco": (coco_entries, dict),
    "redcaps": (redcaps_entries, redcaps_row),
    "pairs": (Records, lambda entry: {**entry, "caption": as_list(entry["caption"])}),
}


MERGED = ("cc3m", "cc12m", "yfcc15m")  # parts of merged_opendata, in this order
DATASETS = (*FORMATS, "merged_opendata", "wds")


@dataclass
class CaptionOptions:
    """Image-caption pairs; names and defaults are clip-rocket's."""

    dataset: str = knob("yfcc15m", "collection; wds: --shards alone", choices=DATASETS)
    root: str = knob(
        "datasets/yfcc100m",
        "folder that paths of images start from; merged_opendata: three, joined by ---",
        aliases=("image_root", "data_root"),
    )
    metadata: str = knob("datasets/yfcc15m_v1/yfcc15m.pkl", "samples: .pkl, .npy, .json or .jsonl")
    shards: list[str] = knob([], "WebDataset shards beside or instead: paths, s3:// or gs:// URLs")
    bpe_path: Path | None = knob(
        None, "BPE merges; none = CLIP's; trained = of the captions", rare=True
    )
    tokenizer: str = knob(
        "bert-base-uncased",
        "ALIGN's BERT: folder, vocab.txt, hub name, or trained",
        methods="ALIGN",
    )
    text_lengths: list[int] = knob(
        [], "lengths that texts are padded to; none = multiples of 8", rare=True, low=1
    )


def collections_of(
    dataset: str, metadata: str, root: str, shards: Sequence[str] = ()
) -> list[tuple[str, str, str]]:
    """(kind, metadata file, root folder) of every collection in a data set of `DATASETS`.

    merged_opendata has three, whose files and roots are joined by `---`; wds, which is shards
    alone, has none.
    """
    if dataset == "wds":
        if not shards:
            raise UserError("dataset wds: name the WebDataset shards with --shards")
        return []
    if dataset != "merged_opendata":
        return [(dataset, metadata, root)]
    files = metadata.split("---")
    roots = root.split("---")
    if not len(files) == len(roots) == len(MERGED):
        raise UserError(
            f"{dataset}: give metadata and root of {', '.join(MERGED)}, in this order, joined by ---"
        )
    return list(zip(MERGED, files, roots, strict=True))


def pair_sources(
    data,
    image_views: ImageViews,
    text_views: TextViews,
    read_plain: Callable[[Path], object],
) -> list:
    """The sources of a stream of `ImageTextPair`: collections, then WebDataset shards.

    data: CaptionOptions that have `shuffle_buffer` and `samples` too (see `shard_sources`). read_plain: see `caption_records`. Collective: rank 0 converts the metadata
    and tries the first images. Raises UserError.
    """
    sources: list = []
    for kind, file, folder in collections_of(data.dataset, data.metadata, data.root, data.shards):
        with rank_0_first():
            records = caption_records(kind, file, read_plain)
        on_main(partial(check_images, folder, records))
        pair = ImageTextPair(image_views, text_views, folder)
        sources.append(RecordSource(records, pair, kind))
    pair = ImageTextPair(image_views, text_views)
    sources += shard_sources(data.shards, pair, data.shuffle_buffer, data.samples)
    return sources


# ---- images
def check_images(root: str | Path, records: Sequence[dict], tries: int = 20) -> None:
    """UserError when none of the first images can be read below `root`."""
    root = Path(root)
    complaints = []
    check_fetched(record["image"] for record in islice(records, tries))
    for record in islice(records, tries):
        try:
            image_of(record, root)
            return
        except BadSample as error:
            complaints.append(str(error))
    if not root.is_dir():  # which absolute paths do not need
        raise UserError(
            f"root {root}: no such folder; set --root to the folder that the metadata's paths start from"
        )
    raise UserError(
        f"root {root}: none of the first {len(complaints)} images can be read, e.g. {complaints[0]}; "
        "set --root to the folder that the metadata's paths start from, or use the metadata of these files"
    )


# ---- samples and batches
class ImageTextPair:
    """Makes a sample of a record with `image` (path, or encoded bytes with `key`) and `caption`
    (text or texts).

    Sample: `image` uint8 [3,S,S]; `image_local` uint8 [A,3,s,s] if there are local views; `texts`,
    one or more str.
    """

    def __init__(self, image_views: ImageViews, text_views: TextViews, root: str | Path = ""):
        self.image_views = image_views
        self.text_views = text_views
        self.root = Path(root)

    def __call__(self, record: dict) -> dict:
        captions = as_list(captions_of(record))
        if all(map(is_blank, captions)):
            raise BadSample(f"{name_of(record)}: no caption, only blanks")
        view, local = self.image_views(image_of(record, self.root))
        sample = {"image": view, "texts": self.text_views(captions, weights_of(record, captions))}
        return sample if local is None else sample | {"image_local": local}


class CaptionCollate:
    """image uint8 [B,3,S,S] · image_local uint8 [B,A,3,s,s] if samples have it · text_ids int64
    [B,1+A,L].

    lengths: the allowed L (see ClipTokenizer); few of them, where the network is compiled.
    """

    def __init__(self, tokenizer: ClipTokenizer, lengths: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.lengths = lengths

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {
            key: default_collate([sample[key] for sample in samples])
            for key in samples[0]
            if key != "texts"
        }
        texts = [text for sample in samples for text in sample["texts"]]
        batch["text_ids"] = self.tokenizer(texts, self.lengths).unflatten(0, (len(samples), -1))
        return batch
