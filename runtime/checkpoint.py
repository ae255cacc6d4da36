"""Checkpoints of a run that survive crashes, full disks and damaged files; reading and exporting
weights.

A checkpoint is one `torch.save` file, readable with `weights_only=True`. It is written under a
temporary name, synced and renamed, so that a name never stands for half a file. Its sha256,
computed while writing, is the comment of the zip archive itself: file and hash change together in
the one rename, and every zip reader skips the comment.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from base.files import atomic_write, file_state
from base.heartbeat import beat
from base.torch_files import find_index, read_index, read_tensors
from runtime.safe_pickle import Stub, load_torch, module_tensors

HASH_LABEL = b"sha256:"
COMMENT_SIZE = len(HASH_LABEL) + 64
BLOCK = 1 << 22  # bytes hashed at a time
NUMBERED = re.compile(r"checkpoint_(\d+)\.pt")
RESUMABLE = "earlier checkpoints are intact: make room, then start the same command again to resume"
PLAIN = (int, float, str, bool, type(None))


class CheckpointFolder:
    """The checkpoints of one run: `checkpoint_<step>.pt`, the `keep` newest of them, and
    `checkpoint_<tag>.pt`.

    One process of the run saves. With several, one calls `newest_valid()` and tells the others its
    answer.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = max(1, keep)

    def save(self, state: dict[str, Any], step: int, tag: str | None = None) -> Path:
        """Writes `state` (tensors and plain containers, numbers, strings) and returns the file's
        path.

        A `tag` such as "best" gives the same file the second name `checkpoint_<tag>.pt`, which is
        never pruned. Raises `UserError` on a full disk, with every older checkpoint intact, and
        `TypeError` for a value that `weights_only=True` would not read back.
        """
        _check_plain(state)
        for leftover in self.folder.glob("checkpoint_*.pt.tmp"):  # as earlier versions left them
            leftover.unlink()
        path = self.folder / f"checkpoint_{step:08d}.pt"
        # the tagged name first: a run killed between the two repeats the step, and still has its best
        names = [path] if tag is None else [self.folder / f"checkpoint_{tag}.pt", path]
        for name in names:
            if name.is_dir():
                _set_aside(name, "is a folder")
        with atomic_write(names[0], RESUMABLE) as temporary:
            _write_hashed(state, temporary)
        for name in names[1:]:
            self._link(names[0], name)
        self._prune(step)
        return path

    def set_best_aside(self) -> None:
        """Rename the best checkpoint of an earlier run, which a new run in this folder must not take for its own."""
        if self.best is not None:
            _set_aside(self.best, "is of an earlier run in this folder")

    def restore_best(self, metric: str) -> float:
        """Make the intact numbered checkpoint with the highest `metric` the best one, after the
        best one was lost or damaged. Returns its score; -inf where no checkpoint has one."""
        best, source = float("-inf"), None
        for path in reversed(self.numbered()):  # of equals the first one, as in training
            if find_damage(path) is None:
                score = load_checked(path).get(metric, float("-inf"))
                if score > best:
                    best, source = score, path
        if source is not None:
            self._link(source, self.folder / "checkpoint_best.pt")
        return best

    def _link(self, source: Path, name: Path) -> None:
        """Give the file `source` the second name `name`."""
        with atomic_write(name, RESUMABLE) as temporary:
            _same_file(source, temporary)

    def numbered(self) -> list[Path]:
        """The files `checkpoint_<step>.pt`, newest step first."""
        files = [
            path for path in self.folder.glob("checkpoint_*.pt") if NUMBERED.fullmatch(path.name)
        ]
        return sorted(files, key=_step_of, reverse=True)

    @property
    def best(self) -> Path | None:
        """The checkpoint last saved with `tag="best"`, if any."""
        path = self.folder / "checkpoint_best.pt"
        return path if path.is_file() else None

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
            if path.is_dir():
                _set_aside(path, "is a folder")
            elif _step_of(path) > step:
                _set_aside(path, f"is of a later step than {step}, just saved")
        self.drop_old(step)

    def drop_old(self, step: int) -> None:
        """Of the numbered checkpoints up to `step` keep the newest; a killed run may leave one more."""
        upto = [path for path in self.numbered() if _step_of(path) <= step and path.is_file()]
        for path in upto[self.keep :]:
            path.unlink()


def _set_aside(path: Path, reason: str) -> None:
    """Rename what must not be taken for a checkpoint of the run, and say so."""
    aside = path.with_name(path.name + ".superseded")
    while aside.is_dir():
        aside = aside.with_name(aside.name + ".superseded")
    warnings.warn(f"{path} {reason}; now {aside.name}", stacklevel=4)
    path.rename(aside)


