"""The error budget counts the bad samples of all processes together, in evaluation and in training."""

import re
from functools import partial

import pytest

from base.distributed import gather_objects
from base.errors import BadSample, UserError
from dataset.images.decode import decode_image
from dataset.loading.eval import EvalLoader, shard_indices
from dataset.loading.stream import StreamLoader
from tests.contract.stream_cases import records, stream, world
from tests.helpers.processes import spawn

IMAGES = 20


def load(index: int, bad: int) -> dict:
    return {"image": decode_image(b"" if index < bad else b"GIF89a", name=f"{index}.jpg")}


def evaluate(rank: int, bad: int, budget: float, fails: bool) -> None:
    """The first images, all of rank 0, are unreadable; the others are, too, but not looked at."""
    own = shard_indices(IMAGES, rank, 2)

    def sample(index: int) -> dict:
        return load(index, bad) if index < bad else {"image": index}

    loader = EvalLoader(sample, own, 5, list, workers=0, error_budget=budget)
    try:
        assert sum(map(len, loader)) == len(own)
        text = ""
    except UserError as error:
        text = str(error)
    texts = gather_objects(text)
    if fails:
        assert all(f"{bad} images of {IMAGES} samples are unreadable" in each for each in texts)
        assert "--error-budget" in texts[1]
        assert all("0.jpg" in each and "1.jpg" in each for each in texts), "of all processes"
    else:
        assert texts == ["", ""]
        assert loader.damages() == {"unreadable_images": bad}


@pytest.mark.parametrize(
    ("bad", "budget", "fails"),
    [(2, 0.1, False), (3, 0.16, False), (2, 0.09, True)],
)
def test_two_processes(bad, budget, fails):
    spawn(evaluate, 2, bad, budget, fails)


def same_parts(rank: int) -> None:
    """Every process evaluates all images, with its part of the network."""
    loader = EvalLoader(partial(load, bad=IMAGES), range(IMAGES), 5, list, 0, error_budget=1)
    assert sum(map(len, loader)) == IMAGES
    assert loader.damages(same=True) == {"unreadable_images": IMAGES}


def test_images_that_every_process_has_count_once():
    spawn(same_parts, 2)


def one_is_bad(rank: int) -> None:
    """The second process has a sample that no grey image stands for."""

    def sample(index: int) -> int:
        if index == IMAGES - 5:
            raise BadSample(f"entry {index}: no caption")
        return index

    loader = EvalLoader(sample, shard_indices(IMAGES, rank, 2), 5, list, workers=0)
    with pytest.raises(UserError, match="entry 15: no caption; evaluation needs every sample"):
        list(loader)


def test_a_bad_sample_of_one_process_ends_all():
    """Instead of leaving the others waiting for it."""
    spawn(one_is_bad, 2)


def short_part(rank: int) -> None:
    """All images but the last are rank 0's; the last, the only one of rank 1, is unreadable."""
    own = range(IMAGES - 1) if rank == 0 else [IMAGES - 1]

    def sample(index: int) -> int:
        if index == IMAGES - 1:
            decode_image(b"", name=f"{index}.jpg")
        return index

    loader = EvalLoader(sample, own, 5, list, workers=0, error_budget=0.05)
    assert [index for batch in loader for index in batch] == list(own)
    assert loader.damages() == {"unreadable_images": 1}


def test_a_process_with_few_images_has_the_budget_of_all():
    """One of its one image is unreadable, but one of twenty is within the budget: it is scored."""
    spawn(short_part, 2)


def train(rank: int, bad: int, fails: bool) -> None:
    """Epochs of twenty records until every process has drawn as many, which the budget is judged by."""
    source = records(IMAGES, bad=range(bad), name="pairs")
    loader = StreamLoader(stream(source), 1, 0, world(rank, 4), error_budget=0.1)
    most = 0.0  # of one process, its fraction of bad samples
    try:
        for _ in range(2 * IMAGES):
            next(loader)
            if loader.drawn >= IMAGES:
                most = max(most, sum(loader.errors.values()) / loader.drawn)
            errors, drawn = zip(*gather_objects((loader.errors, loader.drawn)), strict=True)
            loader.check_together(errors, sum(drawn))
        said = ""
    except UserError as error:
        said = str(error)
    if fails:
        assert " samples are unusable" in said and said.count("is bad") == 3, said
        assert re.search(r"per source: pairs \d+$", said)
    else:
        assert said == "" and max(gather_objects(most)) > 0.1, "no process was over it alone"


@pytest.mark.parametrize(("bad", "fails"), [(1, False), (3, True)])
def test_training_counts_the_bad_samples_of_all_processes(bad, fails):
    """One of twenty is half the budget of a tenth, though one of four processes draws it thrice as
    often as the others; three are beyond it, wherever they come, within a few epochs."""
    spawn(train, 4, bad, fails)
