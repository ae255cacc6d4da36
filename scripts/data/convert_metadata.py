"""Turn the metadata of an image-caption collection into JSON lines {image, caption: [texts]}, a
safe and fast format.

    python scripts/data/convert_metadata.py --dataset yfcc15m --metadata yfcc15m.pkl --output yfcc15m.jsonl
    python scripts/data/convert_metadata.py --dataset cc3m --metadata cc3m.npy --output cc3m.jsonl

main.py does the same on its own at the first use of a file and keeps the result in its cache; a
converted file can be shared instead, and no pickle needs to be trusted: nothing in one is ever run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError
from base.writing import write_json_lines
from dataset.sources.left_out import LeftOut
from dataset.tasks.captions import FORMATS, metadata_rows
from runtime.config.cli import knob, run_script
from runtime.safe_pickle import load_plain


@dataclass
class Config:
    """Conversion."""

    dataset: str = knob(
        "yfcc15m", "collection that the metadata belongs to", choices=tuple(FORMATS)
    )
    metadata: Path | None = knob(
        None, "the collection's own file: .pkl, .npy or .json", required=True
    )
    output: Path | None = knob(None, "JSON lines to write", required=True)


def main(config: Config) -> None:
    if not config.metadata.is_file():
        raise UserError(f"--metadata {config.metadata}: no such file")
    if config.output.resolve() == config.metadata.resolve():
        raise UserError(f"--output {config.output}: is the metadata itself; name another file")
    left_out = LeftOut(config.metadata)
    rows = metadata_rows(config.dataset, config.metadata, load_plain, left_out)
    count = write_json_lines(config.output, rows)
    print(f"{config.output}: {count:,} samples")
    if left_out.count:
        print(f"{left_out.count:,} entries are left out, such as {left_out.first[0]}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
