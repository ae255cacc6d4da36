"""What was found in a shard, or in some entries of a list, kept as a file of JSON lines.

The first line says what the facts were made of and the CPU seconds they took; then a line a sample.
"""

import base64
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from base.errors import UserError
from base.reading import read_json_lines
from base.writing import write_json_lines
from dataset.health.samples import Facts, Image


def write_facts(path: Path, made_of: str, facts: list[Facts], seconds: float) -> None:
    """Replace a file by some facts, atomically."""
    write_json_lines(path, _rows(made_of, facts, seconds))


def _rows(made_of: str, facts: list[Facts], seconds: float) -> Iterator[dict]:
    yield {"made_of": made_of, "seconds": seconds, "samples": len(facts)}
    for each in facts:
        row = asdict(each)
        for image in row["images"]:
            image["digest"] = base64.b64encode(image["digest"]).decode()
            image["signature"] = base64.b64encode(image["signature"]).decode()
        yield row


def read_facts(path: Path, made_of: str) -> tuple[list[Facts], float] | None:
    """The facts of a file and their CPU seconds; None where there are none of `made_of`."""
    if not is_stored(path, made_of):
        return None
    try:
        rows = read_json_lines(path)
        about = next(rows)
        facts = [Facts(images=list(map(_image, row.pop("images"))), **row) for row in rows]
        whole = about.get("samples", len(facts)) == len(facts)
        return (facts, float(about["seconds"])) if whole else None
    except (UserError, LookupError, TypeError, ValueError):
        return None  # damaged: made again


def is_stored(path: Path, made_of: str) -> bool:
    """Whether a file holds the facts of `made_of`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'"made_of": "{made_of}"'.encode() in file.readline(1000)


def _image(row: dict) -> Image:
    return Image(
        name=row["name"],
        problems=tuple(row["problems"]),
        size=(row["size"][0], row["size"][1]),
        digest=base64.b64decode(row["digest"]),
        signature=base64.b64decode(row["signature"]),
    )
