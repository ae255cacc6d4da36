"""What small networks learn: ours beside the training code of others, on the same pairs.

    python -m benchmarks.learning                                  # CLIP, on DigitScenes
    python -m benchmarks.learning --peer PATH/TO/ALBEF --pairs 5000 --epochs 4

The first trains a CLIP by main.py and by open_clip's own script, the second an ALBEF by Pretrain.py
and by the original's own main(), with the same network, batch size, optimizer, learning rates,
crops and number of samples (learning_sides.py). One evaluator then takes the recall at 1 among all
held-out images and captions, for ALBEF by its contrastive features: the mean of the seeds, its
standard error, and each. Recall does not depend on how busy the machine is; samples a CPU second,
start-up included, hardly do.
"""

import csv
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from base.distributed import ALONE
from base.pixels import OPENAI
from base.reading import read_json
from base.text import as_list
from base.writing import write_json
from benchmarks import learning_sides as sides
from benchmarks.inputs import SMALL_IMAGE
from benchmarks.runner import Options, PeerOptions, check_peer, device_of, take_turns
from benchmarks.table import Column, publish
from dataset.images.clip import EvalView, normalize, pixel_statistics
from dataset.images.decode import decode_image
from evaluation.zeroshot import embed_images, embed_texts, retrieve
from runtime.builtin_data import make_digitscenes
from runtime.config.cli import knob, restated, run_script

TRAIN, TEST = "pretrain_train.json", "retrieval_test.json"  # of --data
DIRECTIONS = ("captions", "images")  # of retrieval
COLUMNS = [
    *(Column(f"R@1 of {direction} (each seed)", direction) for direction in DIRECTIONS),
    Column("samples a CPU second", "speed", "{:.0f}"),
]


@dataclass
class Config(PeerOptions):
    """What to train on, and for how long."""

    data: Path = knob(
        Path("data/digitscenes"),
        f"folder with {TRAIN}, {TEST} and, for ALBEF, tokenizer/; DigitScenes, made if missing",
    )
    folder: Path = knob(Path("output/benchmarks/learning"), "where runs go")
    repeats: int = knob(2, "number of seeds, from 0 on, unless --seeds names them", low=1)
    seeds: list[int] = knob([], "one training run of each side for each")
    pairs: int = knob(20_000, "image-caption pairs to train on, a fixed subset; 0 = all", low=0)
    epochs: int = knob(2, "passes over these pairs", low=1)
    batch: int = knob(64, "pairs a step", low=2)
    lr: float = knob(1e-3, "peak learning rate of AdamW", low=0)
    warmup: int = knob(100, "steps of linear warm-up before the cosine", low=0)
    busy: bool = restated(Options, "busy", True)


# ---- data
def captions_by_image(config: Config, name: str) -> list[tuple[Path, list[str]]]:
    """Absolute path and captions of every image of a list."""
    folder = config.data.absolute()
    rows = read_json(folder / name, list)
    return [(folder / row["image"], as_list(row["caption"])) for row in rows]


def write_pairs(config: Config) -> int:
    """The training pairs as every side reads them, one caption a row; returns how many."""
    training = captions_by_image(config, TRAIN)
    pairs = [(str(image), text) for image, texts in training for text in texts]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [pairs[i] for i in order[: config.pairs or None]]
    rows = [{"image": image, "caption": text} for image, text in chosen]
    write_json(config.folder / "train.json", rows)
    with open(config.folder / "train.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *chosen])
    return len(chosen)


# ---- evaluation
@torch.inference_mode()
def recall(config: Config, embed_image, embed_text, tokenize) -> dict[str, float]:
    """R@1 in percent of the held-out list: captions of each image, images of each caption."""
    test = captions_by_image(config, TEST)
    view = EvalView(SMALL_IMAGE, "bicubic")
    pixels = pixel_statistics(torch.device("cpu"), *OPENAI)  # as every side trains
    loaded = torch.stack([view(decode_image(path)) for path, _ in test])
    batches = [{"image": normalize(part, pixels)} for part in loaded.split(64)]
    images = embed_images(embed_image, batches, range(len(test)), len(test), ALONE)
    captions = [(number, text) for number, (_, texts) in enumerate(test) for text in texts]
    own_image, texts = zip(*captions, strict=True)
    embedded = embed_texts(embed_text, tokenize, texts, ALONE)
    found = retrieve(images, embedded, torch.tensor(own_image), ALONE)
    return {"captions": found["txt_r1_z"], "images": found["img_r1_z"]}


# ---- the table
def mean_and_error(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean and its standard error, which one value does not tell."""
    values = [run[key] for run in runs]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), error


def row(runs: list[dict]) -> dict:
    """A side's row of the table: mean, standard error of the mean, and the values."""
    found = {"speed": statistics.mean(run["speed"] for run in runs)}
    for key in DIRECTIONS:
        mean, error = mean_and_error(runs, key)
        each = ", ".join(f"{run[key]:.1f}" for run in runs)
        found[key] = f"{mean:.1f} ± {error:.1f} ({each})"
    return found


def verdict(results: dict[str, list[dict]]) -> str:
    """Whether our means are below the other side's by more than the standard error of their
    difference."""
    lines = []
    _, other = results
    for key in DIRECTIONS:
        ours, theirs = (mean_and_error(runs, key) for runs in results.values())
        gap, error = ours[0] - theirs[0], math.hypot(ours[1], theirs[1])
        word = "is" if gap < -error else "is not"
        lines.append(
            f"R@1 of {key}: ours {word} below {other}'s mean by more than the standard error "
            f"(difference {gap:+.1f} ± {error:.1f})."
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    asked = replace(config)  # what the page's command repeats
    check_peer(config, sides.PEER_FILE, "ALBEF")
    network = "ALBEF" if config.peer else "CLIP"
    config.folder = config.folder.absolute() / network
    config.folder.mkdir(parents=True, exist_ok=True)
    config.device = device_of(config)
    config.seeds = config.seeds or list(range(config.repeats))
    config.repeats = len(config.seeds)
    if config.tiny:
        config.pairs, config.epochs = 2 * config.batch, 1
    if not (config.data / TEST).is_file():
        make_digitscenes(config.data)
    samples = config.epochs * (write_pairs(config) // config.batch) * config.batch
    open_run = sides.open_clip_run
    if config.peer:
        sides.prepare_albef(config)
        open_run = sides.open_albef_run
    results = take_turns(config, sides.SIDES[network])
    for side, runs in results.items():
        for seed, run in zip(config.seeds, runs, strict=True):
            opened = open_run(config, config.folder / f"{side}_{seed}")
            run |= {**recall(config, *opened), "speed": samples / run["spent"]}
    held_out = captions_by_image(config, TEST)
    texts = sum(len(texts) for _, texts in held_out)
    remark = f"Mean ± standard error of seeds {', '.join(map(str, config.seeds))}; "
    remark += f"{len(held_out)} held-out images with {texts} captions.\n{verdict(results)}"
    title = [f"Learning of a small {network}", config.data.name, f"{samples:,} samples"]
    rows = {side: [{**runs[0], **row(runs)}] for side, runs in results.items()}
    publish(asked, "learning", title, rows, COLUMNS, remark)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
