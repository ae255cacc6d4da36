"""The page of scripts/photos.sh: scores, their mean and std over folds, and what was retrieved."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from evaluation.report.page import score_table
from runtime.config.cli import parse
from scripts import photos_report
from scripts import report as fusion_report


@pytest.mark.parametrize(
    "k, score, said",
    [
        (0, "sum", "ITC"),
        (16, "sum", "by ITM + ITC"),
        (4, "matching", "by ITM"),
        (4, None, "by ITM"),
    ],
)
def test_a_row_of_retrieval_says_what_it_is_ordered_by(k, score, said):
    saved = {"score": score} if score else {}
    order = fusion_report.order_of({"k_test": k}, saved)
    assert order.endswith(said) and (order == "ITC") == (k == 0)


def fold(folder, first, knn):
    """What the steps of photos.sh leave, of four images in their own direction each."""
    keys = [f"{way}_r{at}" for way in ("txt", "img") for at in (1, 5, 10)]
    captions = {f"{key}_z": first for key in keys} | {"chance": dict.fromkeys(keys, 25.0)}
    classes = {"acc1_z": 50.0, "chance": 12.5}
    files = {
        "zeroshot/result/metrics.json": {
            "results": {"captions": captions, "stamps": classes, "captions_de": captions}
        },
        "knn/result/metrics.json": {
            "knn1": knn,
            "knn5_weighted": knn + 2,
            "knn10_weighted": knn + 4,
            "chance": 37.5,
        },
        "main/log.jsonl": {"step": 5, "loss": 1.5},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    for kind in ("img_emb", "text_emb"):
        (folder / "embeddings" / kind).mkdir(parents=True)
        for part, rows in enumerate(np.split(np.eye(4, dtype=np.float16), 2)):
            np.save(folder / f"embeddings/{kind}/{kind}_000{part}.npy", rows)
    return folder


@pytest.fixture
def stamps(tmp_path):
    rows = []
    for number, word in enumerate(["a crow", "a plum", "a rose", "a <moth>"]):
        Image.new("RGB", (8, 8), (number * 60, 0, 0)).save(tmp_path / f"{number}.jpg")
        rows.append({"image": f"{number}.jpg", "caption": [word]})
    (tmp_path / "pairs_test.json").write_text(json.dumps(rows))
    return tmp_path


def report(*flags):
    photos_report.main(parse(photos_report.Config, [str(flag) for flag in flags]))


def test_mean_and_std_over_folds_and_the_gallery(stamps, tmp_path, capsys):
    runs = [fold(tmp_path / "en-0", 40.0, 80.0), fold(tmp_path / "en-1", 50.0, 90.0)]
    report("--runs", *runs, "--data", stamps, "--output", tmp_path / "page.html")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["folds"] == 2
    first = scores["captions R@1"]
    assert (first["mean"], first["chance"]) == (45, 25)
    assert first["std"] == pytest.approx(50**0.5)
    assert scores["zero-shot top 1 of 8 classes"] == {"mean": 50, "std": 0, "chance": 12.5}
    assert scores["1-NN of 8 classes"]["mean"] == 85
    assert scores["1-NN of 8 classes"]["chance"] == 37.5
    assert scores["5-NN of 8 classes, weighted"]["mean"] == 87
    assert scores["10-NN of 8 classes, weighted"]["mean"] == 89
    assert scores["de: images R@5"]["mean"] == 45
    assert "captions R@1" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "45.0 ± 7.1" in page and page.count("By language") == 1
    assert "de: images R@5" not in page, "in the table of languages alone"
    assert "a &lt;moth&gt;" in page and "en-1" in page and "GPL-2" in page
    assert page.count("right one at rank") == 0 and "data:image/jpeg" in page


def test_what_is_named_beside_other_images_and_random_weights(stamps, tmp_path, monkeypatch):
    shown = []

    def table(head, scores, best):
        shown.extend(scores)
        return score_table(head, scores, best)

    monkeypatch.setattr(photos_report, "score_table", table)
    run = fold(tmp_path / "en-0", 40.0, 80.0)
    named = [("crow", "crow"), ("plum", "fruit"), ("rose", "crow"), ("moth", "moth")]
    rows = []
    for number, (noun, first) in enumerate(named):
        labels = [[first, 0.5], ["plum", 0.25]]
        rows.append({"image": f"{number}.jpg", "references": [noun, "thing"], "labels": labels})
    # of 12 pairs of a noun and another image: one crow first; plum on the three others
    found = photos_report.noun_recall(rows)
    assert found["noun among 1"] == (50.0, pytest.approx(100 / 12))
    assert found["noun among 5"] == (75.0, pytest.approx(100 * 4 / 12))
    metrics = {"test": {"recall": 0.625, "precision": 0.25, "f1": 0.375, "chance": 0.125}}
    for folder in ("recognition", "recognition_random"):
        (run / folder / "result").mkdir(parents=True)
        (run / folder / "result/labels_test.json").write_text(json.dumps(rows))
        (run / folder / "result/metrics.json").write_text(json.dumps(metrics))
    report("--runs", run, "--data", stamps, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "from random weights" in page and "shows: moth, thing" in page
    assert "62.5" in page and "Right: 3 of 4" in page and "±" not in page
    assert ("recall by meaning", 62.5, None) in shown and ("f1 by meaning", 37.5, 12.5) in shown


def test_what_is_shown_of_embeddings_and_the_log(stamps, tmp_path, monkeypatch):
    run = fold(tmp_path / "en-0", 40.0, 80.0)
    image = np.load(run / "embeddings/img_emb/img_emb_0001.npy")
    image[1] = [0.8, 0, 0, 0.6]  # the last image is nearest to the first caption
    np.save(run / "embeddings/img_emb/img_emb_0001.npy", image)
    shown = {}
    for name in ("retrieval_gallery", "line_chart"):
        monkeypatch.setattr(
            photos_report, name, lambda *given, name=name: shown.update({name: given})
        )
    photos_report.found_captions(run, stamps, 2)
    files, captions, owner, by_image, by_text, cases = shown["retrieval_gallery"]
    assert files[3] == stamps / "3.jpg" and captions[3] == "a <moth>" and cases == 2
    assert by_image.candidates[:, 0].tolist() == [0, 1, 2, 0] and owner.tolist() == [0, 1, 2, 3]
    assert by_text.candidates[:, 0].tolist() == [0, 1, 2, 3]
    (run / "main/log.jsonl").write_text('{"step": 1, "lr": 0.1}\n{"step": 5, "loss": 1.5}\n')
    monkeypatch.setattr(photos_report, "card", lambda *given, **more: given)
    photos_report.curves(run)
    assert shown["line_chart"][0] == {"loss": [(5, 1.5)]}


def test_embeddings_of_other_images_are_refused(stamps, tmp_path):
    run = fold(tmp_path / "en-0", 40.0, 80.0)
    np.save(run / "embeddings/img_emb/img_emb_0001.npy", np.eye(3, 4, dtype=np.float16))
    with pytest.raises(UserError, match=r"5 rows, but .* has 4"):
        report("--runs", run, "--data", stamps, "--output", tmp_path / "page.html")
    (run / "knn/result/metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json"):
        report("--runs", run, "--data", stamps, "--output", tmp_path / "page.html")


def test_maps_are_of_words():
    words = ["a", "school", "”", "-", "crossing", "2"]
    assert [word for word in words if fusion_report.is_telling(word)] == ["school", "crossing", "2"]


@pytest.mark.parametrize("layer", [2, 5])
def test_a_layer_that_does_not_tell_words_apart_is_refused(layer):
    bert = SimpleNamespace(num_hidden_layers=6, fusion_layer=3)
    model = SimpleNamespace(config=SimpleNamespace(bert=bert))
    with pytest.raises(UserError, match=rf"layer: {layer} does not .* choose 3\.\.4"):
        fusion_report.attention_section(model, None, None, None, fusion_report.Config(layer=layer))


def test_minutes_of_training_in_a_log(tmp_path):
    logged = [
        {"step": 10, "step_s": 6.0, "loss": 2.0},
        {"step": 10, "val_txt_r1": 3.0},
        {"note": 1},
    ]
    logged.append({"step": 30, "step_s": 3.0, "loss": "nan"})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, logged)))
    lines = fusion_report.timed_log(tmp_path)
    assert [line["minutes"] for line in lines] == [1.0, 1.0, 2.0]
    assert fusion_report.points(lines, "loss", "minutes") == [(1.0, 2.0)]
    assert fusion_report.timed_log(None) == fusion_report.timed_log(tmp_path / "none") == []
