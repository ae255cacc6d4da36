"""What small networks learn: ours beside the training code of others, on the same pairs.

    python -m benchmarks.learning                                     # DigitScenes, made if missing
    python -m benchmarks.learning --train-data pairs.json --test-data held_out.json --image-root images
    python -m benchmarks.learning --peer PATH/TO/ALBEF --pairs 5000 --epochs 4

The first two train a CLIP by main.py and by open_clip's own script: the same network (ViT of 4
blocks, width 128, patches of 8 pixels; text transformer of 2 blocks, width 128, 24 tokens) from
random weights. With --peer it is an ALBEF by Pretrain.py and by the original's own main(): the same
network (ViT of 2 blocks, width 96; BERT of 2 layers, the second fusing) from the same weights.

Both sides have the same batch size, optimizer, learning rates, crops and number of samples. One
evaluator then embeds the held-out images and captions and takes the recall at 1 among all of them,
for ALBEF by its contrastive features. Weights and order of the samples differ between seeds, and so
does recall: the table gives the mean, its standard error and every seed. Recall does not depend on
how busy the machine is; samples a CPU second hardly do. open_clip's script needs `pip install
"open_clip_torch[training]"`.
"""

import csv
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from base.distributed import ALONE
from base.errors import UserError
from base.files import read_json, write_json, write_json_lines
from benchmarks import learning_albef
from benchmarks.runner import OURS, ROOT, PeerOptions, check_peer, device_of
from benchmarks.table import markdown, publish
from dataset.images.clip import EvalView, normalize, pixel_statistics
from dataset.images.decode import decode_image
from dataset.text.bpe import ClipTokenizer
from evaluation.zeroshot import retrieve, unit_rows
from runtime.config.cli import knob, run_script

IMAGE_SIZE, CONTEXT, WIDTH, PATCH = 48, 24, 128, 8
OPEN_CLIP = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "layers": 4,
        "width": WIDTH,
        "head_width": 32,
        "patch_size": PATCH,
    },
    "text_cfg": {"context_length": CONTEXT, "width": WIDTH, "heads": 4, "layers": 2},
}


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
    sides: list[str] = knob([], "which to train: ours, open_clip, or original with --peer")
    repeats: int = knob(2, "number of seeds, from 0 on, unless --seeds names them", low=1)
    seeds: list[int] = knob([], "one training run of each side for each")
    pairs: int = knob(20_000, "image-caption pairs to train on, a fixed subset; 0 = all", low=0)
    epochs: int = knob(2, "passes over these pairs", low=1)
    batch: int = knob(64, "pairs a step", low=2)
    lr: float = knob(1e-3, "peak learning rate of AdamW", low=0)
    warmup: int = knob(100, "steps of linear warm-up before the cosine", low=0)

    def check(self) -> None:
        """Check that the options are compatible."""
        self.seeds = self.seeds or list(range(self.repeats))
        given = self.train_data, self.test_data, self.image_root
        if any(given) and not all(given):
            raise UserError(
                "--train-data, --test-data and --image-root go together: give all three"
            )
        if self.peer and given[0] and not self.text_encoder:
            raise UserError("--peer with --train-data needs --text-encoder, a WordPiece tokenizer")
        check_peer(self, learning_albef.CHECKOUT_FILE, "ALBEF", one_size=False)
        known = list(sides_of(self))
        self.sides = self.sides or known
        for side in self.sides:
            if side not in known:
                raise UserError(f"--sides {side} is unknown; use {' or '.join(known)}")


# ---- data
def use_digitscenes(config: Config) -> None:
    """Point `config` at DigitScenes in its folder, made if missing."""
    config.image_root = config.folder / "digitscenes"
    config.train_data = config.image_root / "pretrain_train.json"
    config.test_data = config.image_root / "retrieval_test.json"
    if not config.test_data.exists():
        sizes = ["--train", "6000", "--val", "300", "--test", "300", "--size", "64", "--seed", "0"]
        script = ROOT / "scripts/data/make_digitscenes.py"
        subprocess.run([sys.executable, script, config.image_root, *sizes], check=True)


def captions_by_image(config: Config, file: Path) -> list[tuple[Path, list[str]]]:
    """Absolute path and captions of every image of a list."""
    found = []
    for row in read_json(file, list):
        texts = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
        found.append(((config.image_root / row["image"]).absolute(), texts))
    return found


