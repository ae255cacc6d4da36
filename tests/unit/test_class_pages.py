"""Pages of classified images: the figures of their tables, the confusions, and that a click sorts."""

import re
from shutil import which

import pytest
import torch

from base.errors import BadSample
from evaluation.classification import Scores, Validation, validate
from evaluation.knn import Neighbours
from evaluation.predict import Guesses
from evaluation.report.classes import (
    ClassNames,
    Shown,
    class_case,
    class_table,
    classification_card,
    classification_report,
    confusion_card,
    score_card,
)
from evaluation.report.images import LazyImages
from evaluation.report.names import score_name
from evaluation.report.neighbours import neighbour_report
from evaluation.report.page import page
from evaluation.zeroshot import Classified

NAMES = ["cat", "<b>dog", ["crane", "bird"]]
TRUTH = [0, 0, 0, 1, 1, 2]
SAID = [0, 1, 1, 1, 0, 2]


def guesses(truth=None, said=None) -> Guesses:
    first = torch.tensor(said or SAID)
    classes = torch.stack([first, (first + 1) % 3], 1)
    scores = torch.tensor([0.75, 0.125]).expand(len(first), 2)
    return Guesses(classes, scores, truth or [[label] for label in TRUTH])


def image(number: int) -> torch.Tensor:
    if number == 5:
        raise BadSample("5.jpg: damaged")
    return torch.full((3, 8, 8), 20 * number, dtype=torch.uint8)


