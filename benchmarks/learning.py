"""What small networks learn: ours beside the training code of others, on the same pairs.

    python -m benchmarks.learning                                     # DigitScenes, made if missing
    python -m benchmarks.learning --train-data pairs.json --test-data held_out.json --image-root images
    python -m benchmarks.learning --peer PATH/TO/ALBEF --pairs 5000 --epochs 4

The first two train a CLIP by main.py and by open_clip's own script, which needs `pip install
"open_clip_torch[training]"`: the same network (main.py's ViT-T-8: ViT of 4 blocks, width 128,
patches of 8 pixels; text transformer of 2 blocks, width 128, 24 tokens), each from its own random
weights and with its own choice of what decays. With --peer it is an ALBEF by Pretrain.py and by the
original's own main(): the same network (ViT of 2 blocks, width 96; BERT of 2 layers, the second
fusing) from the same weights, its temperature fixed at 0.07.

Both sides have the same batch size, optimizer, learning rates, crops and number of samples. One
evaluator then embeds the held-out images and captions, normalised as in training, and takes the
recall at 1 among all of them, for ALBEF by its contrastive features. Weights and order of the
samples differ between seeds, and so does recall: the table gives the mean, its standard error and
every seed. Recall does not depend on how busy the machine is; samples a CPU second hardly do.
"""

import csv
import json
import math
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from base.distributed import ALONE
from base.errors import UserError
from base.pixels import OPENAI
from base.reading import read_json
from base.writing import write_json
from benchmarks import learning_sides
from benchmarks.runner import OURS, PeerOptions, check_peer, children_seconds, run_command
from benchmarks.table import Column, publish
from dataset.images.clip import EvalView, normalize, pixel_statistics
from dataset.images.decode import decode_image
from evaluation.zeroshot import embed_images, embed_texts, retrieve
from runtime.builtin_data import make_digitscenes
from runtime.config.cli import knob, run_script

DIRECTIONS = ("captions", "images")  # of retrieval
COLUMNS = [
    *(Column(f"R@1 of {direction} (each seed)", direction) for direction in DIRECTIONS),
    Column("samples a CPU second", "speed", "{:.0f}"),
]


@dataclass
class Config(PeerOptions):
    """What to train on, and for how long."""

    train_data: Path | None = knob(None, "JSON list of {image, caption}; none = DigitScenes")
    test_data: Path | None = knob(None, "the same, held out, to be evaluated on")
    image_root: Path | None = knob(None, "folder that the names of images start from")
    folder: Path = knob(Path("output/benchmarks/learning"), "where runs and DigitScenes go")
    text_encoder: Path | None = knob(
        None, "with --peer: folder with a WordPiece tokenizer.json; none = that of DigitScenes"
    )
    repeats: int = knob(2, "number of seeds, from 0 on, unless --seeds names them", low=1)
    seeds: list[int] = knob([], "one training run of each side for each")
    pairs: int = knob(20_000, "image-caption pairs to train on, a fixed subset; 0 = all", low=0)
    epochs: int = knob(2, "passes over these pairs", low=1)
    batch: int = knob(64, "pairs a step", low=2)
    lr: float = knob(1e-3, "peak learning rate of AdamW", low=0)
    warmup: int = knob(100, "steps of linear warm-up before the cosine", low=0)

    @property
    def network(self) -> str:
        return "ALBEF" if self.peer else "CLIP"

    def check(self) -> None:
        """Check that the options are compatible."""
        given = [self.train_data, self.test_data, self.image_root]
        if any(given) and not all(given):
            raise UserError(
                "--train-data, --test-data and --image-root go together: give all three"
            )
        if self.peer and self.train_data and not self.text_encoder:
            raise UserError("--peer with --train-data needs --text-encoder, a WordPiece tokenizer")
        check_peer(self, learning_sides.ALBEF_FILE, "ALBEF", one_size=False)
        self.seeds = self.seeds or list(range(self.repeats))


# ---- data
def use_digitscenes(config: Config) -> None:
    """Point `config` at DigitScenes in its folder, made if missing."""
    config.image_root = config.folder / "digitscenes"
    config.train_data = config.image_root / "pretrain_train.json"
    config.test_data = config.image_root / "retrieval_test.json"
    make_digitscenes(config.image_root)


def captions_by_image(config: Config, file: Path) -> list[tuple[Path, list[str]]]:
    """Absolute path and captions of every image of a list."""
    found = []
    for row in read_json(file, list):
        texts = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
        found.append(((config.image_root / row["image"]).absolute(), texts))
    return found


