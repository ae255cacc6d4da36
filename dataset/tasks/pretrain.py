"""Image-text pairs for pre-training with ALBEF and SIMLA: one sample, and the batch made of
many."""

import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

from base import distributed
from base.arrays import map_array, reserve_array
from base.bars import progress_bar
from base.caches import image_state, one_builder, weights_digest
from base.distributed import ALONE, World
from base.errors import BadSample, UserError
from base.pixels import pixels_digest
from base.writing import atomic_write, replace_synced
from dataset.images.albef import PretrainTransform
from dataset.images.block_mask import BlockMask
from dataset.images.decode import reading
from dataset.loading.eval import EvalLoader
from dataset.sources.records import Records
from dataset.tasks.record import captions_of, image_of, weights_of
from dataset.text.wordpiece import Tokenizer, choose_caption, mask_tokens, mlm_targets

KEY_LABEL, KEY_SIZE = b"quintet codes of ", 20  # behind the array in a file of visual codes
UNSAVED = 50  # batches of codes after which they are written to the disk
SAMPLED = 1000  # images whose size and time of change are part of that key
OTHER_CODES = "made of other annotations, images, sizes or tokenizer weights; making it again"
KEYLESS = (
    "visual codes without a key of what they were made of; they are taken as they are. Delete the "
    "file where annotations, images or tokenizer have changed"
)


class PretrainPair:
    """Makes a sample of a record with `image` (path or encoded bytes) and `caption` (text or list
    of texts).

    image_root: folder that relative image paths start from. patch_mask: draws the patches to
    predict (SIMLA). codes:
    visual codes computed ahead, which need a transform with `fixed_geometry`.
    """

    def __init__(
        self,
        transform: PretrainTransform,
        image_root: str | Path = "",
        patch_mask: BlockMask | None = None,
        codes: "CodeCache | None" = None,
        max_words: int = 30,
    ):
        if codes is not None and not transform.fixed_geometry:
            raise UserError(
                "a cache of visual codes needs fixed_geometry: labels of another crop would be wrong"
            )
        self.transform = transform
        self.image_root = Path(image_root)
        self.patch_mask = patch_mask
        self.codes = codes
        self.max_words = max_words

    def __call__(self, record: dict) -> dict:
        """`caption` str, `image` uint8 [3,H,W], and as configured `token_image`, `patch_mask`,
        `visual_codes`."""
        captions = captions_of(record)
        weights = weights_of(record, captions)
        sample = {"caption": choose_caption(captions, self.max_words, weights)}
        sample["image"], token_image = self.transform(image_of(record, self.image_root))
        if token_image is not None:
            sample["token_image"] = token_image
        if self.codes is not None:
            sample["visual_codes"] = self.codes[record["index"]]
        if self.patch_mask is not None:
            sample["patch_mask"] = self.patch_mask().flatten()
        return sample


