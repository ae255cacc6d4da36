"""VQA accuracy, box IoU and the ranking of detected boxes against the originals' evaluation code."""

import pytest

from evaluation.grounding import grounding_accuracy, iou, point
from evaluation.vqa import answer_score, normalise, vqa_accuracy, without_punctuation
from tests.golden.report import record
from tests.helpers.golden import golden


@pytest.mark.parametrize("one_sided", [True, False])
def test_vqa_accuracy(one_sided):
    meta, _ = golden("simla", "vqa_accuracy")
    truth = {question["question_id"]: question for question in meta["questions"]}
    predictions = {question["question_id"]: question["prediction"] for question in meta["questions"]}
    found = vqa_accuracy(predictions, truth, one_sided)
    assert found["overall"] == meta["accuracy"]["overall"]
    assert found["question_type"] == meta["accuracy"]["perQuestionType"]
    assert found["answer_type"] == meta["accuracy"]["perAnswerType"]
    for number, score in meta["per_question"].items():
        person = truth[int(number)]
        assert round(100 * answer_score(person["prediction"], person["answers"], one_sided), 2) == score, person
    for case in meta["normalisation"]:
        assert without_punctuation(case["text"]) == case["punct"]
        assert normalise(case["text"]) == case["digit_article"]
    record("vqa_accuracy", "scores", 0.0)


def test_iou():
    meta, _ = golden("simla", "iou")
    for pair in meta["pairs"]:
        assert iou(pair["a"], pair["b"]) == pytest.approx(pair["iou"], rel=1e-12), pair
    record("iou", "overlaps", 0.0)


def test_box_ranking():
    from evaluation.grounding import box_scores, enlarge

    meta, tensors = golden("simla", "box_ranking")
    found = []
    for heat, sample in zip(tensors["in.masks"], meta["samples"], strict=True):
        size = (sample["height"], sample["width"])
        scores = box_scores(enlarge(heat, *size), sample["detections"])
        error = max(abs(a - b) for a, b in zip(scores.tolist(), sample["scores"], strict=True)) / max(sample["scores"])
        record("box_ranking", "box scores", error)
        assert error < 1e-5
        found.append(point(heat, sample["detections"], sample["target_box"], *size))
    accuracy = grounding_accuracy(found, [sample["split"] for sample in meta["samples"]])
    for split in ("val", "testA", "testB"):
        assert accuracy[split]["accuracy"] == pytest.approx(100 * meta["accuracy"][f"{split}_d"], rel=1e-12)
