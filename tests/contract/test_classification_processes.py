"""Two processes give one process's loss, gradients, weights, metrics and neighbours; so does the
compiled network."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import default_collate

from base.distributed import World, unwrap
from base.errors import UserError
from dataset.loading.eval import EvalLoader, shard_indices
from evaluation import knn
from evaluation.classification import multi_label_metrics, score, single_label_metrics
from evaluation.features import Bank, feature_bank
from evaluation.knn import nearest_neighbours
from evaluation.retrieval import units
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.layers.batchnorm import synchronise_batch_norm
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.parallel import ParallelOptions, parallelize
from tests.contract.test_parallel import FSDP2
from tests.helpers.processes import spawn

CPU = torch.device("cpu")
ROWS = 8
STEM = (4, 6)


def network(loss: str = "sigmoid", stem: tuple[int, ...] = ()) -> VisionClassifier:
    torch.manual_seed(0)
    sizes = {
        "stem": stem,
        "model": "vit-mu/8",
        "image_size": 16,
        "num_classes": 6,
        "representation_size": 12,
        "head_bias": 0.0,
    }
    model = VisionClassifier(ClassifierConfig(loss=loss, **sizes))
    torch.nn.init.normal_(model.head.weight)
    return model


def batch() -> dict:
    torch.manual_seed(1)
    labels = torch.stack([torch.randperm(6)[:3] for _ in range(ROWS)])
    weights = (torch.arange(3) < torch.randint(1, 4, (ROWS, 1))).float()
    return {"image": torch.randn(ROWS, 3, 16, 16), "labels": labels, "label_weights": weights}


def three_updates(
    world: World, features: ParallelOptions, keras: bool = True, stem=()
) -> tuple[list[float], dict]:
    """Losses, averaged over the processes, and the weights after three updates."""
    model = parallelize(synchronise_batch_norm(network(stem=stem)), world, features)
    settings = Optimizer(
        lr=0.05, weight_decay=0.1, eps=1e-2, keras=keras
    )  # a small epsilon blows up noise
    optimizer = build_optimizer(model, settings)
    precision, losses = Precision("fp32", CPU, 1.0), []
    whole = batch()
    mine = {
        k: v[world.rank * ROWS // world.size : (world.rank + 1) * ROWS // world.size]
        for k, v in whole.items()
    }
    for step in range(3):
        set_learning_rate(optimizer, 0.05 / (1 + step))
        loss = model(**mine)["loss"]
        precision.backward(loss)
        precision.step(optimizer, list(model.parameters()))
        loss = loss.detach().clone()
        if world.size > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world.size)
    if features.parallel == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return losses, unwrap(model).state_dict()


def assert_same(ours: tuple, expected: tuple) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    for name, value in expected[1].items():
        torch.testing.assert_close(
            ours[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def on_two(rank: int, expected: tuple, plain: tuple, hybrid: tuple) -> None:
    world = World(rank, 2, rank, CPU)
    assert_same(three_updates(world, ParallelOptions()), expected)
    if FSDP2:
        sharded = ParallelOptions(parallel="fsdp", activation_checkpointing=True)
        assert_same(three_updates(world, sharded), expected)
    assert_same(three_updates(world, ParallelOptions(), keras=False), plain)
    assert_same(three_updates(world, ParallelOptions(), stem=STEM), hybrid)


def test_training():
    alone = World(0, 1, 0, CPU)
    expected, plain = (
        three_updates(alone, ParallelOptions()),
        three_updates(alone, ParallelOptions(), keras=False),
    )
    assert expected[0][2] < expected[0][0] and expected[0] != plain[0]
    assert_same(three_updates(alone, ParallelOptions(activation_checkpointing=True)), expected)
    spawn(on_two, 2, expected, plain, three_updates(alone, ParallelOptions(), stem=STEM))


def test_compiled_is_eager(eager_kernels):
    """With kernels in C++ in tests/script/test_compiled.py."""
    torch.compiler.reset()
    alone = World(0, 1, 0, CPU)
    assert_same(
        three_updates(alone, ParallelOptions(compile=True)), three_updates(alone, ParallelOptions())
    )


def metrics(world: World) -> tuple[dict, dict]:
    """Both kinds of metrics, of 11 images: one process has more than the other."""
    torch.manual_seed(2)
    images, count = torch.randn(11, 3, 16, 16), 11
    labels = [torch.randperm(6)[: 1 + i % 3] for i in range(count)]
    own = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)

    def batches(single: bool):
        for i in own:
            row = labels[i][:1] if single else labels[i]
            yield {
                "image": images[i : i + 1],
                "labels": row[None],
                "label_weights": torch.ones(1, len(row)),
            }

    model = network().eval()
    with torch.no_grad():
        single = single_label_metrics(
            score(model.logits, batches(True), own, count, world),
            [[1], [], [2, 3]] + [[i % 6] for i in range(8)],
        )
        many = multi_label_metrics(
            score(model.logits, batches(False), own, count, world), original=True
        )
    return single, many


def metrics_on_two(rank: int, size: int, expected: tuple) -> None:
    assert metrics(World(rank, size, rank, CPU)) == expected


@pytest.mark.parametrize("size", [2, 3])
def test_metrics(size):
    spawn(metrics_on_two, size, size, metrics(World(0, 1, 0, CPU)))


def neighbours(world: World, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    knn.UNIT, knn.TILE = 4, 7
    banks, model = [], network().eval()
    for name, count in (("train", 23), ("val", 9)):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        own = [i for unit in units(count, 3, world) for i in unit]
        labels = torch.arange(count) % 5

        def sample(i, images=images, labels=labels):
            return {"image": images[i], "labels": labels[i, None]}

        def batches(own=own, sample=sample):
            return EvalLoader(sample, own, 3, default_collate, workers=0)

        with torch.no_grad():
            banks.append(
                feature_bank(model.features, batches, own, count, 32, folder / name, world)
            )
    assert np.array_equal(banks[0].labels, np.arange(23) % 5)
    return nearest_neighbours(*(Bank(*bank) for bank in banks), 6, world)


def features_of_one_not_finite(rank: int, folder: Path) -> None:
    """Those of the second process's first batch."""
    own = shard_indices(8, rank, 2)

    def sample(i: int) -> dict:
        return {
            "image": torch.full((2,), torch.inf if i == 4 else i),
            "labels": torch.zeros(1).long(),
        }

    def batches() -> EvalLoader:
        return EvalLoader(sample, own, 2, default_collate, workers=0)

    world = World(rank, 2, rank, CPU)
    with pytest.raises(UserError, match="features are not finite"):
        feature_bank(lambda x: x, batches, own, 8, 2, folder / "key", world)
    with pytest.raises(UserError, match="different data: one has 8 entries, another 7;"):
        feature_bank(lambda x: x, batches, own, 8 - rank, 2, folder / "key", world)


def test_features_that_one_process_refuses_end_all(tmp_path):
    spawn(features_of_one_not_finite, 2, tmp_path)
    assert not (tmp_path / "key.json").exists()


def neighbours_on_two(rank: int, size: int, folder: Path, expected) -> None:
    found = neighbours(World(rank, size, rank, CPU), folder)
    assert torch.equal(found.index, expected[0]) and torch.equal(found.similarity, expected[1])


@pytest.mark.parametrize("size", [2, 4])  # with 4 one process has no queries
def test_neighbours(size, tmp_path):
    found = neighbours(World(0, 1, 0, CPU), tmp_path / "one")
    spawn(neighbours_on_two, size, size, tmp_path / "several", (found.index, found.similarity))
    for name in ("train", "val"):
        one, several = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("one", "several"))
        assert np.array_equal(one, several)
