"""Metrics of zero-shot classification against scikit-learn, and where it has none, against the
definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.distributed import World
from base.errors import UserError
from evaluation.zeroshot import Classified, best_classes, cached_classifier, classify
from evaluation.zeroshot_metrics import (
    average_precision,
    mean_per_class,
    measure,
    precision_recall,
    random_map11,
    ranked_precision,
    roc_auc,
    voc_map,
)

metrics = pytest.importorskip("sklearn.metrics")


def drawn(seed: int, n: int = 60, levels: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and targets of 0 and 1 that both occur."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (n,), generator=g)
    targets[:2] = torch.tensor([0, 1])
    return torch.randint(levels, (n,), generator=g).float() / levels, targets


@pytest.mark.parametrize("seed", range(4))
def test_mean_per_class_is_the_balanced_accuracy(seed):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(6, (50,), generator=g)
    targets[targets == 3] = 5  # a class that does not occur
    predicted = torch.randint(6, (50,), generator=g)
    with pytest.warns(UserWarning, match="not in y_true") if 3 in predicted else _nothing():
        expected = metrics.balanced_accuracy_score(targets, predicted)
    assert mean_per_class(predicted, targets) == pytest.approx(100 * expected, rel=1e-12)


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 12, 1000]))
def test_roc_auc(seed, levels):
    scores, targets = drawn(seed, levels=levels)
    assert roc_auc(scores, targets) == pytest.approx(100 * metrics.roc_auc_score(targets, scores))


def test_roc_auc_of_one_class_is_not_a_number():
    assert math.isnan(roc_auc(torch.rand(5), torch.ones(5)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 12, 1000]))
def test_precision_and_recall(seed, levels):
    scores, targets = drawn(seed, levels=levels)
    precision, recall, _ = metrics.precision_recall_curve(targets, scores)
    found, levels = (x.tolist() for x in precision_recall(scores, targets))
    ours = dict(
        zip(reversed(levels), reversed(found), strict=True)
    )  # the first place of every recall
    for level, value in ours.items():  # the best precision at this recall or a higher one
        best = max(
            p for p, r in zip(precision[:-1], recall[:-1], strict=True) if r >= level - 1e-12
        )
        assert value == pytest.approx(best)
    assert max(ours) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 12, 1000]))
def test_average_precision_by_its_definition(seed, levels):
    scores, targets = drawn(seed, levels=levels)
    precision, recall, _ = metrics.precision_recall_curve(targets, scores)
    pairs = list(zip(precision[:-1], recall[:-1], strict=True))

    def at(level):
        return max((p for p, r in pairs if r >= level - 1e-12), default=0)

    eleven, area = average_precision(scores, targets)
    assert eleven == pytest.approx(100 * sum(at(i / 10) for i in range(11)) / 11)
    levels = [0, *sorted({r for _, r in pairs})]
    assert area == pytest.approx(100 * sum((b - a) * at(b) for a, b in itertools.pairwise(levels)))
    assert (
        area >= 100 * metrics.average_precision_score(targets, scores) - 1e-9
    )  # which does not interpolate


def test_what_is_not_to_be_counted_changes_nothing():
    scores, targets = drawn(3)
    more = (
        torch.cat([scores, torch.tensor([2.0, -1.0])]),
        torch.cat([targets, torch.tensor([-1, -1])]),
    )
    assert average_precision(*more) == average_precision(scores, targets)
    none, unknown = (targets[:, None] - 1 + shift for shift in (1, 0))  # 0 and 1, -1 and 0
    assert ranked_precision(scores[:, None], none) > ranked_precision(scores[:, None], unknown) == 0


def test_voc_map_is_the_mean_over_the_classes_that_occur():
    first, second = drawn(1), drawn(2)
    scores = torch.stack([first[0], second[0], torch.rand(60)], 1)
    targets = torch.stack([first[1], second[1], torch.zeros(60, dtype=torch.int64)], 1)
    ones = [average_precision(*first), average_precision(*second)]
    assert voc_map(scores, targets) == pytest.approx(
        [(a + b) / 2 for a, b in zip(*ones, strict=True)]
    )


def test_perfect_and_worst_rankings():
    targets = torch.tensor([1, 1, 0, 0])
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), targets) == (100, 100)
    eleven, area = average_precision(torch.tensor([1.0, 2, 3, 4]), targets)
    assert eleven == pytest.approx(50) and area == pytest.approx(50)


def test_chance_of_11_point_map_is_that_of_all_orders():
    """Of classes that two and three of five images show, one without the image that is left out."""
    targets = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 1], [0, -1]])
    means = []
    for column in targets.T:
        orders = itertools.permutations(range(5))
        scores = [average_precision(torch.tensor(order).float(), column)[0] for order in orders]
        means.append(sum(scores) / len(scores))
    found = random_map11(torch.cat([targets, -torch.ones(5, 1)], 1))  # no image of a third class
    assert found == pytest.approx(sum(means) / 2, abs=0.3)
    assert found == random_map11(targets)


@pytest.mark.parametrize("metric", ["acc1", "mean_per_class", "acc1_acc5"])
def test_measure_of_best_classes(metric):
    best = torch.tensor([[0, 1, 2, 3, 4], [5, 1, 2, 3, 0], [2, 1, 0, 3, 4], [1, 0, 2, 3, 4]])
    found = measure(metric, best, torch.tensor([0, 1, 5, 1]))
    assert found == {"acc1": 50, "acc5": 75, "acc1_acc5": 62.5, "mean_per_class": 50}


def test_measure_of_scores():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    found = measure("roc_auc", scores, torch.tensor([1, 0, 0]))
    assert found["roc_auc"] == 100 and found["acc1"] == pytest.approx(200 / 3)
    assert measure("map11", scores, torch.tensor([[0, 1], [1, 0], [0, 0]]))["map11"] == 100


def test_a_stored_classifier_gives_the_figures_of_the_one_that_was_made(tmp_path):
    """Its file names h before z, and what is shown of every image and class is by z."""
    world = World(0, 1, 0, torch.device("cpu"))
    made = {"z": torch.eye(3), "h": torch.eye(3).flip(0)}
    batches = [{"image": torch.eye(3), "target": torch.arange(3)}]

    def embed(image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"z": image, "h": image}

    def evaluated() -> Classified:
        classifier = cached_classifier(tmp_path / "c.safetensors", lambda: made, world)
        return classify(embed, classifier, batches, range(3), 3, world, "acc1")

    first, second = evaluated(), evaluated()
    assert (tmp_path / "c.safetensors").is_file()
    for found in (first, second):
        assert found.best[:, 0].tolist() == [0, 1, 2] and found.by_class.tolist() == [100] * 3
        assert found.scores["acc1_h"] == pytest.approx(100 / 3)
    assert list(first.scores) == list(second.scores)


@pytest.mark.parametrize("metric", ["acc1", "roc_auc", None])
def test_embeddings_that_are_not_numbers_have_no_best_class(metric):
    world = World(0, 1, 0, torch.device("cpu"))
    classifier = {"z": torch.eye(2)}
    image = torch.tensor([[1.0, 0.0], [torch.inf, 1.0]])  # as fp16 overflows
    with pytest.raises(UserError, match="not finite"):
        if metric:
            batches = [{"image": image, "target": torch.arange(2)}]
            classify(lambda x: {"z": x}, classifier, batches, range(2), 2, world, metric)
        else:
            best_classes(lambda x: {"z": x}, classifier, [{"image": image}], range(2), 2, world)
