"""The page that compares runs: every run is found, linked, drawn and compared."""

import json
import re
import shutil
from pathlib import Path

import pytest

from base.errors import UserError
from evaluation.report.runs import curves, find_runs, points, read_log, runs_page, write_index
from scripts import compare


def make_run(folder: Path, lr: float, losses: list[float], metrics: dict | None = None) -> None:
    folder.mkdir(parents=True)
    options = f"output_dir: {folder}\nnetwork:\n  width: 8\nlr: {lr}  # learning rate\n"
    (folder / "config.yaml").write_text(options)
    rows = [{"step": 10 * n, "epoch": n / 2, "loss": v} for n, v in enumerate(losses, 1)]
    rows.append({"step": 10 * len(losses), "val_accuracy": 50 + lr, "val_note": "text"})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if metrics:
        (folder / "result").mkdir()
        (folder / "result/metrics.json").write_text(json.dumps(metrics))
        (folder / "result/report.html").write_text("<p>a report</p>")
        (folder / "result/config.yaml").write_text("split: test\n")


@pytest.fixture
def root(tmp_path) -> Path:
    make_run(
        tmp_path / "out/a & b", 0.1, [3.0, 2.0, 1.5], {"test": {"accuracy": 61.25}, "ok": True}
    )
    make_run(tmp_path / "out/deep/c", 0.2, [3.0, 2.5])
    evaluation = tmp_path / "out/zero_shot/result"
    evaluation.mkdir(parents=True)
    (evaluation / "config.yaml").write_text("split: test\n")
    (evaluation / "metrics.json").write_text('{"accuracy": 12.5}')
    return tmp_path / "out"


def test_runs_evaluations_and_what_they_left(root):
    trained, other, evaluated = find_runs(root)
    assert (trained.name, other.name, evaluated.name) == ("a & b", "deep/c", "zero_shot")
    assert (trained.steps, other.steps, evaluated.steps) == (30, 20, None)
    assert trained.metrics == {"test.accuracy": 61.25}  # True is no score
    assert evaluated.metrics == {"accuracy": 12.5}
    assert trained.config["network.width"] == 8
    assert points(trained, "loss") == [(10, 3.0), (20, 2.0), (30, 1.5)]
    assert points(trained, "val_accuracy") == [(30, 50.1)]
    assert points(trained, "val_note") == []


def test_several_folders_and_a_page_elsewhere(root, tmp_path, capsys):
    shutil.copytree(root / "deep", tmp_path / "more/d")
    page = tmp_path / "pages/comparison.html"
    compare.main(compare.Config([root, tmp_path / "more"], page=page))
    assert capsys.readouterr().out == f"4 runs compared: {page}\n"
    assert 'href="../out/a%20%26%20b/result/report.html"' in page.read_text()
    assert not (root / "index.html").exists()
    compare.main(compare.Config([tmp_path / "more", root]))
    assert (tmp_path / "more/index.html").is_file()
    with pytest.raises(UserError, match=r"none: no such folder; name the output_dir of a run"):
        compare.main(compare.Config([root, tmp_path / "none"]))


def test_page_links_draws_and_compares(root):
    html = str(runs_page(find_runs(root), root, "Runs in out"))
    assert 'href="a%20%26%20b/result/report.html">a &amp; b</a>' in html
    assert (root / "a & b/result/report.html").is_file()
    assert html.count("<polyline") >= 2 and "61.25" in html
    differences = html[html.index("Options that differ") :]
    rows = re.findall(r"<td[^>]*>([^<]+)</td>", differences)
    assert {"lr", "network.width", "split"} <= set(rows)  # the evaluation has no lr and no width
    assert "output_dir" not in differences
    assert "network.width" not in str(runs_page(find_runs(root)[:2], root, "two"))  # alike in both


def test_scores_say_of_which_checkpoint_and_data_they_are(root):
    """Those of the last evaluation in the folder, whose options are not those of its training."""
    result = root / "a & b/result"
    (result / "config.yaml").write_text("val_data: imagenet/val\ntest_file: [x.json]\nlr: 9\n")
    metrics = {"checkpoint": "other/best.pt", "test": {"accuracy": 61.25}}
    (result / "metrics.json").write_text(json.dumps(metrics))
    runs = find_runs(root)
    assert runs[0].config["lr"] != 9 and runs[0].metrics == {"test.accuracy": 61.25}
    html = str(runs_page(runs, root, "Runs in out"))
    scores = html[html.index("Scores") : html.index("Options that differ")]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", scores)
    for key, value in (("checkpoint", "other/best.pt"), ("val_data", "imagenet/val")):
        others = ""  # nothing is known of the other's
        assert cells[cells.index(key) :][:3] == [key, value, others]
    assert cells[cells.index("test_file") + 1] == "x.json"


