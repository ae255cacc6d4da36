"""The page of scripts/photos.sh: scores, their mean and std over folds, and what was retrieved."""

import json

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from runtime.config.cli import parse
from scripts import photos_report


def fold(folder, first, knn):
    """What the steps of photos.sh leave, of four images in their own direction each."""
    keys = [f"{way}_r{at}" for way in ("txt", "img") for at in (1, 5, 10)]
    captions = {f"{key}_z": first for key in keys} | {"chance": dict.fromkeys(keys, 25.0)}
    classes = {"acc1_z": 50.0, "chance": 12.5}
    files = {
        "zeroshot/result/metrics.json": {"results": {"captions": captions, "stamps": classes}},
        "knn/result/metrics.json": {"knn1": knn, "chance": 37.5},
        "main/log.jsonl": {"step": 5, "loss": 1.5},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    for kind in ("img_emb", "text_emb"):
        (folder / "embeddings" / kind).mkdir(parents=True)
        np.save(folder / f"embeddings/{kind}/{kind}_0000.npy", np.eye(4, dtype=np.float16))
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
    assert scores["1-NN of 8 classes"]["mean"] == 85
    assert "captions R@1" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;moth&gt;" in page and "en-1" in page and "GPL-2" in page
    assert page.count("right one at rank") == 0 and "data:image/jpeg" in page


def test_embeddings_of_other_images_are_refused(stamps, tmp_path):
    run = fold(tmp_path / "en-0", 40.0, 80.0)
    np.save(run / "embeddings/img_emb/img_emb_0000.npy", np.eye(5, 4, dtype=np.float16))
    with pytest.raises(UserError, match=r"5 rows, but .* has 4"):
        report("--runs", run, "--data", stamps, "--output", tmp_path / "page.html")
    (run / "knn/result/metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json"):
        report("--runs", run, "--data", stamps, "--output", tmp_path / "page.html")