class PretrainCollate:
    """Makes the pre-training batch of a list of samples.

    image uint8 [B,3,H,W] · text_ids int64, text_mask bool, mlm_ids int64 [B,L] · mlm_positions,
    mlm_labels int64 [K] (see text.mlm_targets) · as the samples have them: token_image uint8
    [B,3,h,w], visual_codes int64 [B,N], patch_mask bool [B,N]. Token masking draws from torch's
    global generator.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 25, mlm_probability: float = 0.15):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.mlm_probability = mlm_probability

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer
        captions = [sample["caption"] for sample in samples]
        # default_collate stacks straight into the memory shared with the parent process, unlike
        # torch.stack
        batch = {
            key: default_collate([sample[key] for sample in samples])
            for key in samples[0]
            if key != "caption"
        }
        batch["text_ids"], batch["text_mask"] = tokenizer(captions, self.max_tokens)
        never = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
        batch["mlm_ids"], labels = mask_tokens(
            batch["text_ids"], self.mlm_probability, tokenizer.mask_id, tokenizer.vocab_size, never
        )
        batch["mlm_positions"], batch["mlm_labels"] = mlm_targets(labels)
        return batch


class CodeCache:
    """Visual codes computed ahead: an .npy file of integers [records, N], memory-mapped; row i
    belongs to record i."""

    def __init__(self, path: str | Path, records: int):
        self.codes = map_array(path, "compute the visual codes again")
        if self.codes.ndim != 2 or len(self.codes) != records or self.codes.dtype.kind not in "iu":
            raise UserError(
                f"{path}: {self.codes.dtype} {list(self.codes.shape)} does not fit {records} records of integer codes; "
                "compute the codes for these annotations"
            )
        self.path = path
        self.records = records

    def __getitem__(self, index: int) -> torch.Tensor:
        """int64 [N]"""
        return torch.from_numpy(self.codes[index].astype("int64"))

    def __reduce__(self):
        return CodeCache, (self.path, self.records)


def write_codes(
    path: str | Path,
    records,
    build: PretrainPair,
    image_tokenizer,
    batch_size: int = 64,
    workers: int = 0,
    world: World = ALONE,
    exif: bool = False,
) -> None:
    """Compute the visual codes of all records once and store them for `CodeCache`; a complete file
    is kept as it is.

    All processes take part, each with `workers` loader processes, and wait for each other without a
    time limit: a collective. What an interrupted run has computed is kept and not computed again.
    build makes samples with `token_image`; image_tokenizer maps uint8 [B,3,h,w] to codes
    [B,h/r,w/r]. An unreadable image gets the codes of a grey one: it is never used, because reading
    it fails in training, too. exif: images are turned as in the training. The file ends with a key
    of what it was made of; another key means other annotations, images, sizes or weights: then it
    is made again.
    """
    path = Path(path)
    if not len(records):
        raise UserError(
            "code_cache needs train_file: shards have no fixed numbering of their samples"
        )
    make_key = partial(_key_to_make, path, records, build, image_tokenizer, exif)
    key = distributed.on_main(make_key, patient=True)
    if key is None:
        return
    table = _CodeTable(path, key, len(records), batch_size)
    grey = _grey(build.transform.token_resolution).to(world.device)[None]
    width = image_tokenizer.codes(grey).flatten(1).shape[1]
    distributed.on_main(partial(table.create, width), share=False)
    _fill_codes(table, _TokenImage(records, build, exif), image_tokenizer, workers, world)
    distributed.wait_for_all()
    distributed.on_main(table.finish, share=False)


def _key_to_make(
    path: Path, records, build: PretrainPair, image_tokenizer, exif: bool
) -> str | None:
    """The key of the codes to compute; None where the file is there already."""
    if path.exists() and not path.is_file():
        raise UserError(f"code_cache {path}: not a regular file; name another")
    key = codes_key(records, build, image_tokenizer, exif)
    if path.exists():
        stored = stored_key(path)
        if stored == key:
            for left in path.parent.glob(f".{path.name}.{key}-*.done"):  # by a kill
                left.unlink(missing_ok=True)
            return None
        if stored is None:
            warnings.warn(f"{path}: {KEYLESS}", stacklevel=4)
            return None
        warnings.warn(f"{path}: {OTHER_CODES}", stacklevel=4)
    return key


def codes_key(records, build: PretrainPair, image_tokenizer, exif: bool = False) -> str:
    """What visual codes depend on: the list and its order, images, how they are turned, sizes and
    the tokenizer.

    The images are looked at by size and time of change, at most SAMPLED of them, evenly spread.
    """
    step = max(1, len(records) // SAMPLED)
    named = (build.image_root / records[index]["image"] for index in range(0, len(records), step))
    # size and time of change: copies elsewhere have the same codes
    states = [state and state[1:3] for state in map(image_state, named)]
    listed = records.content() if isinstance(records, Records) else repr(list(records))
    sizes = (build.transform.resolution, build.transform.token_resolution)
    turned = ["exif"] if exif else []  # images as they are stored have the key of earlier versions
    weights = weights_digest(image_tokenizer.state_dict())
    return pixels_digest(listed, states, sizes, weights, *turned)


def stored_key(path: Path) -> str | None:
    """The key at the end of a file of visual codes; None where it has none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(KEY_LABEL) - KEY_SIZE))
        end = file.read()
    return end[len(KEY_LABEL) :].decode("ascii", "replace") if end.startswith(KEY_LABEL) else None


