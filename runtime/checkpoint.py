"""Checkpoints of a run that survive crashes, full disks and damaged files; reading and exporting
weights.

A checkpoint is one `torch.save` file, readable with `weights_only=True`, or a folder of such files,
one from each process (`runtime.sharded`). Both are written under a temporary name, synced and
renamed, so that a name never stands for half a checkpoint, and every file carries its hash
(`runtime.hashed`).
"""

import os
import re
import shutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from base.addresses import where_from
from base.distributed import rank
from base.errors import UserError
from base.names import matching_files
from base.torch_files import (
    INDICES,
    check_dense,
    check_numbers,
    find_index,
    is_safetensors,
    read_index,
    read_tensors,
    unwrap_names,
)
from base.writing import atomic_write, file_errors, sync_folder, write_safetensors
from runtime.hashed import find_file_damage, recorded_hash, write_hashed
from runtime.safe_pickle import Stub, load_torch, module_tensors
from runtime.sharded import find_folder_damage, is_sharded, load_index, weights_in, write_index

NUMBERED = re.compile(r"checkpoint_(\d+)(?:\.pt)?")
UNFINISHED = (".writing", ".old")  # of hidden folders: not yet, or no longer, a checkpoint
RESUMABLE = "earlier checkpoints are intact: make room, then start the same command again to resume"
AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
# entries of files that hold the weights, the first that is there; DINO publishes its teacher
TABLES = ("model", "state_dict", "teacher", "model_state_dict", "module", *AVERAGES)
LIGHTNING = "pytorch-lightning_version"  # an entry of every file of its
PART = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin)$")
USUAL = ("model", "open_clip_model", "pytorch_model", "open_clip_pytorch_model")  # of libraries
FOREIGN = (".pt", ".pth", ".ckpt", ".tar", ".bin")  # endings of other trainers' files
PLAIN = (int, float, str, bool, type(None))


