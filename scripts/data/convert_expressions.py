"""Turn published referring expressions into the lists that Grounding.py reads, one for each split.

    python scripts/data/convert_expressions.py --source refer/data/refcoco+ --output data/refcoco+
    python scripts/data/convert_expressions.py --source "refer/data/refcoco/refs(google).p" --output data/refcoco
    python scripts/data/convert_expressions.py --source mdetr/finetune_refcocog_*.json --output data/refcocog

REFER's folder or refs(…).p, whose instances.json lies beside it, and the JSON files of MDETR and
UNINEXT (train, val, testA … at the end of their names). Nothing in a pickle is ever run. Entries are
{image, text, bbox, split}, of REFER also ref_id; image_root is then COCO's train2014.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError
from base.reading import read_json
from base.writing import write_json
from dataset.tasks.expressions import coco_expressions, refer_expressions, refs_file
from runtime.config.cli import knob, run_script
from runtime.safe_pickle import load_plain


@dataclass
class Config:
    """Conversion."""

    source: list[Path] = knob([], "REFER's folder or refs(…).p, or JSON files", required=True)
    output: Path | None = knob(None, "folder for train.json, val.json, testA.json …", required=True)


def expressions_of(source: Path) -> Iterator[dict]:
    """The expressions of one folder or file."""
    if source.is_dir() or source.suffix == ".p":
        refs = refs_file(source) if source.is_dir() else source
        instances = read_json(refs.with_name("instances.json"), dict, "it belongs beside refs(…).p")
        return refer_expressions(load_plain(refs), instances, refs)
    split = source.stem.rpartition("_")[2]
    return coco_expressions(read_json(source, dict, "name MDETR's JSON"), split, source)


def main(config: Config) -> None:
    splits: dict[str, list[dict]] = {}
    for source in config.source:
        for entry in expressions_of(source):
            split = str(entry["split"])
            if not re.fullmatch(r"[\w-]+", split):  # it becomes the name of a file
                raise UserError(f"{source}: split {split!r:.60} is no word; fix it")
            splits.setdefault(split, []).append(entry)
    files = {split: config.output / f"{split}.json" for split in splits}
    read = {source.resolve() for source in config.source}
    if own := [file for file in files.values() if file.resolve() in read]:
        raise UserError(f"--output {config.output}: holds {own[0]} itself; write to another folder")
    for split, entries in splits.items():
        file = files[split]
        write_json(file, entries)
        print(f"{file}: {len(entries):,} expressions")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
