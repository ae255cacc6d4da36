"""`trained` in place of a tokenizer's name: it is learnt from the run's own data at first use and kept
in output_dir, so that a recipe needs no file but the data."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.caches import one_builder
from base.errors import UserError
from base.processes import SENTENCE_FILE
from base.text import as_list

TRAINED = "trained"
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
VOCABULARY, IMAGE_TOKENIZER = SCRIPTS / "data/train_vocabulary.py", SCRIPTS / "train_dvae.py"
PIXELS_A_CODE = 4  # side of the square that a code of train_dvae.py's tokenizer stands for
SMALL_DVAE = ["--vocab_size", "256", "--epochs", "400 steps"]  # a minute on a laptop
# of a launcher: what is trained here is trained by one process
LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "SLURM_",
    "TORCHELASTIC_",
)


def train_tokenizers_if_asked(config: Any) -> None:
    """Train every tokenizer that an option of `config` names `trained`, and put its path there.

    Processes that start together wait for the one that trains; what is there is used again.
    Raises UserError where there is nothing to learn from, or a training fails.
    """
    if str(getattr(config, "text_encoder", "")) == TRAINED:
        config.text_encoder = str(_vocabulary(config, "text_tokenizer", "wordpiece"))
    if str(getattr(config, "tokenizer", "")) == TRAINED:
        if hasattr(config, "train_list"):
            config.tokenizer = _vocabulary(config, "tokenizer.model", "sentencepiece")
        else:
            config.tokenizer = str(_vocabulary(config, "text_tokenizer", "wordpiece"))
    if str(getattr(config, "bpe_path", "")) == TRAINED:
        config.bpe_path = _vocabulary(config, "bpe_merges.txt.gz", "bpe")
    if str(getattr(config, "image_tokenizer_path", "")) == TRAINED:
        # ALBEF has no visual tokens; runs that were begun with a tokenizer still name it
        used = config.method == "simla" or (config.output_dir / "image_tokenizer").exists()
        config.image_tokenizer_path = _image_tokenizer(config) if used else None


def _vocabulary(config: Any, name: str, kind: str) -> Path:
    """The vocabulary `name` in output_dir, of the captions or labels of the training data."""
    target = config.output_dir / name
    with one_builder(target):
        if target.exists():
            return target
        data = [str(file) for file in _lists(config)]
        shards = getattr(config, "shards", [])
        _check_data(config, data or shards, name)
        _check_folder(config, name)
        print(f"{target} is not there yet: learning it from the training data", flush=True)
        options = ["--kind", kind, "--target", str(target)]
        options += ["--text", *getattr(config, "text_fields", ["caption"])]
        options += ["--data", *data] if data else []
        options += ["--shards", *shards] if shards else []
        _run(VOCABULARY, options, name)
    return target


def _image_tokenizer(config: Any) -> Path:
    """The image tokenizer in output_dir, of the images of the training lists, else of the shards."""
    folder = config.output_dir / "image_tokenizer"
    with one_builder(folder):
        if not (folder / "image_tokenizer.safetensors").exists():
            data = [str(file) for file in _lists(config)] or getattr(config, "shards", [])
            _check_data(config, data, "image_tokenizer_path")
            _check_folder(config, folder.name)
            print(f"{folder} is not there yet: training it on the training images", flush=True)
            side = config.grid * PIXELS_A_CODE
            options = ["--data", *data, "--image_root", str(config.image_root)]
            options += ["--size", str(side), "--flip", str(config.flip).lower(), *SMALL_DVAE]
            options += ["--workers", str(config.workers), "--device", config.device]
            _run(IMAGE_TOKENIZER, [*options, "--output_dir", str(folder)], "image_tokenizer")
    return folder


def _lists(config: Any) -> Sequence:
    """The annotation files of the training data, as each script calls them."""
    for name in ("train_file", "train_list"):
        if hasattr(config, name):
            return as_list(getattr(config, name) or [])
    return [config.metadata] if getattr(config, "dataset", None) == "pairs" else []


def _check_data(config: Any, data: Sequence, name: str) -> None:
    if not data:
        option = next((o for o in ("train_file", "train_list") if hasattr(config, o)), "metadata")
        raise UserError(
            f"{name}: {TRAINED} learns from the training data: name a list or table in {option}"
        )


def _check_folder(config: Any, name: str) -> None:
    """A run that trains its tokenizers has them before its first checkpoint."""
    begun = next(config.output_dir.glob("checkpoint_*"), None)
    if begun is not None and getattr(config, "resume", "auto") != "no":
        raise UserError(
            f"{begun} is of a run without {config.output_dir / name}; choose another --output_dir, "
            "or --resume no to start from scratch"
        )


def _run(script: Path, options: list[str], what: str) -> None:
    """Run a script of ours; where it fails, raise UserError with the sentence that it ended in. Left
    alone, it would hold the folder that the next start needs: it ends with this process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as sentence:
        env[SENTENCE_FILE] = sentence.name
        done = subprocess.run([sys.executable, str(script), *options], env=env)
        if done.returncode:
            reason = sentence.read() or f"see above, and python {script} --help"
            raise UserError(f"{what}: could not be trained: {reason}")