class CheckpointFolder:
    """The checkpoints of one run: files `checkpoint_<step>.pt` or folders `checkpoint_<step>`, the
    `keep` newest of them, and the best as `checkpoint_best.pt` or `checkpoint_best`.

    One process of the run saves. With several, one calls `newest_valid()` and tells the others its
    answer.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = max(1, keep)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Writes `state` (tensors and plain containers, numbers, strings) and returns the file's
        path.

        Raises `UserError` on a full disk, with every older checkpoint intact, and `TypeError` for a
        value that `weights_only=True` would not read back.
        """
        _check_plain(state)
        for leftover in self.folder.glob("checkpoint_*.pt.tmp"):  # as earlier versions left them
            leftover.unlink()
        path = self.folder / f"checkpoint_{step:08d}.pt"
        if path.is_dir():
            _set_aside(path, "is a folder")
        with atomic_write(path, RESUMABLE) as temporary:
            write_hashed(state, temporary)
        self._drop_other_kind(path)
        self._prune(step)
        return path

    def unfinished(self, step: int) -> Path:
        """The hidden folder in which a sharded checkpoint is written."""
        return self.folder / f".checkpoint_{step:08d}{UNFINISHED[0]}"

    def commit(self, index: dict[str, Any], hashes: list[str], step: int) -> Path:
        """Makes the files that all processes wrote into `unfinished(step)` a checkpoint, by one
        rename, and returns its path.

        index: the state with meta tensors; hashes: of the files, in the order of the ranks. Raises
        as `save`.
        """
        _check_plain(index)
        written = self.unfinished(step)
        path = self.folder / f"checkpoint_{step:08d}"
        write_index(written, index, hashes, RESUMABLE)
        with file_errors(path, RESUMABLE):
            if path.is_dir():  # damaged, or of a past that the run went back from
                self._remove(path)
            os.replace(written, path)
            sync_folder(self.folder)
        self._drop_other_kind(path)
        self._prune(step)
        return path

    def at(self, step: int) -> Path | None:
        """The numbered checkpoint of a step."""
        return next((path for path in self.numbered() if _step_of(path) == step), None)

    def make_best(self, step: int) -> None:
        """Give the checkpoint of a step, which is there, the second name `checkpoint_best.pt` or
        `checkpoint_best`, which is never pruned: a hard link to the file, a symbolic link to the
        folder."""
        path = self.at(step)
        name = self.folder / f"checkpoint_best{path.suffix}"
        if path.is_dir():
            self._link_folder(path, name)
        else:
            if name.is_dir():
                _set_aside(name, "is a folder")
            with atomic_write(name, RESUMABLE) as temporary:
                _same_file(path, temporary)
        self._drop_other_kind(name)
        self.drop_old(step)  # a folder that was the best one until now

    def clear_unfinished(self) -> None:
        """Remove what a killed run was about to write or to remove. No process may be writing."""
        for ending in UNFINISHED:
            for path in self.folder.glob(f".checkpoint_*{ending}"):
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def set_best_aside(self) -> None:
        """Rename the best checkpoint of an earlier run, which a new run in this folder must not take for its own."""
        best = self.best
        if best is None:
            return
        if best.is_symlink():
            target = best.resolve()
            best.unlink()
            best = target.rename(best)
        _set_aside(best, "is of an earlier run in this folder")

    def restore_best(self, metric: str, scores: Mapping[int, float]) -> float:
        """Make the intact checkpoint with the highest score the best one, where that is another:
        it was lost or damaged, or the run was killed before its best one got the name. Returns the
        score; -inf where no checkpoint has one.

        scores: by step; earlier versions kept the score in the checkpoint, called `metric`.
        """
        best = float("-inf")
        step = None
        present = self.best
        if present and find_damage(present) is None:
            content = load_checked(present)
            best = content.get(metric, scores.get(content["step"], best))
        for path in reversed(self.numbered()):  # of equals the first one, as in training
            score = scores.get(_step_of(path), float("-inf"))
            if score > best and find_damage(path) is None:
                best, step = score, _step_of(path)
        if step is not None:
            self.make_best(step)
        return best

    def _link_folder(self, source: Path, name: Path) -> None:
        """Make `name` a symbolic link to the folder `source` beside it, in one step."""
        temporary = name.with_name(f".{name.name}{UNFINISHED[1]}")
        with file_errors(name, RESUMABLE):
            temporary.unlink(missing_ok=True)
            if name.is_dir() and not name.is_symlink():  # a copy of the run has folders for links
                self._remove(name)
            temporary.symlink_to(source.name, target_is_directory=True)
            os.replace(temporary, name)

    def _drop_other_kind(self, name: Path) -> None:
        """Of a step, and of the best, there is one checkpoint: remove that of the other kind."""
        other = name.with_suffix("" if name.suffix else ".pt")
        if other.is_symlink() or other.is_file():
            other.unlink()
        elif is_sharded(other):
            self._remove(other)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; a folder under another name, for that takes more than one step."""
        if not path.is_dir():
            path.unlink()
            return
        hidden = path.with_name(f".{path.name}{UNFINISHED[1]}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def numbered(self) -> list[Path]:
        """The files `checkpoint_<step>.pt` and folders `checkpoint_<step>`, newest step first."""
        found = [path for path in self.folder.glob("checkpoint_*") if NUMBERED.fullmatch(path.name)]
        return sorted(
            (path for path in found if path.suffix or path.is_dir()), key=_step_of, reverse=True
        )

    @property
    def best(self) -> Path | None:
        """The checkpoint that `make_best` named last, if any."""
        file = self.folder / "checkpoint_best.pt"
        folder = self.folder / "checkpoint_best"
        found = [path for path in (file, folder) if path.is_file() or is_sharded(path)]
        return max(found, key=lambda path: path.lstat().st_mtime_ns, default=None)

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose hash is right, the best one after all numbered ones; None in
        an empty folder.

        Warns of every damaged one it passes over. Raises `UserError` if all are damaged: to start
        over silently would lose the run.
        """
        return _first_intact(self.numbered() + ([self.best] if self.best else []))

    def _prune(self, step: int) -> None:
        """Keeps the newest up to `step`; a later step belongs to a past the run went back from, and
        is set aside."""
        for path in self.numbered():
            if path.suffix and path.is_dir():
                _set_aside(path, "is a folder")
            elif _step_of(path) > step:
                _set_aside(path, f"is of a later step than {step}, just saved")
        self.drop_old(step)

    def drop_old(self, step: int) -> None:
        """Of the numbered checkpoints up to `step` keep the newest; a killed run may leave one more."""
        best = (self.folder / "checkpoint_best").resolve()  # a link: what it means must stay
        upto = [path for path in self.numbered() if _step_of(path) <= step]
        upto = [path for path in upto if path.is_file() or not path.suffix]
        for path in upto[self.keep :]:
            if path.resolve() != best:
                self._remove(path)


