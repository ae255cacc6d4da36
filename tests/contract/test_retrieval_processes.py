"""Retrieval evaluation gives the same bits on 1, 2 and 3 processes, even where a process has
nothing to do."""

import pytest
import torch

from base.distributed import World
from evaluation.retrieval import Captions, rank
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from tests.helpers.processes import spawn

IMAGES, TEXTS, LENGTH = 21, 44, 9


def small_model(single_stream: bool) -> Retrieval:
    torch.manual_seed(0)
    bert = BertConfig(60, 32, 4, 4, 64, 40, encoder_width=32, single_stream=single_stream)
    bert.fusion_layer = 0 if single_stream else 2
    vit = ViTConfig(image_size=32, patch_size=16, width=32, depth=2, heads=4)
    return Retrieval(RetrievalConfig(vit, bert, embed_dim=16, queue_size=8)).eval()


def rankings(rank_of: int, size: int, single_stream: bool, image_batch: int):
    """What a process gets: [(candidates, scores), (candidates, scores)]."""
    model, g = small_model(single_stream), torch.Generator().manual_seed(5)
    images = torch.randn(IMAGES, 3, 32, 32, generator=g)
    mask = torch.arange(LENGTH)[None] < torch.randint(2, LENGTH + 1, (TEXTS, 1), generator=g)
    ids = torch.randint(5, 60, (TEXTS, LENGTH), generator=g) * mask
    found = rank(
        model,
        lambda indices: images[indices].split(image_batch) if indices else [],
        IMAGES,
        Captions(ids, mask, torch.randint(0, IMAGES, (TEXTS,), generator=g)),
        World(rank_of, size, rank_of, torch.device("cpu")),
        k=6,
        keep_text_states=not single_stream,
        image_batch=image_batch,
        pairs=24,
    )
    return [(r.candidates, r.scores) for r in found]


def compare_in_process(rank_of: int, size: int, expected: list) -> None:
    for (single_stream, image_batch), alone in expected:
        for found, wanted in zip(
            rankings(rank_of, size, single_stream, image_batch), alone, strict=True
        ):
            assert torch.equal(found[0], wanted[0]), "candidates differ"
            assert torch.equal(found[1], wanted[1]), "scores differ"


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, so that sums are taken in the same order
    try:
        cases = [
            (single_stream, image_batch)
            for single_stream in (True, False)
            for image_batch in (4, 16)
        ]
        expected = [(case, rankings(0, 1, *case)) for case in cases]
    finally:
        torch.set_num_threads(threads)
    assert expected[0][1][0][1].std() > 0
    spawn(compare_in_process, size, size, expected)
