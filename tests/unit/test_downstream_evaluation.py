"""VQA accuracy, boxes and classification: properties and corner cases."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from base.errors import UserError
from dataset.images.decode import reading
from dataset.tasks.grounding import Target
from evaluation.accuracy import class_accuracy, confusion_table
from evaluation.grounding import (
    Pointing,
    box_scores,
    choosing_metric,
    enlarge,
    grounding_accuracy,
    iou,
    point,
)
from evaluation.report.examples import answer_case, box_case, gallery
from evaluation.report.vqa import answer_report
from evaluation.vqa import (
    answer_score,
    check_answer_list,
    normalise,
    prior_accuracy,
    save_answers,
    unreachable,
    vqa_accuracy,
)
from runtime.scores import score_line


@pytest.mark.parametrize(
    ("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_one_of_three_people_is_a_third_of_a_point(agreeing, score):
    answers = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert answer_score("red", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The Dog", "dog"),
        ("two  dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("3.5 m.", "3.5 m"),
        ("yes!", "yes "[:3]),
        ("\tin a\nbox ", "in box"),
    ],
)
def test_normal_form(answer, form):
    assert normalise(answer) == form


def test_accuracy_by_type_and_what_the_most_frequent_answer_scores():
    truth = {
        1: {"answers": ["yes"] * 10, "question_type": "is"},
        2: {"answers": ["no"] * 10, "question_type": "is"},
        3: {"answers": ["yes"] * 10, "question_type": "is"},
        4: {"answers": ["red"] * 10, "question_type": "what"},
    }
    found = vqa_accuracy({1: "yes", 2: "yes", 3: "no", 4: "red"}, truth)
    assert found == {"overall": 50.0, "question_type": {"is": 33.33, "what": 100.0}}
    assert prior_accuracy(truth)["overall"] == 75.0
    spelt = {1: {"answers": ["Two"] * 3}, 2: {"answers": ["2"] * 3}, 3: {"answers": ["no"] * 4}}
    assert prior_accuracy(spelt)["overall"] == 66.67  # always "2", the most frequent answer


def test_an_answer_list_is_judged_as_answers_are_scored(tmp_path, capsys):
    truth = {1: {"answers": ["Two dogs"] * 6 + ["cats"] * 4}, 2: {"answers": ["a dog", "the dog"]}}
    for listed in (["2 dogs", "dog"], ["two dogs", "The dog"], ["Two dogs", "a dog"]):
        assert unreachable(truth, listed) == []
        check_answer_list(tmp_path, listed, truth, "val")
    assert capsys.readouterr().out == ""
    assert unreachable(truth, ["dog", "cats"]) == ["Two dogs"]
    assert unreachable(truth, ["2 dogs"]) == ["a dog"]  # each of two, once its article is gone
    # the original normalises the prediction alone: no prediction is "Two dogs" or "a dog"
    assert unreachable(truth, ["two dogs", "a dog"], one_sided=True) == ["Two dogs", "a dog"]
    for annotation in truth.values():
        assert answer_score("dog", annotation["answers"], one_sided=True) == 0
    check_answer_list(tmp_path, ["cats"], truth, "val", one_sided=True)
    assert "lacks 2 answers of val_file" in capsys.readouterr().out
    with pytest.raises(UserError, match="no answer to any question of val_file"):
        check_answer_list(tmp_path, ["dog"], truth, "val", one_sided=True)


class Questions(SimpleNamespace):
    def __len__(self):
        return len(self.ids)


@pytest.mark.parametrize(
    ("one_sided", "expected", "heading"),
    [(False, 100.0, "Right: 1 of 1"), (True, 0.0, "Wrong: 1 of 1")],
)
def test_chance_and_examples_are_counted_as_the_score_is(one_sided, expected, heading):
    truth = {7: {"answers": ["two"] * 10, "question_type": "how many", "answer_type": "number"}}
    scores = vqa_accuracy({7: "two"}, truth, one_sided)
    assert scores["overall"] == prior_accuracy(truth, one_sided)["overall"] == expected
    data = Questions(ids=[7], written=["how many?"], images=[Path("a.jpg")], truth=truth)
    best = torch.zeros(1, 1, dtype=torch.int64)
    cards = answer_report("val", data, ["two"], best, torch.ones(1, 1), scores, one_sided)
    assert heading in cards[1]


def test_any_of_a_few_answers_is_right():
    assert answer_score("Grey.", ["grey"]) == answer_score("cow", ["crow", "cow"]) == 1.0
    assert answer_score("red", ["grey"]) == 0.0
    assert answer_score("grey", ["grey", "red", "red", "blue"]) == 0.25  # four: as of ten
    assert answer_score("grey", ["grey"], one_sided=True) == 0.0  # as the official code


def test_people_may_write_numbers_as_words():
    assert answer_score("two", ["two"] * 10) == answer_score("2", ["two"] * 10) == 1.0
    assert answer_score("two", ["two"] * 10, one_sided=True) == 0.0
    assert answer_score("the dog", ["the dog"] * 9 + ["cat"]) == 1.0


@pytest.mark.parametrize(("compat", "expected"), [("none", 100.0), ("original", 0.0)])
def test_the_originals_numbers_come_from_the_official_code(compat, expected):
    import VQA

    data = SimpleNamespace(ids=[7], truth={7: {"answers": ["two"] * 10}})
    config = SimpleNamespace(compat=compat)
    found = VQA.accuracy(data, ["one", "two"], torch.tensor([[1, 0]]), config)
    assert found == {"overall": expected, "chance": expected}


def test_answers_file(tmp_path):
    save_answers(tmp_path / "result/answers.json", {7: "yes", 3: "two"})
    rows = json.loads((tmp_path / "result/answers.json").read_text())
    assert rows == [{"question_id": 7, "answer": "yes"}, {"question_id": 3, "answer": "two"}]


def test_box_scores_are_sums_over_the_box_by_its_root_area():
    torch.manual_seed(0)
    heat = torch.randn(20, 30)
    boxes = [
        [3.7, 2.2, 10.6, 8.9],
        [0, 0, 30, 20],
        [25, 15, 50, 50],
        [29.9, 19.9, 0.5, 0.5],
        [-3, -2, 6, 5],
    ]
    expected = [heat[2:11, 3:14].sum() / (10.6 * 8.9) ** 0.5, heat.sum() / 600**0.5]
    expected += [
        heat[15:, 25:].sum() / 2500**0.5,
        heat[19:20, 29:30].sum() / 0.5,
        heat[:3, :3].sum() / 30**0.5,
    ]
    torch.testing.assert_close(
        box_scores(heat, boxes), torch.stack(expected).double(), rtol=1e-5, atol=1e-6
    )


def test_the_box_on_the_heat_is_chosen():
    heat = torch.zeros(8, 8)
    heat[2:4, 5:7] = 1.0
    boxes = [[0, 0, 20, 20], [50, 20, 20, 20], [0, 0, 80, 80]]
    found = point(heat, boxes, [50, 20, 20, 20], 80, 80)
    assert (found.box, found.iou, found.hit) == (1, 1.0, True) and found.chance == pytest.approx(
        1 / 3
    )
    assert not point(heat, boxes, [0, 60, 20, 20], 80, 80).hit


def test_a_cold_map_still_chooses_a_box():
    assert point(-torch.ones(4, 4), [[0, 0, 4, 4], [1, 1, 2, 2]], [1, 1, 2, 2], 4, 4).box == 1


@pytest.mark.parametrize(
    ("a", "b"), [([0, 0, 10, 10], [5, 5, 10, 10]), ([2.5, 3.5, 20, 10], [4, 4, 18, 9])]
)
def test_iou_is_symmetric_and_at_most_one(a, b):
    assert iou(a, b) == iou(b, a) and 0 < iou(a, b) < 1 == iou(a, a)


def test_an_overlap_of_one_row_of_pixels_is_none():
    assert iou([0, 0, 10, 10], [9, 0, 10, 10]) == iou([0, 0, 10, 10], [0, 9, 10, 10]) == 0
    assert iou([0, 0, 10, 10], [8, 0, 10, 10]) == pytest.approx(20 / 180)


def test_splits_are_counted_apart():
    results = [
        point(torch.ones(2, 2), [[0, 0, 4, 4]], box, 4, 4)
        for box in ([0, 0, 4, 4], [0, 0, 4, 1], [0, 0, 4, 2])  # the last: an IoU of exactly 0.5
    ]
    found = grounding_accuracy(results, ["val", "val", "testA"])
    assert (
        found["val"]["accuracy"] == 50.0
        and found["testA"]["accuracy"] == found["testA"]["chance"] == 100.0
        and set(found) == {"val", "testA"}
    )


def test_classification():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    found = class_accuracy(logits, torch.tensor([0, 1, 1, 1]), ("a", "b", "c"))
    assert found == {
        "accuracy": 75.0,
        "chance": 75.0,
        "by_class": {"a": 100.0, "b": pytest.approx(200 / 3)},
        "samples": 4,
    }
    assert (
        confusion_table(logits, torch.tensor([0, 0, 1, 1]), ("a", "b", "c")).count("<td>1</td>")
        == 4
    )


def test_cases_cannot_become_markup():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    html = gallery(
        "t",
        torch.tensor([True]),
        lambda i: answer_case([image], "<b>", [("<i>", 0.5)], "<i>", True),
    )
    html += box_case(
        image, enlarge(torch.rand(2, 2), 8, 8), "<u>", [[0, 0, 4, 4]], 0, [0, 0, 4, 4], 1.0
    )
    assert not any(tag in html for tag in ("<b>", "<i>", "<u>"))


def test_pointing_is_beside_chance():
    """A quarter of the pixels lies in the box, whose sides cross no pixel's middle."""
    hit = point(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), [[0, 0, 4, 4]], [0.3, 0, 3.9, 4.4], 8, 8)
    miss = point(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), [[0, 0, 4, 4]], [-9, -9, 10.6, 13], 8, 8)
    assert (hit.hit, hit.inside) == (True, 16 / 64) and (miss.hit, miss.inside) == (False, 8 / 64)
    scores = grounding_accuracy([hit, miss], ["val", "val"])["val"]
    assert scores["pointing_chance"] == 100 * (16 + 8) / 128
    assert score_line(scores, "pointing") == "pointing 50, chance 18.75"