class _CodeTable:
    """A file of codes int32 [R,N] in the making and, beside it, which batches of rows are done.

    Both lie beside `path` under a name with the key of what they are made of.
    """

    def __init__(self, path: Path, key: str, records: int, batch_size: int):
        self.path = path
        self.key = key
        self.records = records
        self.batch_size = batch_size
        self.partial = path.with_name(f".{path.name}.{key}-{batch_size}.partial")
        self.done = path.with_name(f".{path.name}.{key}-{batch_size}.done")
        self.batches = -(-records // batch_size)

    def create(self, width: int) -> None:
        """Make both, where an interrupted run has not left them."""
        if self._is_usable(width):
            return
        with atomic_write(self.done) as temporary:
            temporary.write_bytes(bytes(self.batches))
        with atomic_write(self.partial) as temporary:
            reserve_array(temporary, "<i4", (self.records, width))

    def _is_usable(self, width: int) -> bool:
        """Whether both files are there and of the right size."""
        if not self.done.is_file() or self.done.stat().st_size != self.batches:
            return False
        try:
            codes = map_array(self.partial, "it is made again")
        except UserError:
            return False
        return codes.shape == (self.records, width) and codes.dtype == np.int32

    def finish(self) -> None:
        """Write the key behind the table and give it its name, unless another run that makes the
        same table has."""
        with one_builder(self.done):
            if self.partial.exists():
                if stored_key(self.partial) != self.key:
                    with self.partial.open("ab") as file:
                        file.write(KEY_LABEL + self.key.encode())
                replace_synced(self.partial, self.path)
            self.done.unlink(missing_ok=True)


def _fill_codes(
    table: _CodeTable, inputs: "_TokenImage", image_tokenizer, workers: int, world: World
) -> None:
    """Compute the batches of this process that are not done yet."""
    codes = map_array(table.partial, "remove it", "r+")
    done = np.memmap(table.done, np.uint8, mode="r+")
    own = [batch for batch in range(world.rank, table.batches, world.size) if not done[batch]]
    size = table.batch_size
    rows = [range(batch * size, min((batch + 1) * size, table.records)) for batch in own]
    wanted = [row for part in rows for row in part]
    images = EvalLoader(inputs.load, wanted, batch_size=size, collate=torch.stack, workers=workers)
    unsaved = []
    bar = progress_bar(images, desc="visual codes", unit="batch", disable=not world.is_main)
    for batch, part, image in zip(own, rows, bar, strict=True):
        found = image_tokenizer.codes(image.to(world.device)).flatten(1).cpu().numpy()
        codes[part.start : part.stop] = found
        unsaved.append(batch)
        if len(unsaved) == UNSAVED or batch == own[-1]:
            codes.flush()
            done[unsaved] = 1
            done.flush()
            unsaved = []


class _TokenImage:
    """The image tokenizer's input of one record, uint8 [3,h,w]; grey where it is unreadable."""

    def __init__(self, records, build: PretrainPair, exif: bool):
        self.records = records
        self.build = build
        self.exif = exif

    def load(self, index: int) -> torch.Tensor:
        transform = self.build.transform
        try:
            with reading(self.exif):
                return transform(image_of(self.records[index], self.build.image_root))[1]
        except BadSample:
            return _grey(transform.token_resolution)


def _grey(side: int) -> torch.Tensor:
    return torch.full((3, side, side), 128, dtype=torch.uint8)
