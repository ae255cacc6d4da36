"""Time and memory of exact nearest neighbours by cosine: ours against scikit-learn's, and faiss'
where installed.

    python -m benchmarks.knn                              # 200,000 training features, 10,000 queries, width 384
    python -m benchmarks.knn --train 1281167 --queries 50000 --sides ours

Features are random, in 1,000 clusters, on disk. Each side runs in a process of its own, in turn,
and finds the same k neighbours; disagreements are counted. Memory is the peak of the process less
what it had before the features.
scikit-learn's `NearestNeighbors` runs with brute force and Euclidean distance of unit vectors, its
fastest way to the same answer. The table is written to docs/BENCHMARKS.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from base.errors import UserError
from benchmarks import pretrain as bench
from runtime.config import cli as configuration
from runtime.config.cli import knob

SIDES = ("ours", "sklearn", "faiss")
NAMES = {"ours": "ours", "sklearn": "scikit-learn", "faiss": "faiss (IndexFlatIP)"}
CLUSTERS = 1000


@dataclass
class Config:
    """What to measure."""

    train: int = knob(200_000, "training features", low=2)
    queries: int = knob(10_000, "queries", low=1)
    width: int = knob(384, "numbers in a feature", low=1)
    k: int = knob(20, "neighbours", low=1)
    sides: list[str] = knob(["ours", "sklearn"], "who searches", choices=SIDES)
    device: str = knob("cpu", "ours: cpu or cuda; the others run on the CPU")
    threads: int = knob(2, "CPU threads of each side", low=1)
    repeats: int = knob(1, "measurements of each side", low=1)
    report: str = knob("docs/BENCHMARKS.md", "page to write the table to; empty = print only")
    side: str = knob("", "one measurement: this side ...", choices=("", *SIDES))
    folder: str = knob("", "... with the features in this folder")


def make_features(config: Config, folder: Path) -> None:
    """Random features in clusters: train.npy, queries.npy, and labels, without ever holding all of
    them."""
    import numpy as np

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, config.width), dtype=np.float32)
    for name, count in (("train", config.train), ("queries", config.queries)):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", "<f4", (count, config.width))
        labels = rng.integers(CLUSTERS, size=count)
        np.save(folder / f"{name}.labels.npy", labels)
        for first in range(0, count, 65536):
            part = labels[first : first + 65536]
            noise = rng.standard_normal((len(part), config.width), dtype=np.float32)
            file[first : first + len(part)] = centres[part] + 1.5 * noise
        file.flush()


def search_ours(config: Config, folder: Path):
    import numpy as np
    import torch

    from base.distributed import World
    from evaluation.features import Bank
    from evaluation.knn import nearest_neighbours

    torch.set_num_threads(config.threads)
    banks = [
        Bank(
            np.load(folder / f"{name}.npy", mmap_mode="r"),
            torch.from_numpy(np.load(folder / f"{name}.labels.npy")),
        )
        for name in ("train", "queries")
    ]
    world = World(0, 1, 0, torch.device(config.device))
    return lambda: nearest_neighbours(*banks, config.k, world).index.numpy()


def search_sklearn(config: Config, folder: Path):
    import numpy as np
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    def search():
        train, queries = (
            normalize(np.load(folder / f"{name}.npy")) for name in ("train", "queries")
        )
        found = NearestNeighbors(n_neighbors=config.k, algorithm="brute", metric="euclidean").fit(
            train
        )
        return found.kneighbors(queries, return_distance=False)

    return search


def search_faiss(config: Config, folder: Path):
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(config.threads)

    def search():
        train, queries = (np.load(folder / f"{name}.npy") for name in ("train", "queries"))
        faiss.normalize_L2(train)
        faiss.normalize_L2(queries)
        index = faiss.IndexFlatIP(config.width)
        index.add(train)
        return index.search(queries, config.k)[1]

    return search


def measure_one(config: Config) -> dict:
    """Search once in this process; the neighbours are left in the folder."""
    import numpy as np

    from benchmarks.common import peak_bytes

    folder = Path(config.folder)
    makers = {"ours": search_ours, "sklearn": search_sklearn, "faiss": search_faiss}
    search = makers[config.side](config, folder)
    before, begin, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    found = search()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    import torch

    peak = peak_bytes(torch.device("cpu")) - before
    np.save(folder / f"{config.side}.npy", np.asarray(found))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "gpu": "",
        "torch": torch.__version__,
    }


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        * 1024
    )


def measure_all(config: Config, folder: Path) -> dict[str, list[dict]]:
    """The sides' measurements in turn, each in a fresh process."""
    results: dict[str, list[dict]] = {side: [] for side in config.sides}
    env = os.environ | {
        "OMP_NUM_THREADS": str(config.threads),
        "OPENBLAS_NUM_THREADS": str(config.threads),
    }
    for turn in range(config.repeats):
        for side in config.sides if turn % 2 == 0 else reversed(config.sides):
            settings = asdict(config) | {"side": side, "folder": str(folder)}
            words = [f"--{name}={value}" for name, value in settings.items() if name != "sides"]
            command = [sys.executable, "-m", "benchmarks.knn", *words]
            done = subprocess.run(command, cwd=bench.ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f"{side} failed (exit {done.returncode}):\n{done.stderr.strip()[-2000:]}"
                )
            results[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(
                f"{side} {turn + 1}/{config.repeats}: {results[side][-1]['seconds']:.1f} s",
                flush=True,
            )
    return results


def table(results: dict[str, list[dict]], agreement: dict[str, float]) -> str:
    """Markdown, a row a side."""
    lines = ["| | seconds | CPU seconds | memory | neighbours as ours |", "|---|---|---|---|---|"]
    for side, runs in results.items():
        seconds, cpu, peak = (
            statistics.median(r[key] for r in runs)
            for key in ("seconds", "cpu_seconds", "peak_bytes")
        )
        same = f"{agreement[side]:.4%}" if side in agreement else ""
        lines.append(
            f"| {NAMES[side]} | {seconds:.1f} | {cpu:.1f} | {peak / 2**20:.0f} MiB | {same} |"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    if config.side:
        print(json.dumps(measure_one(config)))
        return
    import numpy as np

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_features(config, folder)
        results = measure_all(config, folder)
        found = {side: np.load(folder / f"{side}.npy") for side in results}
        others = {
            side: index for side, index in found.items() if side != "ours" and "ours" in found
        }
        agreement = {side: float((index == found["ours"]).mean()) for side, index in others.items()}
    size = config.train * config.width * 4 / 2**20
    body = f"{table(results, agreement)}\n\nThe training features are {size:,.0f} MiB."
    body += f" Machine: {bench.machine(next(iter(results.values()))[0], config.threads)}.{bench.disturbed(load)}"
    title = f"kNN, {config.train:,} x {config.queries:,}, width {config.width}, k {config.k}, {config.device}"
    print(body)
    bench.write_report(config, title, f"{body}\n\n    {bench.command_line(config, 'knn')}")


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