def test_a_quantity_that_never_changes_has_no_chart(root):
    """Nor have ensembles by one weight each, which would take the room of all others."""
    runs = find_runs(root)
    for run in runs:
        run.log = [{**row, "constant": 7, "val_acc1_zh_0.6": row["step"]} for row in run.log]
    titles = re.findall(r'class="title"[^>]*>([^<]+)<', "".join(curves(runs)))
    assert titles == ["loss", "val_accuracy"]


def test_a_log_whose_last_line_is_being_written_is_read(root):
    log = root / "deep/c/log.jsonl"
    log.write_text(log.read_text() + '{"step": 30, "lo')
    assert find_runs(root)[1].steps == 20
    log.write_text('{"step": 1, "lo\n' + log.read_text())
    with pytest.raises(UserError, match=r"log.jsonl, line 1"):
        read_log(log)


FOREIGN = [  # logs of other projects, for `step`, `epoch` and `loss` mean what they like there
    '{"step": "1/9", "epoch": "1/3", "loss": 0.5}\n{"step": "2/9", "epoch": "1/3", "loss": 0.25}\n',
    '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 3, "loss": 1'
    + "0" * 400
    + "}\n",
]


@pytest.mark.parametrize("log", FOREIGN)
def test_what_others_logged_ends_no_page(log, root, capsys):
    (root / "theirs/result").mkdir(parents=True)
    (root / "theirs/config.yaml").write_text("lr: 3\n")
    (root / "theirs/log.jsonl").write_text(log)
    (root / "theirs/result/metrics.json").write_text('{"a": 1, "c": 1' + "0" * 400 + "}")
    theirs = find_runs(root)[2]
    assert theirs.name == "theirs" and theirs.metrics == {"a": 1}
    assert write_index(root / "a & b").is_file() and "not written" not in capsys.readouterr().out


def test_folders_of_others_are_no_runs_or_named(root, capsys):
    """W&B keeps a config.yaml in every run's folder; a damaged one costs its row alone."""
    inside = root / "a & b/wandb/run-20260101-x1/files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("lr:\n  value: 1\n")
    (root / "hydra").mkdir()
    (root / "hydra/config.yaml").write_text("- a\n- b\n")
    (root / "deep/c/log.jsonl").write_text('{"step": 1, "lo\n{"step": 2}\n')
    assert [run.name for run in find_runs(root)] == ["a & b", "zero_shot"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "deep/c/log.jsonl, line 1" in said[0] and "hydra" in said[1]


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no run in it"):
        find_runs(tmp_path)


def test_a_run_writes_the_page_of_itself_and_of_the_runs_beside_it(root, capsys):
    own = root / "a & b"
    make_run(own / "probe", 0.3, [1.0])
    (root / "broken").mkdir()
    (root / "broken/config.yaml").write_text("lr: [1\n")
    html = write_index(own).read_text()
    rows = re.findall(r'<td class="text">(?:<a[^>]*>)?([^<]+)', html[: html.index("Curves")])
    assert rows == ["a &amp; b", "probe", "zero_shot"]  # not deep/c, not the damaged one
    assert 'href="result/report.html">a &amp; b</a>' in html and "test: accuracy" in html
    assert not (root / "index.html").exists() and not capsys.readouterr().out


def test_the_page_above_is_written_again_only_where_it_is_one_of_ours(root):
    above = root / "index.html"
    above.write_text("<html>my own page</html>")
    write_index(root / "a & b")
    assert above.read_text() == "<html>my own page</html>"
    above.write_text(runs_page(find_runs(root)[:1], root, "Runs in out"))
    assert "deep/c" not in above.read_text()
    write_index(root / "a & b")
    assert "deep/c" in above.read_text()


def test_a_page_that_cannot_be_written_is_said_and_harms_nothing(root, capsys):
    (root / "zero_shot/index.html").mkdir()
    assert write_index(root / "zero_shot") is None
    assert "the page of all runs was not written" in capsys.readouterr().out


def test_of_a_log_above_the_limit_there_are_no_curves(root, monkeypatch):
    monkeypatch.setattr("evaluation.report.runs.LOG_BYTES", 10)
    assert "<polyline" not in write_index(root / "a & b").read_text()
