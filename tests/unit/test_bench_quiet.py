"""The rows of a quiet machine: which are measured, with what, and what reaches the page."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from base.errors import UserError
from base.reading import read_json_lines
from benchmarks import quiet, runner
from benchmarks.table import append_record
from runtime.config.cli import parse


@pytest.fixture
def config(tmp_path) -> quiet.Config:
    return quiet.Config(record=tmp_path / "rows.jsonl", report=str(tmp_path / "page.md"))


def measure(monkeypatch, rows: dict) -> list[str]:
    """Let rows take as many minutes as they should, and fail where `rows` has an error; the list
    gets the benchmarks that were started."""
    started = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(quiet, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def measure_row(row, config, peers):
        started.append(row.command)
        clock.now += 60 * row.minutes
        if row.command in rows:
            raise rows[row.command]
        append_record(config.record, {"title": row.command, "text": "| table |"})

    monkeypatch.setattr(quiet, "measure_row", measure_row)
    return started


def test_rows_run_by_importance_until_the_minutes_are_used(config, tmp_path, monkeypatch, capsys):
    rows = {"a": quiet.Row("a", 4), "b": quiet.Row("b", 7), "c": quiet.Row("c", 6)}
    monkeypatch.setattr(quiet, "ROWS", {**rows, "d": quiet.Row("d", 1, peer="simla")})
    started = measure(monkeypatch, {"a": UserError("other work is running")})
    config.minutes, config.rows = 11, ["a", "b", "c", "d"]
    quiet.main(config)
    assert started == ["a", "b"]
    said = capsys.readouterr().out
    assert "a: not recorded, other work is running" in said
    assert "c: left out, 6 minutes of 0.0 left" in said and "--peers simla=PATH" in said
    assert [record["title"] for record in read_json_lines(config.record)] == ["b"]
    page = (tmp_path / "page.md").read_text()
    assert "## b\n\n| table |" in page and "## a" not in page


def test_no_minutes_write_the_page_alone(config, tmp_path, monkeypatch):
    started = measure(monkeypatch, {})
    for text in ("first", "second"):
        append_record(config.record, {"title": "CLIP", "text": text})
    config.minutes = 0
    quiet.main(config)
    assert started == [] and (tmp_path / "page.md").read_text().endswith("## CLIP\n\nsecond\n")


@pytest.mark.parametrize("name", quiet.ROWS)
def test_every_row_is_a_benchmark_with_these_options(name, config, monkeypatch):
    row = quiet.ROWS[name]
    module = importlib.import_module(f"benchmarks.{row.command.split()[0]}")
    given = []
    monkeypatch.setattr(module, "main", given.append)
    config.repeats, config.wait = 5, 7.0
    quiet.measure_row(row, config, {"simla": Path("/checkout"), "clip-rocket": Path("/checkout")})
    (options,) = given
    assert options.repeats == (1 if name == "tiles" else 5) and options.wait == 7
    assert options.record == config.record and options.report == "" and not options.busy
    assert getattr(options, "peer", None) == ("/checkout" if row.peer else None)


def test_checkouts_are_folders_under_known_names(tmp_path):
    known = ["clip-rocket", "simla"]
    assert runner.checkouts([f"simla={tmp_path}"], known, "--peers") == {"simla": tmp_path}
    with pytest.raises(UserError, match=r"--peers blip=.: .*NAME is one of clip-rocket, simla"):
        runner.checkouts(["blip=."], known, "--peers")
    with pytest.raises(UserError, match="no such folder; PATH is a checkout of simla"):
        quiet.main(quiet.Config(peers=[f"simla={tmp_path}/none"]))


def test_a_busy_machine_has_no_rows(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "current_load", lambda: 1.0)
    module = importlib.import_module("benchmarks.views")
    monkeypatch.setattr(module, "write_images", lambda folder: 0)
    words = ["--rows", "views", "--wait", "0", "--record", str(config.record)]
    quiet.main(parse(quiet.Config, [*words, "--report", str(tmp_path / "page.md")]))
    assert "views: not recorded, other work is running (load 1.0" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