@pytest.mark.parametrize(
    ("splits", "boxes", "metric"),
    [
        (["val", "testA"], [1, 2], "pointing"),
        (["val", "val"], [1, 2], "accuracy"),
        (["testA"], [2], None),
    ],
)
def test_what_chooses_the_best_checkpoint_of_grounding(splits, boxes, metric):
    """Not the choice of a box where there is none to make: it is 100 % of the first validation."""
    targets = [Target(1, split, [0, 0, 1, 1], 8, 8) for split in splits]
    assert choosing_metric(targets, [[[0, 0, 1, 1]] * count for count in boxes]) == metric


def test_a_missing_image_does_not_lose_the_page_of_grounding(tmp_path):
    """Within the error budget it was grey in the evaluation, too."""
    import Grounding

    expressions = SimpleNamespace(
        targets=[Target(1, "val", [0.0, 0.0, 4.0, 4.0], 8, 8)],
        boxes=[[[0.0, 0.0, 4.0, 4.0]]],
        written=["a cat"],
        file=lambda number: tmp_path / "missing.jpg",
    )
    found = [Pointing(box=0, iou=1.0, hit=True, chance=1.0, inside=0.25)]
    score = {"expressions": 1, "accuracy": 100.0, "chance": 100.0, "pointing": 100.0}
    score["pointing_chance"] = 25.0
    with reading(grey=True) as noticed:
        cards = Grounding.report(expressions, torch.rand(1, 2, 2), found, {"val": score})
    assert "a cat" in cards[1] and len(noticed.unreadable) == 1


