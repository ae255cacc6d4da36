"""The learning benchmark: both sides get the same pairs, one evaluator, a table by seeds."""

import csv
import json

import pytest
import torch
from PIL import Image

from base.errors import UserError
from base.files import read_json_lines, write_json
from benchmarks import learning


@pytest.fixture
def config(tmp_path) -> learning.Config:
    """Eight images of one grey level each, two captions an image, the same to train and to test."""
    rows = []
    for number in range(8):
        Image.new("RGB", (60, 50), (30 * number,) * 3).save(tmp_path / f"{number}.png")
        captions = [f"level {'abcdefgh'[number]}", f"grey {'abcdefgh'[number]}"]
        rows.append({"image": f"{number}.png", "caption": captions})
    write_json(tmp_path / "pairs.json", rows)
    folder = tmp_path / "runs"
    folder.mkdir()
    given = {"train_data": tmp_path / "pairs.json", "test_data": tmp_path / "pairs.json"}
    return learning.Config(image_root=tmp_path, folder=folder, report="", **given)


def test_both_sides_read_the_same_pairs(config):
    config.pairs = 10
    assert learning.write_pairs(config) == 10
    ours = [
        (row["image"], *row["caption"]) for row in read_json_lines(config.folder / "train.jsonl")
    ]
    with open(config.folder / "train.csv", newline="") as file:
        head, *theirs = csv.reader(file, delimiter="\t")
    assert head == ["filepath", "title"]
    assert ours == [tuple(row) for row in theirs] and len(set(ours)) == 10
    config.pairs = 0
    assert learning.write_pairs(config) == 16


def test_recall_counts_what_the_embeddings_find(config):
    """Images by their grey level, captions by the letter that names it; then two levels confused."""
    tokenize = learning.ClipTokenizer(None, learning.CONTEXT)
    last = {int(tokenize([f"grey {'abcdefgh'[n]}"])[0, 2]): n for n in range(8)}
    levels = []

    def embed_image(image: torch.Tensor) -> torch.Tensor:
        levels.extend(image.mean((1, 2, 3)).tolist())
        return torch.eye(8)[torch.tensor(levels).argsort().argsort()]

    def embed_text(ids: torch.Tensor) -> torch.Tensor:
        return torch.eye(8)[[last[int(row[2])] for row in ids]]

    assert learning.recall(config, embed_image, embed_text) == {"captions": 100, "images": 100}
    last = {token: max(number, 1) for token, number in last.items()}
    levels.clear()
    found = learning.recall(config, embed_image, embed_text)
    assert found["captions"] == pytest.approx(87.5) and found["images"] == pytest.approx(87.5)


def test_the_table_has_mean_standard_error_and_every_seed():
    runs = [{"captions": 50.0, "images": 40.0, "cpu_seconds": 10.0}]
    runs.append({"captions": 54.0, "images": 43.0, "cpu_seconds": 10.0})
    row = learning.table({"ours": runs}, 1000).splitlines()[-1]
    assert row == "| ours | 52.0 ± 2.0 (50.0, 54.0) | 41.5 ± 1.5 (40.0, 43.0) | 100 |"
    assert learning.spread([7.0]) == "7.0 (7.0)"


def test_options_that_do_not_fit_are_refused(config):
    config.sides = ["theirs"]
    with pytest.raises(UserError, match="--sides theirs is unknown; use ours or open_clip"):
        config.check()
    with pytest.raises(UserError, match="give all three"):
        learning.Config(train_data=config.train_data).check()


@pytest.mark.slow
def test_both_sides_train_and_are_evaluated(config, capsys):
    pytest.importorskip("webdataset", reason="open_clip's training script needs it")
    config.tiny, config.batch, config.warmup, config.seeds = True, 4, 1, [0, 1]
    learning.main(config)
    said = capsys.readouterr().out
    figures = [line.split(" ", 2) for line in said.splitlines() if line[-1:] == "}"]
    assert [(side, seed) for side, seed, _ in figures] == [
        (side, seed) for seed in ("0", "1") for side in ("ours", "open_clip")
    ]
    assert all(0 <= json.loads(text)["captions"] <= 100 for *_, text in figures)
    assert "8 samples" in said
    assert "--seeds 0 1" in said