def cells(html: str) -> list[list[str]]:
    """The rows of the tables, without their bars."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [re.findall(r"<td[^>]*>([^<]*)(?:</td>|(?=<div))", row) for row in rows]


def test_the_table_has_the_figures_of_every_class_worst_first():
    rows = cells(class_table("set", guesses(), ClassNames(NAMES)))[1:]
    assert rows == [
        ["cat", "3", "33.3", "", "50.0", "&lt;b&gt;dog (2)"],
        ["&lt;b&gt;dog", "2", "50.0", "", "33.3", "cat (1)"],
        ["crane", "1", "100.0", "", "100.0", ""],
    ]


def test_of_several_labels_as_many_guesses_count():
    truth = [[0, 1], [2, 1], [1], [], [1], [2]]
    html = class_table("set", guesses(truth), ClassNames(NAMES))
    assert "recall, %" in html
    figures = {row[0]: row[1:5] for row in cells(html)[1:]}
    assert "most often taken for" in html  # an image of one label was confused
    # said: {0,1}, {1,2}, 1, (none), 0, 2
    assert figures["crane"] == ["2", "100.0", "", "100.0"]
    assert figures["cat"] == ["1", "100.0", "", "50.0"]
    assert figures["&lt;b&gt;dog"] == ["4", "75.0", "", "100.0"]


def test_confusions_are_counted_and_shown_with_their_images():
    html = confusion_card("set", guesses(), ClassNames(NAMES), LazyImages(image, 6))
    found = re.findall(r'badge">([^<]+)</span>.*?quote">([^<]+)<', html, re.S)
    assert found == [("2 of 3", "cat → &lt;b&gt;dog"), ("1 of 2", "&lt;b&gt;dog → cat")]
    assert html.count("<img") == 3
    assert html.count('alt="cat, taken for &lt;b&gt;dog"') == 2
    right = guesses(said=TRUTH)
    assert confusion_card("set", right, ClassNames(NAMES), LazyImages(image, 6)) is None


def test_the_report_names_scores_classes_and_right_and_wrong_images():
    logits = torch.nn.functional.one_hot(torch.tensor(SAID), 3).float()
    validation = validate(Scores(logits, range(6), [[label] for label in TRUTH]), False)
    html = page("t", classification_report("set", NAMES, validation, image))
    assert "top-1 accuracy" in html and "top1" not in html
    assert "Wrong: 3 of 6" in html and "Right: 3 of 6" in html
    assert f"{torch.tensor([1.0, 0, 0]).softmax(0)[0]:.1%}" in html  # 57.6%
    assert "<b>dog" not in html and html.count("<script>") == 1
    assert ClassNames(NAMES)(7) == "class 7"


def test_lines_are_green_where_right_and_red_where_said_and_wrong():
    truth = [[0], [1, 2]]
    shown = Guesses(torch.tensor([[1, 2, 0], [2, 0, 1]]), None, truth)
    for number, kinds in ((0, ["", "other", "right"]), (1, ["right", "", "right"])):
        html = class_case(number, shown, ClassNames(NAMES), image(0), False, "")
        lines = re.findall(r"<li(?: class=\"(\w+)\")?>", html)
        assert lines == kinds


def test_names_of_scores():
    assert score_name("knn1") == "nearest neighbour"
    assert score_name("knn20_weighted_top5") == "20 nearest neighbours, weighted votes, top 5"
    assert score_name("images") is None
    html = score_card("t", {"knn1": 50.0, "chance": 12.5, "images": 1200, "loss": 0.25})
    assert "12.5" in html and "images: 1,200 · mean loss: 0.25" in html
    truth = [[number % 6] for number in range(8)]  # 0 and 1 twice, 2 to 5 once
    html = score_card("t", {"knn20_top5": 90.0, "chance": 25.0}, truth)
    assert ">87.5<" in html, "seven of eight are of the five most frequent classes"
    assert ">87.5<" not in score_card("t", {"top5": 90.0}, [[0, 1], [2]])
    several = {
        "precision@1": 51.0,
        "hit@1": 51.0,
        "precision@5": 52.0,
        "hit@5": 99.0,
        "F1_micro": 9.0,
    }
    html = score_card("t", several, [[0, 1], [0, 2], [1, 3], [5, 4], []])
    chance = re.findall(r"<td>(\d+\.\d|)</td><td><div", html)
    assert chance == ["40.0", "40.0", "28.0", "80.0", ""], "0 to 5, of which 4 is named last"


def test_scores_of_one_process_become_guesses():
    scores = Scores(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), range(2), [[1], [2]])
    single, several = scores.guesses(), scores.guesses(sigmoid=True)
    assert single.classes.tolist() == several.classes.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert torch.allclose(single.scores.sum(1), torch.ones(2))
    many = Scores(torch.randn(1, 30), range(1), [list(range(7))]).guesses(sigmoid=True)
    assert many.classes.shape == (1, 7)
    assert torch.allclose(several.scores[0], torch.tensor([3.0, 1.0, 0.0]).sigmoid())


def test_neighbours_are_shown_beside_an_image():
    near = Neighbours(torch.tensor([[0.9, 0.5], [0.8, 0.7]]), torch.tensor([[2, 0], [1, 0]]))
    labels = torch.tensor([0, 0, 1]), torch.tensor([1, 1])
    metrics = {"knn1": 50.0, "images": 2}
    images = (lambda number: image(number), lambda number: image(number + 3))
    html = page("t", neighbour_report("set", NAMES, metrics, near, labels, images, 0.07))
    hits = re.findall(r'thumb frame( right)?".*?figcaption>([^<]+)<', html)
    assert sorted(hits) == [("", "0.50"), ("", "0.70"), ("", "0.80"), (" right", "0.90")]
    assert "Wrong: 1 of 2" in html


def test_the_card_of_a_zero_shot_data_set():
    figures = torch.tensor([100.0, 50.0, float("nan")], dtype=torch.float64)
    best = torch.tensor([[1, 0], [0, 1], [0, 2]])
    single = Classified({}, best, torch.tensor([1, 1, 0]), figures)
    shown = Shown([{"image": image(0)}, {"image": image(1)}, {"image": image(2)}])
    html = classification_card("set", shown, NAMES, single)
    assert html.startswith("<details>") and "Wrong: 1 of 3" in html and "1 of 2" in html
    several = Classified({}, best, torch.tensor([[1, 0, 0], [1, 1, -1], [0, 1, 0]]), figures)
    rows = cells(classification_card("set", shown, NAMES, several))[1:]
    assert rows == [["&lt;b&gt;dog", "2", "50.0", ""], ["cat", "2", "100.0", ""]]


def test_pages_without_such_a_table_have_no_script():
    assert "<script" not in page("t", [score_card("t", {"top1": 1.0})])
    assert Validation().metrics == {}


@pytest.mark.slow
def test_a_click_on_a_heading_sorts_the_table(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    browser = which("chromium") or which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    said = [0] * 9 + [1] + [2] * 2
    truth = [[0]] * 10 + [[1]] + [[2]]
    table = class_table("set", guesses(truth, said), ClassNames(["cat", "ape", "Dog"]))
    (tmp_path / "page.html").write_text(page("t", [table]))
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = started.new_page()
        view.goto(f"file://{tmp_path}/page.html")

        def column(number: int) -> list[str]:
            return view.locator(f"tbody td:nth-child({number})").all_inner_texts()

        assert column(1) == ["ape", "cat", "Dog"]
        view.click("th >> text=images")
        assert column(2) == ["1", "1", "10"]  # by value, not by text
        view.click("th >> text=images")
        assert column(2) == ["10", "1", "1"]
        view.locator("th >> text=class").press("Enter")
        assert column(1) == ["ape", "cat", "Dog"]
        view.click("th >> text=/most often/")
        assert column(6)[-1] == ""  # empty cells come last
        started.close()
