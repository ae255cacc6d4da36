"""scripts/gpu_check.sh runs through without a GPU, and a wrong result fails it."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu_checks.runs import difference

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
    assert sum(line.startswith("pass") for line in lines) == 5
    for words in ("FSDP2", "killed and resumed"):
        assert any(words in line for line in lines), words


@pytest.mark.slow
def test_measures_run_on_the_cpu(tmp_path):
    before = (ROOT / "docs/BENCHMARKS.md").read_text()
    lines = gpu_check(tmp_path / "r.md", "--part", "measures")
    for words in ("| ViT, debug | eager |", "attained", "LAUNCH", "beside open_clip"):
        assert any(words in line for line in lines), words
    assert (ROOT / "docs/BENCHMARKS.md").read_text() == before  # written on a GPU alone


def test_a_difference_fails():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import gpu_check
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    report = gpu_check.Report()
    report.check("equal", lambda: difference({"loss": 1.0}, {"loss": 1.0}), 1e-3)
    assert report.failed == 0
    report.check("other", lambda: difference({"loss": 1.1}, {"loss": 1.0}), 1e-3)
    report.check("raises", lambda: 1 / 0, 1e-3)
    assert report.failed == 2


def test_an_unknown_method_is_refused():
    command = [sys.executable, "scripts/gpu_check.py", "--cpu", "--only", "vitt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "--only vitt: the methods are simla" in result.stderr
