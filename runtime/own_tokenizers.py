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
from base.reading import read_json
from base.text import as_list
from base.writing import write_json
from runtime.options import starts_over

TRAINED = "trained"
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
VOCABULARY, IMAGE_TOKENIZER = SCRIPTS / "data/train_vocabulary.py", SCRIPTS / "train_dvae.py"
NOTE = "learnt_from.json"  # in output_dir: the data of every tokenizer there
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
    data = [str(file) for file in _lists(config)]
    shards = getattr(config, "shards", [])
    with one_builder(target):
        if target.exists():
            _check_source(config, name, data or shards)
            return target
        _check_data(config, data or shards, name)
        _check_folder(config, name)
        print(f"{target} is not there yet: learning it from the training data", flush=True)
        options = ["--kind", kind, "--target", str(target)]
        options += ["--text", *getattr(config, "text_fields", ["caption"])]
        options += ["--data", *data] if data else []
        options += ["--shards", *shards] if shards else []
        _run(VOCABULARY, options, name)
        _note_source(config, name, data or shards)
    return target


def _image_tokenizer(config: Any) -> Path:
    """The image tokenizer in output_dir, of the images of the training lists, else of the shards."""
    folder = config.output_dir / "image_tokenizer"
    data = [str(file) for file in _lists(config)] or getattr(config, "shards", [])
    with one_builder(folder):
        if (folder / "image_tokenizer.safetensors").exists():
            _check_source(config, folder.name, data)
        else:
            _check_data(config, data, "image_tokenizer_path")
            _check_folder(config, folder.name)
            print(f"{folder} is not there yet: training it on the training images", flush=True)
            side = config.grid * PIXELS_A_CODE
            options = ["--data", *data, "--image_root", str(config.image_root)]
            options += ["--size", str(side), "--flip", str(config.flip).lower(), *SMALL_DVAE]
            options += ["--workers", str(config.workers), "--device", config.device]
            _run(IMAGE_TOKENIZER, [*options, "--output_dir", str(folder)], "image_tokenizer")
            _note_source(config, folder.name, data)
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
    if begun := _to_resume(config):
        raise UserError(
            f"{begun} is of a run without {config.output_dir / name}; choose another --output_dir, "
            "or --resume no to start from scratch"
        )


def _to_resume(config: Any) -> Path | None:
    """A checkpoint that the run continues; None where it starts from scratch."""
    found = config.output_dir.glob("checkpoint_*")
    begun = next((path for path in found if path.suffix != ".superseded"), None)
    return None if starts_over(getattr(config, "resume", "auto")) else begun


def _check_source(config: Any, name: str, data: Sequence) -> None:
    """UserError where a run from scratch would use a tokenizer of other data. One that continues
    needs that of its weights, and is asked about its data as about all options."""
    note = config.output_dir / NOTE
    if not data or getattr(config, "evaluate", False) or not note.is_file() or _to_resume(config):
        return
    learnt_from = read_json(note, dict).get(name)
    if learnt_from not in (None, _in_full(data)):
        other = ", ".join(map(str, as_list(learnt_from)))
        raise UserError(
            f"{config.output_dir / name} was learnt from other data ({other:.300}); "
            "remove it to learn it from this run's, or choose another --output_dir"
        )


def _note_source(config: Any, name: str, data: Sequence) -> None:
    """Note in the folder what the tokenizer was learnt from."""
    note = config.output_dir / NOTE
    known = read_json(note, dict) if note.is_file() else {}
    write_json(note, {**known, name: _in_full(data)}, indent=2)


def _in_full(data: Sequence) -> list[str]:
    """The names of data, paths from the root on."""
    return [name if "://" in name else os.path.abspath(name) for name in map(str, data)]


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
