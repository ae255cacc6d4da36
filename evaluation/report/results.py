"""Write a run's metrics.json and report.html."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from base import distributed
from base.errors import UserError
from base.reading import read_json
from base.text import clean_surrogates
from base.writing import ROOM, file_errors, strict_json, write_json, write_text
from evaluation.report.page import join, link, page
from evaluation.report.runs import write_index
from runtime.config.yaml import save, to_dict
from runtime.scores import rounded, score_lines


def write_results(
    config, title: str, metrics: dict, sections: Sequence[str], text: str = ""
) -> None:
    """result/metrics.json, result/config.yaml and result/report.html below config.output_dir, and a
    line of result/metrics.jsonl, which keeps the figures of every evaluation in that folder; prints
    `text` or, by default, the metrics, the scores beside chance, and what was written. Rank 0 does,
    the others do nothing.
    """
    if distributed.rank() != 0:
        return
    folder = Path(config.output_dir) / "result"
    source = str(config.checkpoint or getattr(config, "model", None))  # a library's model has none
    metrics = {"checkpoint": source, **metrics}
    _keep(folder, {**metrics, "config": to_dict(config)})
    with suppress(OSError, UserError):  # there are none
        before = read_json(folder / "metrics.json", dict).get("checkpoint", source)
        if before != source:
            print(
                f"{folder}: this evaluation replaces the files of {before}, whose figures stay in "
                "metrics.jsonl; another --output-dir keeps both",
                file=sys.stderr,
            )
    write_json(folder / "metrics.json", metrics, indent=2)
    save(config, folder / "config.yaml")
    footer = join(
        Markup("Beside other runs: "), link("curves, scores and options", "../index.html")
    )
    of_what = str(config.output_dir) if source == "None" else source
    write_text(folder / "report.html", page(title, sections, of_what, footer))
    write_index(Path(config.output_dir))
    print(text or json.dumps(rounded(metrics), indent=2))
    if not text:
        print(*score_lines(metrics), sep="\n")
    print(f"written: {folder}/metrics.json, report.html", flush=True)


def _keep(folder: Path, row: dict) -> None:
    """Add a line to metrics.jsonl, after the figures that an earlier version left in metrics.json:
    the next evaluation, of another checkpoint or other data, replaces that file."""
    history = folder / "metrics.jsonl"
    rows = [row]
    if not history.exists():
        with suppress(OSError, UserError):  # there are none
            rows.insert(0, read_json(folder / "metrics.json", dict))
    lines = [f"{clean_surrogates(strict_json(each))}\n".encode() for each in rows]
    with file_errors(history, ROOM):
        folder.mkdir(parents=True, exist_ok=True)
        with history.open("a+b") as file:
            file.seek(0)
            have, last = set(), b"\n"
            # parts of a file that may have grown large: a line longer than these is none of them
            while part := file.readline(max(map(len, lines))):
                if last.endswith(b"\n") and part in lines:
                    have.add(part)
                last = part
            if not last.endswith(b"\n"):
                file.write(b"\n")  # after a line that a full disk cut off
            # an evaluation that was killed after this and begun again has its line
            file.write(b"".join(line for line in lines if line not in have))
