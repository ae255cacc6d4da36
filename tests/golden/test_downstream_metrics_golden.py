"""VQA accuracy, box IoU and the ranking of detected boxes against the originals' evaluation
code."""

import pytest

from evaluation.grounding import box_scores, enlarge, grounding_accuracy, iou, point
from evaluation.vqa import answer_score, normalise, vqa_accuracy, without_punctuation
from tests.golden.report import compare, same
from tests.helpers.golden import golden


@pytest.mark.parametrize("one_sided", [True, False])
def test_vqa_accuracy(one_sided):
    meta, _ = golden("simla", "vqa_accuracy")
    truth = {question["question_id"]: question for question in meta["questions"]}
    predictions = {
        question["question_id"]: question["prediction"] for question in meta["questions"]
    }
    found = vqa_accuracy(predictions, truth, one_sided)
    same("vqa_accuracy", "overall", found["overall"], meta["accuracy"]["overall"])
    same(
        "vqa_accuracy",
        "by type of question",
        found["question_type"],
        meta["accuracy"]["perQuestionType"],
    )
    same(
        "vqa_accuracy", "by type of answer", found["answer_type"], meta["accuracy"]["perAnswerType"]
    )
    by_id = {str(question): entry for question, entry in truth.items()}
    assert by_id.keys() == meta["per_question"].keys()
    for question, theirs in meta["per_question"].items():
        entry = by_id[question]
        ours = round(100 * answer_score(entry["prediction"], entry["answers"], one_sided), 2)
        same("vqa_accuracy", "by question", ours, theirs)
    for case in meta["normalisation"]:
        same(
            "vqa_accuracy", "without punctuation", without_punctuation(case["text"]), case["punct"]
        )
        same("vqa_accuracy", "normalised", normalise(case["text"]), case["digit_article"])


def test_iou():
    meta, _ = golden("simla", "iou")
    for pair in meta["pairs"]:
        compare("iou", "overlaps", iou(pair["a"], pair["b"]), pair["iou"], 1e-12)


def test_box_ranking():
    meta, tensors = golden("simla", "box_ranking")
    found = []
    for heat, sample in zip(tensors["in.masks"], meta["samples"], strict=True):
        size = (sample["height"], sample["width"])
        scores = box_scores(enlarge(heat, *size), sample["detections"])
        compare("box_ranking", "box scores", scores, sample["scores"], 1e-5)
        found.append(point(heat, sample["detections"], sample["target_box"], *size))
    accuracy = grounding_accuracy(found, [sample["split"] for sample in meta["samples"]])
    assert {f"{split}_d" for split in accuracy} == meta["accuracy"].keys()
    for split, ours in accuracy.items():
        compare(
            "box_ranking", "accuracy", ours["accuracy"], 100 * meta["accuracy"][f"{split}_d"], 1e-12
        )
