"""Every training script, its newest or its best checkpoint damaged: it says so, falls back, and
ends with the weights and scores it had; its folder can still be evaluated. A run gives no warning,
and one that is finished keeps its results when it is started again."""

import re

import pytest
import torch

from runtime.checkpoint import CheckpointFolder, find_damage, read_weights
from tests.helpers import classification_runs, downstream, main_runs, pretraining, recognition_runs
from tests.helpers.crash_points import plain
from tests.helpers.processes import run_script

STEPS = {"epochs": "3 steps", "eval_every": "1 steps", "save_every": "1 steps", "keep": "3"}
SCRIPTS = ("Pretrain", "Retrieval", "VQA", "VE", "NLVR", "Grounding", "main", "Classification")
SCRIPTS += ("Recognition",)


def command_line(script: str, data, tokenizer, out) -> list[str]:
    """Three updates, each validated and saved."""
    steps = [word for name, value in STEPS.items() for word in (f"--{name}", value)]
    if script == "Pretrain":
        return [
            *pretraining.arguments(data, tokenizer, out),
            *steps[:2],
            *steps[4:],
        ]  # it validates nothing
    if script == "main":
        return [*main_runs.arguments(data, out), *steps]
    if script == "Classification":
        return [*classification_runs.flags(data, out), *steps]
    if script == "Recognition":
        return [*recognition_runs.arguments(data, out), *steps]
    return downstream.flags(script, data, out, *steps)


def results_of(run) -> list:
    """What a run leaves to its reader: the scores, the page with them, the published weights."""
    scores = run / "result/metrics.json"
    found = []
    if scores.is_file():
        found = [scores.read_text(), (run / "result/report.html").read_text()]
        assert re.search(r'"(val|test|testA|top1|mAP)"', found[0]), found[0]
    return found + [file.read_bytes() for file in sorted(run.glob("*.safetensors"))]


def flip_a_bit(file) -> None:
    """In place: the best checkpoint, which is the same file, is damaged with a numbered one."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


CASES = [("VE", "single")]
CASES += [pytest.param(name, "single", marks=pytest.mark.slow) for name in SCRIPTS if name != "VE"]
CASES += [pytest.param(name, "sharded", marks=pytest.mark.slow) for name in ("VE", "main")]


def values(checkpoint) -> str:
    """Everything in a checkpoint of either kind."""
    files = sorted(checkpoint.glob("rank_*.pt")) if checkpoint.is_dir() else [checkpoint]
    return plain([torch.load(file, weights_only=True) for file in files])


def damage(checkpoint) -> None:
    flip_a_bit(checkpoint / "rank_00000.pt" if checkpoint.is_dir() else checkpoint)


@pytest.mark.parametrize(("script", "kind"), CASES)
def test_a_damaged_checkpoint_is_passed_over(script, kind, digitscenes, image_tokenizer, tmp_path):
    run = tmp_path / "run"
    flags = command_line(script, digitscenes, image_tokenizer, run)
    flags += ["--checkpoint_format", kind]
    said = run_script(f"{script}.py", flags)
    assert "Warning" not in said, said  # ours, torch's or another library's
    folder = CheckpointFolder(run)
    newest = folder.numbered()[0]
    before = values(newest)
    damage(newest)
    if folder.best and not find_damage(folder.best):
        damage(folder.best)
    with pytest.warns(UserWarning, match="CHECKPOINT DAMAGED"):
        assert read_weights(run)  # what --evaluate and --checkpoint of a folder do
    said = run_script(f"{script}.py", flags)
    assert f"CHECKPOINT DAMAGED: {newest}" in said and "Traceback" not in said
    assert values(newest) == before
    assert find_damage(newest) is None
    assert (folder.best is not None) == (script != "Pretrain")
    assert folder.best is None or find_damage(folder.best) is None

    results = results_of(run)
    said = run_script(f"{script}.py", flags)  # a finished run, started again
    assert "nothing left to train" in said and "Warning" not in said
    assert results_of(run) == results