def write_pairs(config: Config) -> int:
    """The training pairs as every side reads them, one caption a row; returns how many."""
    pairs = []
    for image, texts in captions_by_image(config, config.train_data):
        pairs += [(str(image), text) for text in texts]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [pairs[i] for i in order[: config.pairs or None]]
    rows = [{"image": image, "caption": text} for image, text in chosen]
    write_json(config.folder / "train.json", rows)
    with open(config.folder / "train.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *chosen])
    return len(chosen)


# ---- training and evaluation
def train(config: Config, side: str, seed: int) -> dict[str, float]:
    """Train one side with one seed and evaluate it."""
    kind = "albef_" if config.peer else ""
    run = (config.folder / f"{kind}{side}_{seed}").absolute()
    command = learning_sides.COMMANDS[config.network][side](config, run, seed)
    shutil.rmtree(run, ignore_errors=True)  # open_clip trains into no folder that exists
    before = children_seconds()
    run_command(command, side, config.threads)
    spent = children_seconds() - before
    opened = learning_sides.OPEN[config.network](config, run)
    found = {**recall(config, *opened), "cpu_seconds": spent}
    print(side, seed, json.dumps(found), flush=True)
    return found


@torch.inference_mode()
def recall(config: Config, embed_image, embed_text, tokenize) -> dict[str, float]:
    """R@1 in percent of the held-out list: captions of each image, images of each caption."""
    test = captions_by_image(config, config.test_data)
    view = EvalView(learning_sides.IMAGE_SIZE, "bicubic")
    pixels = pixel_statistics(torch.device("cpu"), *OPENAI)  # as every side trains
    loaded = torch.stack([view(decode_image(path)) for path, _ in test])
    batches = [{"image": normalize(part, pixels)} for part in loaded.split(64)]
    images = embed_images(embed_image, batches, range(len(test)), len(test), ALONE)
    texts = [text for _, captions in test for text in captions]
    captions = embed_texts(embed_text, tokenize, texts, ALONE)
    counts = torch.tensor([len(captions) for _, captions in test])
    found = retrieve(images, captions, torch.arange(len(test)).repeat_interleave(counts), ALONE)
    return {"captions": found["txt_r1_z"], "images": found["img_r1_z"]}


# ---- the table
def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, 0 of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def spread(values: list[float]) -> str:
    """Mean, standard error of the mean where there are several values, and the values."""
    mean, error = mean_and_error(values)
    error_text = f" ± {error:.1f}" if len(values) > 1 else ""
    return f"{mean:.1f}{error_text} ({', '.join(f'{value:.1f}' for value in values)})"


def figures(runs: list[dict], samples: int) -> dict:
    """A side's row of the table."""
    row = {key: spread([run[key] for run in runs]) for key in DIRECTIONS}
    return {**row, "speed": statistics.mean(samples / run["cpu_seconds"] for run in runs)}


def verdict(found: dict[str, list[dict]]) -> str:
    """Whether our means are below the other side's by more than the standard error of their
    difference; nothing where that error is unknown."""
    if min(map(len, found.values())) < 2:
        return ""
    other = next(side for side in found if side != OURS)
    lines = []
    for direction in DIRECTIONS:
        mean, error = mean_and_error([run[direction] for run in found[OURS]])
        their_mean, their_error = mean_and_error([run[direction] for run in found[other]])
        gap, error = mean - their_mean, math.hypot(error, their_error)
        word = "is" if gap < -error else "is not"
        lines.append(
            f"R@1 of {direction}: ours {word} below {other}'s mean by more than the standard error "
            f"(difference {gap:+.1f} ± {error:.1f})."
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    asked = replace(config)  # what the page's command repeats
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.tiny:
        config.pairs, config.epochs = 2 * config.batch, 1
    if not config.train_data:
        use_digitscenes(config)
    samples = config.epochs * (write_pairs(config) // config.batch) * config.batch
    found: dict[str, list[dict]] = {side: [] for side in learning_sides.COMMANDS[config.network]}
    for seed in config.seeds:
        for side in found:
            found[side].append(train(config, side, seed))
    results = {side: [figures(runs, samples)] for side, runs in found.items()}
    held_out = captions_by_image(config, config.test_data)
    texts = sum(len(texts) for _, texts in held_out)
    remark = f"Mean ± standard error of seeds {', '.join(map(str, config.seeds))}; "
    remark += f"{len(held_out)} held-out images with {texts} captions.\n{verdict(found)}"
    title = [f"Learning of a small {config.network}, {config.train_data.parent.name}"]
    title.append(f"{samples:,} samples")
    publish(asked, "learning", title, results, COLUMNS, remark.rstrip())


if __name__ == "__main__":
    run_script(main, Config, __doc__)
