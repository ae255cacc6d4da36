"""DigitScenes is made when a configuration names it, once, and not otherwise."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from base.errors import UserError
from runtime import builtin_data
from runtime.builtin_data import FOLDER, MANIFEST, make_digitscenes, make_digitscenes_if_named

SMALL = ("--train", "24", "--val", "20", "--test", "20", "--size", "32")


@dataclass
class Section:
    file: Path | None = None


@dataclass
class Options:
    train_file: list[str] = field(default_factory=list)
    section: Section = field(default_factory=Section)


def test_made_when_named_in_a_list_or_a_section_and_then_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not make_digitscenes_if_named(Options(["data/mine.json"]), *SMALL)
    assert not (tmp_path / "data").exists()
    assert make_digitscenes_if_named(Options(section=Section(FOLDER / "labels.json")), *SMALL)
    assert (FOLDER / MANIFEST).is_file() and (FOLDER / "pretrain_train.json").is_file()
    before = (FOLDER / MANIFEST).stat().st_mtime_ns
    assert not make_digitscenes_if_named(Options(["data/digitscenes/pretrain_train.json"]), *SMALL)
    assert (FOLDER / MANIFEST).stat().st_mtime_ns == before


def test_a_builder_that_fails_is_one_sentence_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin_data, "BUILDER", tmp_path / "missing.py")
    folder = tmp_path / "benchmark/digitscenes"
    with pytest.raises(UserError, match=f"{folder} could not be made; try: python .* {folder}$"):
        make_digitscenes(folder)
    assert not folder.exists()


def test_its_builder_does_without_torch():
    """Whose import took two of the seconds before the first run."""
    words = "import sys, dataset.digitscenes.build, dataset.text.sentencepiece; "
    words += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
