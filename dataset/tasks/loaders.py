"""Loaders from the options that scripts share (see runtime.config.fusion.FineTuneConfig)."""

from collections.abc import Callable, Sequence

import torch

from dataset.images.albef import TestTransform, TrainTransform
from dataset.images.randaugment import RandAugment
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import Stream, StreamLoader


def training_view(knobs) -> TrainTransform:
    """Crop, flips and augmentation by image_res, crop_scale, flip, augment_level and compat."""
    operations = RandAugment(2 if knobs.augment_level else 0, knobs.augment_level, knobs.compat)
    return TrainTransform(knobs.image_res, knobs.crop_scale, knobs.flip, operations)


def test_view(knobs) -> TestTransform:
    """The whole image at image_res."""
    return TestTransform(knobs.image_res)


def train_loader(
    sources: Sequence, collate: Callable, knobs, world, state: dict | None
) -> StreamLoader:
    """As `stream_loader`, of the fine-tuning scripts."""
    stream = Stream(sources, collate, exif=knobs.exif)
    return stream_loader(stream, knobs.batch_size_train, knobs, world, state)


def stream_loader(
    stream: Stream, batch_size: int, knobs, world, state: dict | None
) -> StreamLoader:
    """Endless batches of this process, from the position `state` on (see dataset.loading.stream)."""
    return StreamLoader(
        stream,
        batch_size,
        workers=knobs.workers,
        world=world,
        seed=knobs.seed,
        state=state,
        error_budget=knobs.error_budget,
    )


def split_loader(data, collate: Callable, knobs, world) -> tuple[range, EvalLoader]:
    """`(own indices, their batches)`: this process's part of a split, which has `load` and a
    length."""
    own = shard_indices(len(data), world.rank, world.size)
    return own, eval_loader(data.load, own, knobs.batch_size_test, collate, knobs, world)


class ImageBatches:
    """Called with indices: batches of these images of `data`, which has `load`, in order."""

    def __init__(self, data, knobs, world):
        self.data = data
        self.knobs = knobs
        self.world = world

    def __call__(self, indices: Sequence[int]) -> EvalLoader:
        size = self.knobs.batch_size_test
        self.loader = eval_loader(
            self.data.load, indices, size, torch.stack, self.knobs, self.world
        )
        return self.loader

    def damages(self) -> dict[str, int]:
        """Damaged images of the last pass, for the metrics."""
        return self.loader.damages()


def eval_loader(
    load: Callable, indices: Sequence[int], batch_size: int, collate: Callable, knobs, world
) -> EvalLoader:
    """Batches of `load(i)` for these indices, as the loader options say."""
    return EvalLoader(
        load,
        indices,
        batch_size,
        collate,
        workers=knobs.workers,
        pin_memory=world.device.type == "cuda",
        error_budget=knobs.error_budget,
        exif=knobs.exif,
    )
