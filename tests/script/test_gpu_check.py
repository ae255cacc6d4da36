"""scripts/gpu_check.sh runs through without a GPU, and a wrong result fails it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_checks_pass_on_the_cpu(tmp_path):
    command = ["bash", "scripts/gpu_check.sh", "--cpu", "--only", "vit", "--out", tmp_path / "r.md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert sum(line.startswith("pass") for line in lines) == 4
    assert any("FSDP2" in line for line in lines)


def test_a_difference_fails():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import gpu_check
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    report = gpu_check.Report()
    report.check("equal", lambda: gpu_check.difference({"loss": 1.0}, {"loss": 1.0}), 1e-3)
    assert report.failed == 0
    report.check("other", lambda: gpu_check.difference({"loss": 1.1}, {"loss": 1.0}), 1e-3)
    report.check("raises", lambda: 1 / 0, 1e-3)
    assert report.failed == 2