def _set_aside(path: Path, reason: str) -> None:
    """Rename what must not be taken for a checkpoint of the run, and say so."""
    aside = path.with_name(path.name + ".superseded")
    while aside.is_dir():
        aside = aside.with_name(aside.name + ".superseded")
    warnings.warn(f"{path} {reason}; now {aside.name}", stacklevel=4)
    path.rename(aside)


def find_damage(path: str | Path) -> str | None:
    """None if a checkpoint is exactly what was written, else what is wrong with it. Reads all of it,
    once as long as it does not change."""
    path = Path(path)
    is_folder = path.is_dir() and path.suffix != ".pt"
    return find_folder_damage(path) if is_folder else find_file_damage(path)


def _find_damage_unless_foreign(path: Path) -> str | None:
    """As `find_damage`, but a whole archive without our hash is another project's checkpoint."""
    foreign = path.is_file() and zipfile.is_zipfile(path) and recorded_hash(path) is None
    return None if foreign else find_damage(path)


def _first_intact(
    candidates: list[Path], damage_of: Callable[[Path], str | None] = find_damage
) -> Path | None:
    """The first file that is exactly what was written; None where there is no candidate.

    Warns of every damaged one it passes over, raises `UserError` where all are damaged.
    """
    for index, path in enumerate(candidates):
        damage = damage_of(path)
        if damage is None:
            return path
        if index + 1 < len(candidates):
            before = candidates[index + 1]
            warnings.warn(
                f"CHECKPOINT DAMAGED: {path} ({damage}). Going back to {before}", stacklevel=3
            )
    if candidates:
        raise UserError(
            f"{candidates[0].parent}: no checkpoint is intact ({damage} in {candidates[-1].name}, the last one tried); "
            "restore one from a backup, or start over in another output directory"
        )
    return None


def load_checked(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `CheckpointFolder` whose hash was found right (`newest_valid`,
    `find_damage`).

    Tensors are mapped from the file, not copied: all processes of a machine share them. Those of a
    sharded checkpoint are meta tensors, see `runtime.sharded.read_state`.
    """
    path = Path(path)
    return load_index(path) if path.is_dir() else load_torch(path)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Plain state dict, on the CPU, of a checkpoint in any known form.

    Takes checkpoints of this project (hash verified; a run directory means its best, else its
    newest checkpoint), a Hugging Face folder, all shards of its index, `.pth` files of the original systems with a `model` or `state_dict` entry,
    bare state dicts, `.safetensors`, and pickled modules (`encoder.pkl`). The prefixes `module.`
    and `_orig_mod.` of wrapped models are removed, and Lightning's `model.`. Raises `UserError`,
    also for weights that are not numbers.
    """
    path = Path(path)
    index = find_index(path)
    if index is not None:
        weights = read_index(index)
    else:
        path = weights_file(path)
        if is_sharded(path):
            weights = dict(weights_in(verified(path)))
        else:
            weights = read_tensors(path) if is_safetensors(path) else _read_pickled(path)
    weights = unwrap_names(weights)
    for name, value in weights.items():
        check_numbers(path, name, value)
    return weights


def verified(path: Path) -> Path:
    """The path of a checkpoint of this project, if it is intact. UserError."""
    if damage := find_damage(path):
        raise UserError(f"{path}: {damage}; use another checkpoint of that run")
    return path


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """State dict of anything that is not safetensors."""
    if zipfile.is_zipfile(path) and recorded_hash(path) is not None:
        verified(path)
    content = load_torch(path)
    if isinstance(content, Stub):
        return module_tensors(content, path)
    if isinstance(content, dict):
        tables = [key for key in TABLES if isinstance(content.get(key), dict)]
        stored = content[tables[0]] if tables else content
        # networks may keep states of their own beside their weights
        weights = {k: v for k, v in stored.items() if not str(k).endswith("_extra_state")}
        named = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items())
        if weights and named:
            check_dense(path, weights)
            if LIGHTNING in content:
                weights = _without_model(weights)
            for name in tables[1:]:
                if name in AVERAGES:
                    _note(
                        f"note: {path}: {name}, their average, is left out; to use it, save it alone"
                    )
            return weights
    entries = [str(key)[:40] for key in content][:10] if isinstance(content, dict) else []
    found = f"entries {', '.join(entries)}" if entries else f"a {type(content).__name__}"
    raise UserError(
        f"{path}: holds no weights: neither tensors by name nor such a table under "
        f"{' or '.join(TABLES)}, but {found}; save the weights alone"
    )