def write_pairs(config: Config) -> int:
    """The training pairs as every side reads them, one caption a row; returns how many."""
    pairs = [
        (image, text)
        for image, texts in captions_by_image(config, config.train_data)
        for text in texts
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [pairs[i] for i in order[: config.pairs or None]]
    rows = ({"image": str(image), "caption": [text]} for image, text in chosen)
    write_json_lines(config.folder / "train.jsonl", rows)
    rows = [{"image": str(image), "caption": text} for image, text in chosen]
    write_json(config.folder / "train.json", rows)
    with open(config.folder / "train.csv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["filepath", "title"])
        table.writerows(chosen)
    return len(chosen)


# ---- training
def train_ours(config: Config, run: Path, seed: int) -> list[str]:
    """The command that trains main.py's CLIP into the folder `run`."""
    options = {
        "model": "CLIP_VITT8_CLIP",
        "dataset": "pairs",
        "metadata": config.folder / "train.jsonl",
        "root": "/",
        "image-size": IMAGE_SIZE,
        "embed-dim": WIDTH,
        "context-length": CONTEXT,
        "text-width": WIDTH,
        "text-heads": 4,
        "transformer-layers": 2,
        "num-augs": 0,
        "weak-min-scale": 0.8,
        "flip": "false",
        "batch-size": config.batch,
        "epochs": config.epochs,
        "warmup": f"{config.warmup} steps",
        "lr": config.lr,
        "lr-start": 0,
        "lr-end": 0,
        "wd": 0.1,
        "eps": 1e-6,
        "precision": "fp32",
        "device": device_of(config),
        "workers": 1,
        "tensorboard": "false",
        "seed": seed,
        "resume": "no",
        "output-dir": run,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "main.py", *flags]


def train_open_clip(config: Config, run: Path, seed: int) -> list[str]:
    """The command that trains open_clip's CLIP into the folder `run` by its own main()."""
    write_json(config.folder / "open_clip_small.json", OPEN_CLIP)
    start = (
        "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
        "from open_clip_train.main import main; main(sys.argv[1:])"
    )
    options = {
        "model": "open_clip_small",
        "dataset-type": "csv",
        "train-data": config.folder / "train.csv",
        "batch-size": config.batch,
        "epochs": config.epochs,
        "warmup": config.warmup,
        "lr": config.lr,
        "wd": 0.1,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "aug-cfg": "scale=(0.8,1.0)",
        "precision": "fp32",
        "device": device_of(config),
        "workers": 1,
        "save-frequency": 0,
        "seed": seed,
        "logs": run.parent,
        "name": run.name,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-c", start, str(config.folder / "open_clip_small.json"), *flags]


# ---- evaluation
def clip_tokens(texts: list[str]) -> torch.Tensor:
    """Ids int64 [B,L] of CLIP's tokenizer."""
    return ClipTokenizer(None, CONTEXT)(texts, lengths=[CONTEXT])


def open_ours(config: Config, run: Path) -> tuple:
    """`(embed images, embed texts, tokenize)` of main.py's newest checkpoint."""
    from models.weights.any_dual_encoder import open_dual
    from runtime.checkpoint import read_weights, weights_file
    from runtime.config.from_checkpoint import described

    file = weights_file(run)
    model = open_dual(read_weights(file), described(file)).model

    def embed_image(image: torch.Tensor) -> torch.Tensor:
        return model.embed_image(image)["z"]

    def embed_text(ids: torch.Tensor) -> torch.Tensor:
        return model.embed_text(ids)["z"]

    return embed_image, embed_text, clip_tokens


def open_open_clip(config: Config, run: Path) -> tuple:
    """`(embed images, embed texts, tokenize)` of open_clip's last checkpoint."""
    import open_clip

    open_clip.add_model_config(config.folder / "open_clip_small.json")
    model = open_clip.create_model("open_clip_small").eval()
    file = run / f"checkpoints/epoch_{config.epochs}.pt"
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    return model.encode_image, model.encode_text, clip_tokens


CLIP_SIDES = {OURS: (train_ours, open_ours), "open_clip": (train_open_clip, open_open_clip)}


def sides_of(config: Config) -> dict[str, tuple]:
    """By name: the function that gives the command of a training run, and the one that opens it."""
    return learning_albef.SIDES if config.peer else CLIP_SIDES


@torch.inference_mode()
def recall(config: Config, embed_image, embed_text, tokenize) -> dict[str, float]:
    """R@1 in percent of the held-out list: captions of each image, images of each caption."""
    test = captions_by_image(config, config.test_data)
    view, pixels = EvalView(IMAGE_SIZE, "bicubic"), pixel_statistics(torch.device("cpu"))
    texts = [text for _, captions in test for text in captions]
    text_image = torch.tensor([i for i, (_, captions) in enumerate(test) for _ in captions])

    def embed(batches: Iterator[torch.Tensor], function) -> dict[str, torch.Tensor]:
        rows = [unit_rows({"z": function(batch)})[0] for batch in batches]
        return {"z": torch.cat(rows)}

    loaded = [view(decode_image(path)) for path, _ in test]
    images = embed((normalize(part, pixels) for part in torch.stack(loaded).split(64)), embed_image)
    captions = embed(tokenize(texts).split(64), embed_text)
    found = retrieve(images, captions, text_image, ALONE)
    return {"captions": found["txt_r1_z"], "images": found["img_r1_z"]}


def cpu_seconds() -> float:
    """Processor time of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(config: Config, side: str, seed: int) -> dict[str, float]:
    """Train one side with one seed and evaluate it."""
    kind = "albef_" if config.peer else ""
    run = (config.folder / f"{kind}{side}_{seed}").absolute()
    command_of, open_run = sides_of(config)[side]
    command = command_of(config, run, seed)
    shutil.rmtree(run, ignore_errors=True)  # open_clip trains into no folder that exists
    env = dict(os.environ, OMP_NUM_THREADS=str(config.threads), OMP_WAIT_POLICY="PASSIVE")
    began = cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{side} failed (exit {done.returncode}):\n{done.stderr.strip()[-3000:]}")
    spent = cpu_seconds() - began
    figures = recall(config, *open_run(config, run)) | {"cpu_seconds": spent}
    print(side, seed, json.dumps(figures), flush=True)
    return figures


def standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 of one value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float]) -> str:
    """Mean, standard error of the mean where there are several values, and the values."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {standard_error(values):.1f}"
    return f"{text} ({', '.join(f'{value:.1f}' for value in values)})"


def table(found: dict[str, list[dict]], samples: int) -> str:
    """A row a side."""
    rows = []
    for side, runs in found.items():
        captions = spread([run["captions"] for run in runs])
        images = spread([run["images"] for run in runs])
        speed = statistics.mean(samples / run["cpu_seconds"] for run in runs)
        rows.append([side, captions, images, f"{speed:.0f}"])
    head = ["", "R@1 of captions (each seed)", "R@1 of images (each seed)", "samples a CPU second"]
    return markdown(head, rows)


def verdict(found: dict[str, list[dict]]) -> str:
    """For each direction of retrieval, whether our mean is below the other side's by more than the
    standard error of their difference; nothing where that error is unknown."""
    if OURS not in found or len(found) < 2 or min(map(len, found.values())) < 2:
        return ""
    other = next(side for side in found if side != OURS)
    lines = []
    for direction in ("captions", "images"):
        ours = [run[direction] for run in found[OURS]]
        theirs = [run[direction] for run in found[other]]
        gap = statistics.mean(ours) - statistics.mean(theirs)
        error = math.hypot(standard_error(ours), standard_error(theirs))
        word = "is" if gap < -error else "is not"
        lines.append(
            f"R@1 of {direction}: ours {word} below {other}'s mean by more than the standard error "
            f"(difference {gap:+.1f} ± {error:.1f})."
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    asked = replace(config)  # what the page's command repeats
    config.check()
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.tiny:
        config.pairs, config.epochs = 2 * config.batch, 1
    if not config.train_data:
        use_digitscenes(config)
    samples = config.epochs * (write_pairs(config) // config.batch) * config.batch
    found: dict[str, list[dict]] = {side: [] for side in config.sides}
    for seed in config.seeds:
        for side in config.sides:
            found[side].append(train(config, side, seed))
    held_out = captions_by_image(config, config.test_data)
    texts = sum(len(texts) for _, texts in held_out)
    body = table(found, samples)
    body += f"\n\nMean ± standard error of seeds {', '.join(map(str, config.seeds))}; "
    body += f"{len(held_out)} held-out images with {texts} captions.\n{verdict(found)}"
    network = "ALBEF" if config.peer else "CLIP"
    title = [f"Learning of a small {network}, {config.train_data.parent.name}"]
    title.append(f"{samples:,} samples")
    publish(asked, "learning", title, body.rstrip(), found)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
