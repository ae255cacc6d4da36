"""Metrics of classifiers against scikit-learn's and by hand; ImageNet-ReaL."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn

from base.distributed import World
from base.errors import UserError
from evaluation import classification
from evaluation.classification import (
    Scores,
    multi_label_metrics,
    read_real,
    score,
    single_label_metrics,
    validate,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


def random_scores(images=40, classes=7):
    torch.manual_seed(0)
    logits = torch.randn(images, classes)
    logits[0, 0] = 0.0  # neither given nor not: it counts as not
    targets = torch.rand(images, classes) < 0.3
    targets[:, 5] = False  # a class that does not occur
    return logits, targets


@pytest.mark.parametrize("block", [2, 512])
def test_multi_label_metrics(block, monkeypatch):
    monkeypatch.setattr(classification, "BLOCK", block)
    logits, targets = random_scores()
    lists = [row.nonzero().flatten().tolist() for row in targets]
    found = multi_label_metrics(Scores(logits, range(40), lists), original=True)
    shown = [c for c in range(7) if targets[:, c].any()]
    truth, scores, given = targets.numpy(), logits.numpy(), (logits > 0).numpy()
    expected = {
        "mAP": sklearn.average_precision_score(truth[:, shown], scores[:, shown], average="macro"),
        "mAP_micro": None,
        "F1_macro": sklearn.f1_score(truth, given, average="macro", zero_division=0),
        "F1_micro": sklearn.f1_score(truth, given, average="micro"),
        "accuracy": (truth == given).mean(),
    }
    for name, value in expected.items():
        if value is not None:
            assert found[name] == pytest.approx(100 * value), name
    top = logits.topk(5, 1).indices
    assert found["precision@5"] == pytest.approx(100 * targets.gather(1, top).float().mean().item())
    assert found["precision@1"] == found["hit@1"]
    assert found["classes_shown"] == 6
    bce = F.binary_cross_entropy_with_logits(logits, targets.float())
    assert found["bce"] == pytest.approx(bce.item())


def test_area_under_the_curve_of_scores_that_are_apart():
    """One positive above, below, and between two negatives; one negative below two positives."""
    logits = torch.tensor([[3.0, -3, 0, 3], [1, 1, 1, 2], [-1, -1, -1, 0]])
    targets = torch.tensor([[True] * 4, [False, False, False, True], [False] * 4])
    assert classification.roc_area(logits, targets).tolist() == pytest.approx([1, 0, 0.5, 1])


def test_original_reports_the_area_and_the_accuracy_of_pairs():
    """Of the first class 1 of 1, of the second none occurs; 5 of 6 pairs are right."""
    logits = torch.tensor([[3.0, -3], [-1, -1], [-1, 2]])
    for original in (False, True):
        scores = Scores(logits, range(3), [[0], [], []])
        found = validate(scores, multi_label=True, original=original).metrics
        assert ("auc" in found) == original
    assert (found["auc"], found["accuracy"]) == (50, pytest.approx(500 / 6))


def test_chance_is_the_map_of_a_random_order():
    """Of all orders of five images, which one, two and all five of them show."""
    lists = [[0, 1, 2], [1, 2], [2], [2], [2]]
    targets = classification.block_targets(lists, 0, 4)
    scores = []
    for order in itertools.permutations(range(5)):
        logits = torch.tensor(order, dtype=torch.float32)[:, None].expand(5, 4)
        scores.append(multi_label_metrics(Scores(logits, range(5), lists))["mAP"])
    found = multi_label_metrics(Scores(targets.float(), range(5), lists))
    assert found["chance"] == pytest.approx(sum(scores) / len(scores)) and found["mAP"] == 100
    alone = multi_label_metrics(Scores(targets[:1].float(), range(1), lists[:1]))
    assert alone["chance"] == alone["mAP"] == 100


def test_images_that_a_threshold_left_no_label_are_no_images_of_class_0():
    """As of the 0 that stands in their place: a guess of class 0 is not right there."""
    logits = torch.eye(3)[[0, 0, 1, 2]]
    lists = [[], [0], [1], [0]]
    found = single_label_metrics(Scores(logits, range(4), lists))
    alone = single_label_metrics(Scores(logits[1:], range(3), lists[1:]))
    assert found == alone
    assert found["top1"] == pytest.approx(200 / 3) and found["images"] == 3
    with pytest.raises(UserError, match="lower --label-threshold"):
        single_label_metrics(Scores(logits, range(4), [[]] * 4))


def test_single_label_metrics():
    logits, _ = random_scores()
    labels = torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))
    lists = labels[:, None].tolist()
    found = single_label_metrics(Scores(logits, range(40), lists))
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert found["top5"] == pytest.approx(
        100 * sklearn.top_k_accuracy_score(labels, logits, k=5, labels=range(7))
    )
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert found["chance"] == 100 * labels.bincount().max().item() / 40


def test_few_classes():
    found = single_label_metrics(Scores(torch.tensor([[1.0, 0.0]]), range(1), [[1]]))
    assert (found["top1"], found["top5"]) == (0, 100)


def test_real_leaves_out_images_without_labels(tmp_path):
    names = ["b/2.jpg", "a/1.jpg", "a/3.jpg"]
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0], [1, 2], []]))  # of 1.jpg, 2.jpg, 3.jpg
    real = read_real(file, names)
    assert real == [[1, 2], [0], []]
    logits = F.one_hot(torch.tensor([2, 1, 0]), 3).float()
    found = single_label_metrics(Scores(logits, range(3), [[1], [0], [0]]), real)
    assert found["real"] == 50 and found["real_images"] == 2


def test_real_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_real(tmp_path / "real.json", ["a"])
    for text, words in (
        ("[", "not valid JSON"),
        ("{}", "expected a list"),
        ("[[1]]", "labels 1 images"),
        ('[["n01440764"], []]', "expected a list with a list of class numbers"),
        ("[[], []]", "no image has a class"),
    ):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_real(tmp_path / "real.json", ["a", "b"])


def test_scores_come_in_the_order_of_the_split():
    batches = [
        {
            "image": torch.tensor([[1.0], [2.0]]),
            "labels": torch.tensor([[3, 0], [1, 2]]),
            "label_weights": w,
        }
        for w in (torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 0], [0.5, 0]]))
    ]
    scores = score(lambda image: image.repeat(1, 4), batches, [0, 1, 2, 3], 4, ALONE)
    assert scores.labels == [[3], [1, 2], [], [1]] and scores.logits[:, 0].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("metrics", [single_label_metrics, multi_label_metrics])
def test_scores_that_are_not_numbers_and_images_without_labels_are_refused(metrics):
    logits, _ = random_scores(3)
    with pytest.raises(UserError, match="label"):
        metrics(Scores(logits, range(3), [[], [], []]))
    for value in (torch.nan, torch.inf):
        logits[1, 2] = value  # argmax would take it for a class
        with pytest.raises(UserError, match="not finite"):
            metrics(Scores(logits, range(3), [[1], [2], [0]]))