def _without_model(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's own names where a module of Lightning holds it as `model`, and nothing beside it."""
    own = {name.removeprefix("model."): value for name, value in weights.items()}
    return own if all(name.startswith("model.") for name in weights) else weights


@cache
def _note(text: str) -> None:
    """Say it once, however often a file is read."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def export_safetensors(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as safetensors, atomically. Tied tensors are written once per name, so
    that all keys stay."""
    seen = set()
    own = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        own[key] = value.clone() if storage.data_ptr() in seen else value
        seen.add(storage.data_ptr())

    write_safetensors(path, own, {"format": "pt"})


def _step_of(path: Path) -> int:
    return int(NUMBERED.fullmatch(path.name)[1])


def _same_file(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)


def _check_plain(value: Any, where: str = "state") -> None:
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            _check_plain(key, f"key {key!r} of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif not (isinstance(value, torch.Tensor) or type(value) in PLAIN):
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint takes tensors, lists, dicts, numbers"
        )


# ---- weights


def _weights_called(folder: Path, pattern: str) -> Path | None:
    """The file of a folder whose name matches, of several the one that is called as usual. UserError
    where it cannot be known."""
    files = matching_files(folder, pattern)
    named = [file for name in USUAL for file in files if file.stem == name]
    if len(files) > 1 and not named and not PART.search(files[0].name):
        listed = ", ".join(file.name for file in files[:4])
        raise UserError(f"{folder}: several files of weights ({listed}); name one of them")
    return next(iter(named or files), None)


def weights_file(path: Path) -> Path:
    """The file, or the folder of a sharded checkpoint, itself; of a run's folder the best
    checkpoint, else the newest, else model.safetensors or the only one; of a Hugging Face folder with
    parts, their index. Warns of damaged checkpoints, which it passes over. UserError."""
    if path.is_dir() and not is_sharded(path):
        if index := find_index(path):
            return index
        checkpoints = CheckpointFolder(path)
        ours = [checkpoints.best] if checkpoints.best else []
        found = _first_intact(ours + checkpoints.numbered(), _find_damage_unless_foreign)
        for pattern in ("*.safetensors", "*pytorch_model.bin"):
            found = found or _weights_called(path, pattern)
        if found is None:
            inside = [p for end in ("checkpoint_*", "*.safetensors") for p in path.glob(f"*/{end}")]
            runs = ", ".join(sorted({str(file.parent) for file in inside})[:3])
            others = [file.name for file in matching_files(path, "*") if file.suffix in FOREIGN]
            raise UserError(
                f"{path}: a folder without checkpoint_*.pt, *.safetensors or pytorch_model.bin"
                + (f"; name one of the runs in it: {runs}" if runs else "")
                + (f"; name one of its files: {', '.join(others[:4])}" if others else "")
            )
        path = found
    elif not path.is_file() and not is_sharded(path):
        raise UserError(f"{path}: no such checkpoint{where_from(path)}")
    if (parts := PART.search(path.name)) and int(parts[1]) > 1:
        raise UserError(
            f"{path}: one of {int(parts[1])} parts; name the folder of all, with the "
            f"{' or '.join(INDICES)} that lists them (fetch what is missing)"
        )
    return path
