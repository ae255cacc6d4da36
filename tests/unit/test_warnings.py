"""How warnings reach the terminal."""

import warnings
from dataclasses import dataclass

import torch

from dataset.tasks.vqa import read_answer_list
from runtime.advice import ends_with_advice, format_warning
from runtime.config.cli import run_script


@dataclass
class Config:
    """No options."""


def test_a_warning_of_ours_has_no_line_of_code(tmp_path, monkeypatch):
    (tmp_path / "answers.json").write_text('["yes", "yes"]')
    expected = f"warning: {tmp_path}/answers.json: 1 answers are listed again, e.g. 'yes'\n"
    said = []

    def main(*_) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            read_answer_list(tmp_path / "answers.json")
        (one,) = found
        said.append(warnings.formatwarning(one.message, one.category, one.filename, one.lineno))
        return 0

    for start in (lambda: run_script(main, Config, argv=[]), ends_with_advice(main)):
        with monkeypatch.context() as here:
            here.setattr(warnings, "formatwarning", warnings.formatwarning)
            start()
    assert said == [expected, expected]
    of_torch = format_warning(UserWarning("odd"), UserWarning, torch.__file__, 1)
    assert of_torch.startswith(f"{torch.__file__}:1: UserWarning: odd")
