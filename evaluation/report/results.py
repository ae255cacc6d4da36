"""Write a run's metrics.json and report.html."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.page import page
from runtime.config.cli import save


def write_results(
    config, title: str, metrics: dict, sections: Sequence[str], text: str = ""
) -> None:
    """result/metrics.json, result/config.yaml and result/report.html below config.output_dir;
    prints `text` or, by default, the metrics.
    """
    folder = Path(config.output_dir) / "result"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"checkpoint": str(config.checkpoint), **metrics}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    save(config, folder / "config.yaml")
    (folder / "report.html").write_text(page(title, sections, str(config.checkpoint)))
    print(text or json.dumps(metrics, indent=2), flush=True)
