"""Measures the memory of loading pre-training annotations with 1 and with 4 worker processes.

    python -m benchmarks.loader_memory                   5 million pairs, about 2 minutes, 0.6 GB of disk
    python -m benchmarks.loader_memory --pairs 200000

Prints, for each number of workers, the proportional set size (PSS: private memory plus a fair share
of what is shared) of all processes together, what of it is private and written to (no page cache),
and what three more workers cost.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=5_000_000, help="annotations in the generated file"
    )
    parser.add_argument(
        "--batches", type=int, default=400, help="batches of 64 to load before measuring"
    )
    return parser.parse_args()


def write_pairs(path: Path, count: int) -> None:
    """A JSON list as ALBEF's pre-training uses it."""
    with path.open("w") as file:
        file.write("[")
        for number in range(count):
            caption = (
                f"a photo of thing {number % 977} beside thing {number % 1013} in a street at noon"
            )
            file.write(
                (", " if number else "")
                + json.dumps({"image": f"cc3m/{number:09d}.jpg", "caption": caption})
            )
        file.write("]")


def read_only(record: dict) -> dict:
    """A sample without its image: the annotations are what is measured."""
    return {"length": len(record["caption"])}


def collate(samples: list[dict]) -> dict:
    import torch

    return {"length": torch.tensor([sample["length"] for sample in samples])}


def memory(pids: list[int]) -> tuple[float, float]:
    """(PSS, private modified memory) of processes in MB."""
    pss = private = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Pss":
                pss += int(value.split()[0])
            elif name == "Private_Dirty":
                private += int(value.split()[0])
    return pss / 1024, private / 1024


def measure(records, workers: int, batches: int) -> tuple[float, float]:
    from dataset.loading.stream import RecordSource, Stream, StreamLoader

    loader = StreamLoader(
        Stream([RecordSource(records, read_only)], collate), batch_size=64, workers=workers
    )
    for _ in range(batches):
        next(loader)
    pids = [os.getpid()] + [worker.pid for worker in loader._batches._workers]
    result = memory(pids)
    loader.close()
    return result


def main() -> None:
    options = parse()
    from dataset.sources.records import Records

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.json"
        write_pairs(path, options.pairs)
        records = Records(path, cache_dir=folder)
        print(f"{len(records):,} pairs, {path.stat().st_size / 2**20:.0f} MB of JSON")
        found = {workers: measure(records, workers, options.batches) for workers in (1, 4)}
    for workers, (pss, private) in found.items():
        print(f"workers {workers}: PSS {pss:7.1f} MB, of it private and modified {private:7.1f} MB")
    more = [found[4][kind] - found[1][kind] for kind in (0, 1)]
    print(f"3 more workers: PSS {more[0]:+.1f} MB, private and modified {more[1]:+.1f} MB")


if __name__ == "__main__":
    main()
