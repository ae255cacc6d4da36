"""Zero-shot evaluation gives the same figures on 1, 2 and 3 processes, even where a process has
nothing to do."""

import pytest
import torch

from base.distributed import World
from evaluation.retrieval import units
from evaluation.zeroshot import (
    cached_classifier,
    classify,
    embed_images,
    embed_texts,
    retrieve,
    text_classifier,
)
from tests.helpers.clip_toys import TOY, toy
from tests.helpers.processes import spawn

IMAGES, CAPTIONS, CLASSES = 23, 40, 7


def tokenize(texts):
    """Texts are numbers: seven tokens drawn from them."""
    rows = [
        torch.randint(1, 49, (7,), generator=torch.Generator().manual_seed(int(text)))
        for text in texts
    ]
    return torch.stack([torch.cat([row, torch.tensor([TOY["vocab_size"] - 1])]) for row in rows])


def figures(rank: int, size: int, folder: str, batch: int) -> list:
    """Everything the evaluation computes, on one process of several."""
    world = World(rank, size, rank, torch.device("cpu"))
    model = toy("CL2L_VITB16_CL2L", separate_proj=True).eval()
    g = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, TOY["image_size"], TOY["image_size"], generator=g)
    targets = torch.randint(CLASSES, (IMAGES,), generator=g)
    prompts = [[str(10 * number + i) for i in range(1 + number % 3)] for number in range(CLASSES)]
    own = units(IMAGES, batch, world)
    flat = [i for unit in own for i in unit]

    def batches(target):
        return [{"image": images[unit], "target": target[unit]} for unit in own]

    def make(count=CLASSES):
        return text_classifier(model.embed_text, tokenize, prompts[:count], world, batch)

    found = []
    with torch.inference_mode():
        classifier = make()
        found += [classifier]
        found += [
            plain(
                classify(
                    model.embed_image,
                    classifier,
                    batches(targets),
                    flat,
                    IMAGES,
                    world,
                    "mean_per_class",
                )
            )
        ]
        two = cached_classifier(_file(folder, size), lambda: make(2), world)
        again = cached_classifier(_file(folder, size), lambda: 1 / 0, world)  # read, not made
        assert all(torch.equal(two[name], again[name]) for name in two)
        found += [
            plain(
                classify(
                    model.embed_image, two, batches(targets % 2), flat, IMAGES, world, "roc_auc"
                )
            )
        ]
        shown = torch.nn.functional.one_hot(targets, CLASSES)
        found += [
            plain(
                classify(
                    model.embed_image, classifier, batches(shown), flat, IMAGES, world, "map11"
                )
            )
        ]
        alone = [{"image": images[unit]} for unit in own]
        image = embed_images(model.embed_image, alone, flat, IMAGES, world)
        text = embed_texts(
            model.embed_text, tokenize, [str(i) for i in range(CAPTIONS)], world, batch
        )
        found += [image, text, retrieve(image, text, torch.arange(CAPTIONS) % IMAGES, world)]
    return found


def plain(found) -> dict:
    return {**found.scores, "best": found.best, "by_class": found.by_class.nan_to_num(-1)}


def _file(folder: str, size: int):
    from pathlib import Path

    return Path(folder) / f"{size}.safetensors"


def compare_in_process(rank: int, size: int, folder: str, expected: list) -> None:
    for batch, alone in expected:
        for found, wanted in zip(
            figures(rank, size, f"{folder}/{batch}", batch), alone, strict=True
        ):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                same = (
                    torch.equal(found[name], value)
                    if isinstance(value, torch.Tensor)
                    else found[name] == value
                )
                assert same, (name, found[name], value)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(size, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, so that sums are taken in the same order
    try:
        expected = [
            (batch, figures(0, 1, str(tmp_path / f"one{batch}"), batch)) for batch in (4, 64)
        ]
    finally:
        torch.set_num_threads(threads)
    small = expected[0][1]
    assert {"mean_per_class_zh_0.3", "acc5_h"} <= small[1].keys() and "txt_r5_zh_0.7" in small[-1]
    assert 0 < small[3]["map11_z"] < 100
    spawn(compare_in_process, size, size, str(tmp_path), expected)
