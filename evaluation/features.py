"""Features of a whole data set: computed once by all processes together, kept on disk, read through
the page cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from base import distributed
from base.arrays import map_array, reserve_array
from base.distributed import World
from base.errors import UserError, no_such_class
from base.reading import read_json
from base.writing import (
    file_errors,
    remove_leftovers,
    replace_synced,
    temporary_beside,
    write_json,
)
from evaluation.predict import check_finite, progress


class Bank(NamedTuple):
    """Features float32 [N,D], memory-mapped, and labels int64 [N] of a data set; damages: as of
    `EvalLoader.damages`, of the images when they were read."""

    features: np.ndarray
    labels: Tensor
    damages: Mapping[str, int] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.labels)

    def check_labels(self, count: int, name: str) -> None:
        """UserError where a label of the data set `name` is beyond `count` classes, which may be
        others than when the features were kept."""
        last = int(self.labels.max())
        if last >= count:
            raise no_such_class(name, last, count)

    def rows(self, first: int, last: int, device: torch.device) -> Tensor:
        """Features float32 [last-first,D] on `device`."""
        if isinstance(self.features, np.memmap):
            # read, because mapped pages would count as this process's memory
            width = self.features.shape[1]
            start = self.features.offset + first * width * self.features.itemsize
            part = np.fromfile(
                self.features.filename, self.features.dtype, (last - first) * width, offset=start
            )
            return torch.from_numpy(part.reshape(-1, width)).to(device)
        return torch.from_numpy(self.features[first:last]).to(device)

    def unit(self, first: int, last: int, device: torch.device) -> Tensor:
        """The same, each of length 1."""
        return torch.nn.functional.normalize(self.rows(first, last, device), dim=1)


def feature_bank(
    encode: Callable[[Tensor], Tensor],
    batches: Callable,
    own: Sequence[int],
    total: int,
    width: int,
    path: Path,
    world: World,
) -> Bank:
    """The bank stored at `path`.npy, else made by all processes, each writing the rows `own` of one
    file.

    encode: images on `world.device` -> features [B,width]. batches(): those of `own`, in order,
    with image [B,...] and labels [B,1]: a dataset.loading.eval.EvalLoader. The folder must be one
    that all processes share; of several runs that make the same bank, each writes files of its own.
    Raises UserError for images with several labels, and where a feature is not finite.
    """
    features = path.with_suffix(".npy")
    labels = path.with_suffix(".labels.npy")
    done = path.with_suffix(".json")
    damages = distributed.on_main(partial(_stored, features, labels, done, total, width))
    if damages is None:
        totals = distributed.gather_objects(total)
        distributed.check_same_total(max(totals), min(totals))

        def begin() -> list[Path]:
            remove_leftovers(path.parent)
            unfinished = [temporary_beside(features), temporary_beside(labels)]
            with file_errors(features, "name another --cache, or make room"):
                path.parent.mkdir(parents=True, exist_ok=True)
                reserve_array(unfinished[1], "<i8", (total,))
                reserve_array(unfinished[0], "<f4", (total, width))
            return unfinished

        def finish() -> None:
            for file, target in zip(unfinished, (features, labels), strict=True):
                replace_synced(file, target)
            write_json(done, {"images": total, "width": width, "damages": damages})

        unfinished = distributed.on_main(begin)
        loader = batches()
        _fill(encode, loader, own, unfinished, world)
        damages = loader.damages()  # waits for all
        distributed.on_main(finish, share=False)
    return Bank(np.load(features, mmap_mode="r"), torch.from_numpy(np.load(labels)), damages)


def damages_of(banks: Mapping[str, Bank]) -> dict[str, int]:
    """Damaged images of every split for the metrics: `test`'s under their names, those of others
    with the split before it, such as `train_unreadable_images`."""
    counts = {}
    for split, bank in banks.items():
        for kind, count in bank.damages.items():
            counts[kind if split == "test" else f"{split}_{kind}"] = count
    return counts


def _stored(features: Path, labels: Path, done: Path, total: int, width: int) -> dict | None:
    """`damages` of a finished bank of this size; None where there is none, or a damaged one, which
    is made again."""
    again = "it is made again"
    try:
        damages = read_json(done, dict, again).get("damages", {})  # before, none were kept
        found = [map_array(file, again) for file in (features, labels)]
    except UserError:
        return None
    kinds = [(array.shape, array.dtype.str) for array in found]
    whole = kinds == [((total, width), "<f4"), ((total,), "<i8")]
    return damages if whole and isinstance(damages, dict) else None


def _fill(
    encode, batches: Iterable[dict], own: Sequence[int], files: Sequence[Path], world: World
) -> None:
    """Write the rows `own`. What one process cannot take is raised on every one: it reads to the
    end, where all meet."""
    features, labels = (np.load(file, mmap_mode="r+") for file in files)
    start = 0
    fault = None
    for batch in progress(batches, "features", world):
        rows = list(own[start : start + len(batch["image"])])
        start += len(rows)
        if fault is not None:
            continue
        try:
            found = _features(encode, batch, world)
        except UserError as error:
            if world.size == 1:
                raise
            fault = str(error)
            continue
        features[rows], labels[rows] = found.numpy(), batch["labels"][:, 0].numpy()
    for found in distributed.gather_objects(fault):
        if found is not None:
            raise UserError(found)
    features.flush()
    labels.flush()


def _features(encode, batch: dict, world: World) -> Tensor:
    if batch["labels"].shape[1] != 1:
        raise UserError(
            "kNN and linear probe compare single labels: give a data set with one label an image"
        )
    found = encode(batch["image"].to(world.device, non_blocking=True)).float().cpu()
    check_finite(found, "features")
    return found