def test_the_page_of_grounding_has_each_figure_beside_its_chance(tmp_path, monkeypatch):
    import Grounding

    Image.new("RGB", (8, 4)).save(tmp_path / "0.png")
    box, other = [0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 4.0, 2.0]
    expressions = SimpleNamespace(
        targets=[Target(1, "val", other, 4, 8), Target(2, "val", box, 4, 8)],
        boxes=[[box, other]] * 2,
        written=["a cat", "a dog"],
        file=lambda number: tmp_path / "0.png",
    )
    found = [Pointing(0, 0.25, False, 0.5, 0.25), Pointing(0, 0.5, True, 0.5, 0.5)]
    scores = {"expressions": 2, "accuracy": 51.5, "chance": 52.5, "pointing": 53.5}
    scores["pointing_chance"] = 54.5
    shown = []

    def noted(image, heat, *given):
        shown.append((heat, *given))
        return box_case(image, heat, *given)

    monkeypatch.setattr(Grounding, "box_case", noted)
    maps = torch.rand(2, 3, 3)
    tables, examples = Grounding.report(expressions, maps, found, {"val": scores})
    rows = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in tables.split("<tr>")[1:]]
    figures = [row for row in rows if row[0].startswith("val")]
    assert [[word for word in row if "." in word] for row in figures] == [
        ["51.5", "52.5"],
        ["53.5", "54.5"],
    ]
    assert "Wrong: 1 of 2" in examples and "Right: 1 of 2" in examples
    assert examples.index("a cat") < examples.index("a dog")  # the wrong ones first
    for number, (heat, *given) in enumerate(shown):
        torch.testing.assert_close(heat, enlarge(maps[number], 4, 8))
        expected = (expressions.written[number], [box, other], 0)
        assert given == [*expected, expressions.targets[number].box, found[number].iou]
