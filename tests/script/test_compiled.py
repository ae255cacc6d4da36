"""Compiled steps give the losses of eager ones: each method at debug size, and a whole run."""

import json

import pytest
import torch

from scripts.gpu_checks.checks import COMPILED, TOLERANCE
from scripts.gpu_checks.runs import Run, difference, without_randomness
from scripts.planning.methods import STEPS
from tests.helpers.classification_runs import flags, train

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
GENERATED = ("ve",)  # with kernels in C++, as the runs below and in test_main_script.py


@pytest.mark.parametrize("name", [name for name in COMPILED if name != "vit"])  # which runs below
def test_compiled_methods(name, request):
    if name not in GENERATED:
        request.getfixturevalue("eager_kernels")
    with without_randomness():
        eager = Run(STEPS[name], CPU, "fp32").losses()
        compiled = Run(STEPS[name], CPU, "fp32", compile=True).losses()
    assert difference(compiled, eager) <= TOLERANCE["fp32"]


def losses(data, out, **changes) -> list[float]:
    train(flags(data, out, dropout=0, mixup_alpha=0, **changes))
    lines = (out / "log.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_compiled_run(digitscenes, tmp_path, capsys):
    """Training with average and validation, by the script itself; it says that it compiles."""
    eager = losses(digitscenes, tmp_path / "eager", compile="false")
    assert "compiling" not in capsys.readouterr().out
    compiled = losses(digitscenes, tmp_path / "compiled", compile="true")
    assert "compiling the network: the first update takes minutes" in capsys.readouterr().out
    assert len(eager) == 6 and eager[0] != eager[-1]
    assert compiled == pytest.approx(eager, rel=1e-3)