def find_damage(path: str | Path) -> str | None:
    """None if the file is exactly what was written, else what is wrong with it. Reads the whole
    file, once as long as it does not change."""
    try:
        return _find_damage(path, file_state(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=64)
def _find_damage(path: str | Path, state: tuple) -> str | None:
    recorded = _recorded_hash(path)
    if recorded is None:
        return "no hash at its end, so it is truncated or not a checkpoint of this project"
    return None if _file_hash(path) == recorded else "its content does not match its hash"


def _find_damage_unless_foreign(path: Path) -> str | None:
    """As `find_damage`, but a whole archive without our hash is another project's checkpoint."""
    foreign = zipfile.is_zipfile(path) and _recorded_hash(path) is None
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


def load_checked(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint of `CheckpointFolder` whose hash was found right (`newest_valid`,
    `find_damage`).

    Tensors are mapped from the file, not copied: all processes of a machine share them.
    """
    return load_torch(path, map_location)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Plain state dict, on the CPU, of a checkpoint in any known form.

    Takes checkpoints of this project (hash verified; a run directory means its best, else its
    newest checkpoint), a Hugging Face folder, all shards of its index, `.pth` files of the original systems with a `model` or `state_dict` entry,
    bare state dicts, `.safetensors`, and pickled modules (`encoder.pkl`). The prefixes `module.`
    and `_orig_mod.` of wrapped models are removed. Raises `UserError`, also for weights that are not
    numbers.
    """
    path = Path(path)
    index = find_index(path)
    if index is not None:
        weights = _unwrapped(read_index(index))
    else:
        path = weights_file(path)
        weights = read_tensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    for name, value in weights.items():
        # masks may be -inf; NaN or infinity in a weight would make every score meaningless
        checked = value.is_floating_point() and value.element_size() > 1 and value.numel()
        if checked and not value.max() < float("inf"):
            raise UserError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")
    return weights


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """State dict of anything that is not safetensors."""
    if (
        zipfile.is_zipfile(path)
        and _recorded_hash(path) is not None
        and (damage := find_damage(path))
    ):
        raise UserError(f"{path}: {damage}; use another checkpoint of that run")
    content = load_torch(path)
    if isinstance(content, Stub):
        return module_tensors(content, path)
    if isinstance(content, dict):
        tables = [
            content[key]
            for key in ("model", "state_dict", "teacher")  # DINO publishes its teacher
            if isinstance(content.get(key), dict)
        ]
        weights = tables[0] if tables else content
        if weights and all(isinstance(value, torch.Tensor) for value in weights.values()):
            return _unwrapped(weights)
    raise UserError(
        f"{path}: holds no weights: neither tensors by name nor such a table under `model` or `state_dict`"
    )


def export_safetensors(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as safetensors, atomically. Tied tensors are written once per name, so
    that all keys stay."""
    from safetensors.torch import save_file

    seen, own = set(), {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.nbytes
        seen.add(storage.data_ptr())
        own[key] = value.clone() if shared else value

    with atomic_write(path) as temporary:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask has it; safetensors lets the owner alone read
        try:
            save_file(own, temporary, metadata={"format": "pt"})
        except Exception as error:  # safetensors hides the errno of a full disk in its text
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        temporary.chmod(mode)


# -------------------------------------------------------------------------------------------------------- file and hash


class _HashingFile:
    """A file object that hashes what it writes.

    `torch.save` calls it from C++, where an exception would be lost in a complaint about file
    positions: the first `OSError` is kept for `finish` to raise, and nothing is written after it.
    """

    def __init__(self, file):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        beat("saving a checkpoint")
        if self.error is None:
            try:
                self.file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> bytes:
        if self.error is not None:
            raise self.error
        return HASH_LABEL + self.hash.hexdigest().encode()


def _write_hashed(state: dict, path: Path) -> None:
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing)
        comment = hashing.finish()
        file.seek(-2, os.SEEK_END)  # length of the archive's comment: zero so far
        file.write(len(comment).to_bytes(2, "little") + comment)


def _recorded_hash(path: str | Path) -> str | None:
    """The sha256 in the archive's comment, or None where the file does not end in exactly such a
    comment."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) <= COMMENT_SIZE + 2:
            return None
        file.seek(-COMMENT_SIZE - 2, os.SEEK_END)
        size, comment = file.read(2), file.read()
    if int.from_bytes(size, "little") != COMMENT_SIZE or not comment.startswith(HASH_LABEL):
        return None
    return comment[len(HASH_LABEL) :].decode("ascii", "replace")


def _file_hash(path: str | Path) -> str:
    """sha256 of the file as it was before the comment: without it, and with zero as its length."""
    remaining = os.path.getsize(path) - COMMENT_SIZE - 2
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0:
            block = file.read(min(BLOCK, remaining))
            if not block:
                break
            digest.update(block)
            remaining -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


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


# -------------------------------------------------------------------------------------------------------------- weights


def weights_file(path: Path) -> Path:
    """The file itself; of a folder the best checkpoint, else the newest, else the first
    .safetensors. Warns of damaged checkpoints, which it passes over. UserError."""
    if path.is_dir():
        checkpoints = CheckpointFolder(path)
        ours = [checkpoints.best] if checkpoints.best else []
        found = _first_intact(ours + checkpoints.numbered(), _find_damage_unless_foreign)
        found = found or next(iter(sorted(path.glob("*.safetensors"))), None)
        if found is None:
            raise UserError(f"{path}: a folder without checkpoint_*.pt or *.safetensors")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    return path


def _unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
