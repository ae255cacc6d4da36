"""Time and memory of exact nearest neighbours by cosine: ours against scikit-learn's.

    python -m benchmarks.knn
    python -m benchmarks.knn --train 1281167 --queries 50000

Features are random, in 1,000 clusters, on disk. Memory is the peak of the process less what it had
before the features. scikit-learn's `NearestNeighbors` runs with brute force and Euclidean distance
of unit vectors, its fastest way to the same answer; --device is ours.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from base.distributed import alone
from base.processes import linux_bytes
from benchmarks.child import measure_once, peak_bytes
from benchmarks.runner import OURS, Options, device_of, take_turns
from benchmarks.table import CPU_SECONDS, FASTER, FASTER_CPU, SECONDS, Column, publish
from evaluation.features import Bank
from evaluation.knn import nearest_neighbours
from runtime.config.cli import knob, run_script

FOUND = "found.npy"  # our neighbours
CLUSTERS = 1000
PART = 65536  # features written at a time
COLUMNS = [
    SECONDS,
    CPU_SECONDS,
    Column("memory", "peak_bytes", "{:.0f} MiB", 2**-20),
    Column("neighbours as ours", "same", "{:.4%}"),
    FASTER,
    FASTER_CPU,
]


@dataclass
class Config(Options):
    train: int = knob(200_000, "training features", low=2)
    queries: int = knob(10_000, "queries", low=1)
    width: int = knob(384, "numbers in a feature", low=1)
    k: int = knob(20, "neighbours", low=1)
    device: str = knob("cpu", "ours: cpu or cuda; scikit-learn runs on the CPU")


def make_features(config: Config, folder: Path) -> None:
    """Write random features in clusters, train.npy and queries.npy."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, config.width), dtype=np.float32)
    for name, count in (("train", config.train), ("queries", config.queries)):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", "<f4", (count, config.width))
        for part in np.array_split(file, -(-count // PART)):
            noise = rng.standard_normal(part.shape, dtype=np.float32)
            part[:] = centres[rng.integers(CLUSTERS, size=len(part))] + 1.5 * noise
        file.flush()


def search(options: SimpleNamespace) -> dict:
    """Time and memory of a side's search, ours that of eval_knn.py; and of scikit-learn the
    fraction of neighbours that are the `same`, at the same rank, as ours."""
    folder = Path(options.exchange)
    files = [folder / "train.npy", folder / "queries.npy"]
    ours = options.side == OURS
    if ours:
        features = [np.load(file, mmap_mode="r") for file in files]
        banks = [Bank(each, labels=torch.zeros(len(each))) for each in features]
        world = alone(options.device)

        def find() -> np.ndarray:
            return nearest_neighbours(*banks, options.k, world).index.numpy()
    else:
        from sklearn.neighbors import NearestNeighbors
        from sklearn.preprocessing import normalize

        def find() -> np.ndarray:
            index = NearestNeighbors(n_neighbors=options.k, algorithm="brute", metric="euclidean")
            index.fit(normalize(np.load(files[0])))
            return index.kneighbors(normalize(np.load(files[1])), return_distance=False)

    before = linux_bytes("/proc/self/smaps_rollup", "Rss")
    found, result = measure_once(find)
    result["peak_bytes"] = peak_bytes("cpu") - before
    if ours:
        np.save(folder / FOUND, found)
    else:
        result["same"] = float((found == np.load(folder / FOUND)).mean())
    return result


def main(config: Config) -> None:
    sides = dict.fromkeys((OURS, "scikit-learn"), "benchmarks.knn:search")
    with tempfile.TemporaryDirectory() as folder:
        make_features(config, Path(folder))
        results = take_turns(config, sides, exchange=folder)
    size = config.train * config.width * 4 / 2**20
    title = [f"kNN, {config.train:,} x {config.queries:,}", f"width {config.width}"]
    title += [f"k {config.k}", device_of(config)]
    remark = f"The training features are {size:,.0f} MiB."
    publish(config, "knn", title, results, COLUMNS, remark)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
