"""Time and memory of exact nearest neighbours by cosine: ours against scikit-learn's.

    python -m benchmarks.knn
    python -m benchmarks.knn --train 1281167 --queries 50000

Features are random, in 1,000 clusters, on disk. Both sides find the same k neighbours;
disagreements are counted. Memory is the peak of the process less what it had before the features.
scikit-learn's `NearestNeighbors` runs with brute force and Euclidean distance of unit vectors, its
fastest way to the same answer; --device is ours.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from base.distributed import alone
from benchmarks.gauge import linux_bytes, measure_once, peak_bytes
from benchmarks.runner import OURS, Options, device_of, take_turns
from benchmarks.table import CPU_SECONDS, FASTER, FASTER_CPU, SECONDS, Column, publish
from evaluation.features import Bank
from evaluation.knn import nearest_neighbours
from runtime.config.cli import knob, run_script

SKLEARN = "scikit-learn"
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
    """What to measure."""

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
        for first in range(0, count, PART):
            size = min(PART, count - first)
            noise = rng.standard_normal((size, config.width), dtype=np.float32)
            file[first : first + PART] = centres[rng.integers(CLUSTERS, size=size)] + 1.5 * noise
        file.flush()


def read(options: SimpleNamespace, name: str, mmap_mode: str | None = None) -> np.ndarray:
    return np.load(Path(options.exchange) / f"{name}.npy", mmap_mode=mmap_mode)


def ours(options: SimpleNamespace) -> dict:
    """Search of eval_knn.py; features are read from disk a part at a time."""
    banks = []
    for name in ("train", "queries"):
        features = read(options, name, "r")
        banks.append(Bank(features, labels=torch.zeros(len(features))))
    world = alone(options.device)
    return measure_search(
        lambda: nearest_neighbours(*banks, options.k, world).index.numpy(), options
    )


def sklearn(options: SimpleNamespace) -> dict:
    """Search of scikit-learn."""
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    def search() -> np.ndarray:
        index = NearestNeighbors(n_neighbors=options.k, algorithm="brute", metric="euclidean")
        index.fit(normalize(read(options, "train")))
        return index.kneighbors(normalize(read(options, "queries")), return_distance=False)

    return measure_search(search, options)


def measure_search(search: Callable[[], np.ndarray], options: SimpleNamespace) -> dict:
    """Time and memory of one search; SIDE.npy in the folder `exchange` gets the neighbours."""
    before = linux_bytes("/proc/self/smaps_rollup", "Rss")
    found, result = measure_once(search)
    result["peak_bytes"] = peak_bytes("cpu") - before
    np.save(Path(options.exchange) / f"{options.side}.npy", found)
    return result


def main(config: Config) -> None:
    sides = {OURS: "benchmarks.knn:ours", SKLEARN: "benchmarks.knn:sklearn"}
    with tempfile.TemporaryDirectory() as name:
        make_features(config, Path(name))
        results = take_turns(config, sides, exchange=name)
        same = np.load(Path(name) / f"{SKLEARN}.npy") == np.load(Path(name) / f"{OURS}.npy")
        results[SKLEARN][0]["same"] = float(same.mean())  # at the same rank
    size = config.train * config.width * 4 / 2**20
    title = [f"kNN, {config.train:,} x {config.queries:,}", f"width {config.width}"]
    title += [f"k {config.k}", device_of(config)]
    remark = f"The training features are {size:,.0f} MiB."
    publish(config, "knn", title, results, COLUMNS, remark)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
