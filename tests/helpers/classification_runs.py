"""Runs of Classification.py and eval_knn.py with their debug configurations on a handful of
images."""

import json
from pathlib import Path

import Classification
import eval_knn
from runtime.config.cli import parse
from tests.helpers.runs import words_of

ROOT = Path(__file__).resolve().parents[2]


def flags(data: Path, out: Path, **changes) -> list[str]:
    """Command line of the debug pre-training on DigitScenes in `data`."""
    values = {
        "config": ROOT / "configs/Classification/debug.yaml",
        "train-data": data / "coyo_labeled/train.jsonl",
        "val-data": data / "coyo_labeled/val.jsonl",
        "data-root": data,
        "classes": data / "coyo_labeled/classes.txt",
        "output-dir": out,
        "device": "cpu",
        "save-every": "100 steps",  # and at the end: a checkpoint takes as long as a step or two
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return words_of(values)


def fine_tuning(data: Path, out: Path, **changes) -> list[str]:
    """Command line of a debug fine-tuning on class folders."""
    given = {
        "train_data": data / "imagefolder/train",
        "val_data": data / "imagefolder/val",
        "classes": "none",
    }
    given |= {
        "loss": "softmax",
        "representation_size": 0,
        "head_bias": "none",
        "label_threshold": 0,
    }
    return flags(data, out, **given | {"mixup_alpha": 0} | changes)


def train(words: list[str]) -> dict:
    """Run Classification.py; its metrics."""
    config = parse(Classification.Config, words)
    Classification.main(config)
    return json.loads((config.output_dir / "result/metrics.json").read_text())


def neighbours(data: Path, out: Path, **changes) -> dict:
    """Run eval_knn.py on class folders; its metrics."""
    values = {
        "config": ROOT / "configs/eval_knn/debug.yaml",
        "train-data": data / "imagefolder/train",
        "val-data": data / "imagefolder/val",
        "output-dir": out,
        "cache": out / "cache",
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    config = parse(eval_knn.Config, words_of(values))
    eval_knn.main(config)
    return json.loads((config.output_dir / "result/metrics.json").read_text())
