"""One line for an evaluation: the score that counts, beside chance."""

import pytest
import torch

from evaluation.accuracy import class_accuracy
from evaluation.recognition import label_metrics
from evaluation.zeroshot import zero_shot_chance
from runtime.scores import rounded, score_line, score_lines


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"accuracy": 52.0833, "chance": 33.3333}, "accuracy 52.08, chance 33.33"),
        ({"overall": 60.0, "chance": 25.5, "answer_type": {}}, "overall 60, chance 25.5"),
        ({"txt_r1": 3.0, "r_mean": 40.0, "chance": 10.0}, "r_mean 40, chance 10"),
        ({"acc1_z": 11.1, "chance": {"acc1": 10.0}}, "acc1_z 11.1, chance 10"),
        ({"knn1": 5.0, "unreadable_images": 3}, "knn1 5; 3 unreadable images"),
        ({"images": 3}, ""),
    ],
)
def test_the_line(scores, line):
    assert score_line(scores) == line


def test_a_named_score_and_several_splits():
    scores = {"accuracy": 5.0, "f1": 7.0, "chance": {"f1": 2.0}}
    assert score_line(scores, "f1") == "f1 7, chance 2"
    metrics = {"k": 1, "val": {"accuracy": 5.0, "chance": 1.0}, "test": {"accuracy": 6.0}}
    assert score_lines(metrics) == ["val: accuracy 5, chance 1", "test: accuracy 6"]
    several = {"results": {"cifar10": {"acc1_z": 9.0, "chance": 10.0}}, "skipped": {"a": "why"}}
    assert score_lines(several) == ["cifar10: acc1_z 9, chance 10"]
    assert rounded({"a": [1 / 3, 2], "b": "x"}) == {"a": [0.333333, 2], "b": "x"}


def test_chance_of_each_kind():
    labels = torch.tensor([0, 0, 0, 1])
    found = class_accuracy(torch.eye(2)[labels], labels, ["no", "yes"])
    assert found["chance"] == 75 and found["accuracy"] == 100
    assert zero_shot_chance("acc1", 8, labels) == 12.5
    assert zero_shot_chance("roc_auc", 2, labels) == 50
    assert zero_shot_chance("acc1_acc5", 4, labels) == 62.5
    assert zero_shot_chance("acc1_acc5", 10, labels) == 30
    assert zero_shot_chance("map11", 2, torch.eye(2)[labels]) > 50
    # the two usual labels, "dog" and "cat", are right for the first image, half right elsewhere
    references = [["dog", "cat"], ["dog", "tree"], ["dog", "cat"]]
    guesses = [[("sun", 0.9), ("sky", 0.1)]] * 3
    metrics = label_metrics(guesses, references)
    assert metrics["exact_f1"] == 0
    assert metrics["chance"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
