"""Annotations cost neither the indexing process nor the workers memory in proportion to their
number."""

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from dataset.sources import json_entries
from dataset.sources.records import Records

ROOT = Path(__file__).resolve().parents[2]


def test_indexing_and_reading_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_entries, "CHUNK", 1 << 14)
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([{"image": f"{n}.jpg", "caption": "words " * 30} for n in range(20_000)])
    )
    tracemalloc.start()
    try:
        records = Records(path, cache_dir=tmp_path)
        assert sum(len(record["caption"]) for record in records) == 20_000 * 180
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4_000_000
    assert peak < 1_500_000 and kept < 100_000


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="measures through /proc/*/smaps_rollup"
)
def test_more_workers_cost_little():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loader_memory"]
    output = subprocess.run(
        [*command, "--pairs", "50000", "--batches", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "50,000 pairs" in output.stdout
    assert float(re.search(r"3 more workers: PSS ([+-][\d.]+) MB", output.stdout)[1]) < 300
