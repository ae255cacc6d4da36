"""scripts/gpu_check.sh runs through without a GPU, and a wrong result fails it."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from runtime.config.cli import parse
from runtime.parallel import check_compile_mode, knows_fsdp
from scripts.gpu_checks import peers, whole_runs
from scripts.gpu_checks.report import Report
from scripts.gpu_checks.runs import Run, difference
from scripts.planning.methods import STEPS
from tests.helpers.processes import run_script

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(out: Path, *words: str) -> list[str]:
    """The lines that it writes; it must end well."""
    command = ["bash", "scripts/gpu_check.sh", "--cpu", *words, "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return out.read_text().splitlines()


@pytest.mark.slow
def test_checks_pass_on_the_cpu(tmp_path):
    lines = gpu_check(tmp_path / "r.md", "--only", "vit", "--part", "checks")
    assert sum(line.startswith("pass") for line in lines) == 4 + knows_fsdp()
    for words in ("FSDP2", "killed and resumed"):
        assert any(words in line for line in lines), words


@pytest.mark.slow
def test_measures_run_on_the_cpu(tmp_path):
    before = (ROOT / "docs/BENCHMARKS.md").read_text()
    lines = gpu_check(tmp_path / "r.md", "--part", "measures")
    for words in ("| ViT debug | eager |", "attained", "LAUNCH", "beside open_clip"):
        assert any(words in line for line in lines), words
    assert sum(line.startswith("skip  ") for line in lines) == len(peers.ORIGINALS)
    assert (ROOT / "docs/BENCHMARKS.md").read_text() == before  # written on a GPU alone


class Notes(list):
    """A report that runs its checks and keeps what is noted."""

    note = list.append

    def check(self, title, work, limit):
        assert work() <= limit


def test_originals_are_measured_where_there_are_checkouts(tmp_path, monkeypatch):
    """Each by its own benchmark, with options that the benchmark has; the others with a reason."""
    found = peers.parse_peers([f"simla={tmp_path}", f"coyo-vit={tmp_path}"], "python-tf")
    commands, notes = [], Notes()
    monkeypatch.setattr(peers, "run", lambda report, device, command: commands.append(command) or 0)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.run_peers(notes, torch.device("cpu"), found, "python-tf")
    assert [words[0] for words in commands] == ["benchmarks.pretrain", "benchmarks.vit"]
    assert all(words[words.index("--peer") + 1] == str(tmp_path) for words in commands)
    assert "--peer-python" not in commands[0] and "python-tf" in commands[1]
    assert len(notes) == 5 and all(line.startswith("skip  ") for line in notes)
    assert any("open_clip_torch is not installed" in line for line in notes)
    assert any("no --peer nxtp=PATH" in line for line in notes)


@pytest.mark.parametrize("name", peers.ORIGINALS)
def test_benchmarks_have_the_options(name, tmp_path):
    """Each command ends for want of the original's files: every option before was understood."""
    words = [*peers.ORIGINALS[name].split(), "--peer", str(tmp_path), *peers.ON_A_GPU.split()]
    module = importlib.import_module(words[0])
    with pytest.raises(UserError, match="takes a checkout of"):
        module.main(parse(module.Config, [*words[1:], "--busy", "--precision", "bf16"]))


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ("blip=.", "NAME is one of simla, albef"),
        ("simla=/none", "no such folder"),
        ("coyo-vit=.", "needs --peer-python"),
    ],
)
def test_peers_that_cannot_be(entry, sentence):
    with pytest.raises(UserError, match=sentence):
        peers.parse_peers([entry], None)


def test_a_difference_fails(tmp_path):
    report = Report(tmp_path / "report.md")
    report.check("equal", lambda: difference({"loss": 1.0}, {"loss": 1.0}), 1e-3)
    assert report.failed == 0
    report.check("other", lambda: difference({"loss": 1.1}, {"loss": 1.0}), 1e-3)
    elsewhere = Report()  # of another process
    elsewhere.check("raises", lambda: 1 / 0, 1e-3)
    report.take(elsewhere)
    assert report.failed == 2
    assert [line.split()[0] for line in report.lines] == ["pass", "FAIL", "FAIL"]
    assert "ZeroDivisionError" in (tmp_path / "report.errors.txt").read_text()


def test_unknown_names_are_refused():
    said = run_script("scripts/gpu_check.py", ["--cpu", "--modes", "compiled"], expect=2)
    assert "--modes compiled: known are eager" in said


@pytest.mark.parametrize("losses", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]])
def test_a_run_that_is_not_whole_is_found_out(losses, tmp_path, monkeypatch):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(whole_runs, "run_to_end", lambda command: 0.0)
    with pytest.raises(RuntimeError, match="losses by step"):
        whole_runs.train_and_resume("Classification.py", tmp_path)


@pytest.mark.parametrize("name", whole_runs.GRAPHS)
def test_runs_with_cuda_graphs_are_possible(name):
    script, *words = whole_runs.GRAPHS[name].split()
    config = parse(importlib.import_module(Path(script).stem).Config, words)
    assert (config.compile, config.compile_mode) == (True, "reduce-overhead")
    check_compile_mode(config)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_image_tokenizer_is_compiled_as_pretraining_does(compiled):
    run = Run(STEPS["simla"], torch.device("cpu"), "fp32", compile=compiled)
    (tokenizer,) = run.setup.frozen
    assert (tokenizer.encoder._compiled_call_impl is not None) == compiled
