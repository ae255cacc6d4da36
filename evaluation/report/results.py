"""Write a run's metrics.json and report.html."""

import json
from collections.abc import Sequence
from pathlib import Path

from base import distributed
from base.files import write_json, write_text
from evaluation.report.page import page
from runtime.config.cli import save


def write_results(
    config, title: str, metrics: dict, sections: Sequence[str], text: str = ""
) -> None:
    """result/metrics.json, result/config.yaml and result/report.html below config.output_dir;
    prints `text` or, by default, the metrics. Rank 0 does, the others do nothing.
    """
    if distributed.rank() != 0:
        return
    folder = Path(config.output_dir) / "result"
    metrics = {"checkpoint": str(config.checkpoint), **metrics}
    write_json(folder / "metrics.json", metrics, indent=2)
    save(config, folder / "config.yaml")
    write_text(folder / "report.html", page(title, sections, str(config.checkpoint)))
    print(text or json.dumps(metrics, indent=2), flush=True)
