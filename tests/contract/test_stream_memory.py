"""Annotations cost no memory in proportion to their number."""

import json
import tracemalloc

from dataset.sources import json_entries
from dataset.sources.records import Records


def test_indexing_and_reading_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_entries, "CHUNK", 1 << 14)
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([{"image": f"{n}.jpg", "caption": "words " * 30} for n in range(20_000)])
    )
    tracemalloc.start()
    try:
        records = Records(path)
        assert sum(len(record["caption"]) for record in records) == 20_000 * 180
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4_000_000
    assert peak < 1_500_000 and kept < 100_000
