"""Checkpoints: what was saved comes back, or the one before it, loudly; never half a file, never
silence."""

import errno
import os
import resource
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch

from base.errors import UserError
from runtime import hashed
from runtime.checkpoint import (
    CheckpointFolder,
    export_safetensors,
    find_damage,
    load_checked,
    read_weights,
)
from tests.helpers.processes import in_fork


def state(step: int) -> dict:
    weight = torch.full((300, 100), float(step))
    model = {"encoder.weight": weight, "decoder.weight": weight, "temp": torch.tensor(0.07)}
    return {
        "model": model,
        "step": step,
        "config": {"lr": 1e-4, "files": ["a.json"]},
        "rng": (3, (1, 2), None),
    }


def load_latest(folder: CheckpointFolder):
    """State and path of the newest intact checkpoint; None if there is none."""
    path = folder.newest_valid()
    return None if path is None else (load_checked(path), path)


def test_saved_state_comes_back(tmp_path):
    folder = CheckpointFolder(tmp_path / "run")
    assert load_latest(folder) is None and folder.best is None
    path = folder.save(state(7), step=7)
    loaded, loaded_path = load_latest(folder)
    assert (
        loaded_path == path
        and loaded["config"] == state(7)["config"]
        and loaded["rng"] == (3, (1, 2), None)
    )
    assert torch.equal(loaded["model"]["encoder.weight"], torch.full((300, 100), 7.0))
    assert torch.load(path, weights_only=True)["step"] == 7
    assert find_damage(path) is None


def test_newest_are_kept_and_best_outlives_them(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        folder.save(state(step), step)
        if step == 2:
            folder.make_best(2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_00000003.pt", "checkpoint_00000004.pt", "checkpoint_best.pt"]
    assert torch.load(folder.best, weights_only=True)["step"] == 2
    folder.save(state(5), 5)
    folder.make_best(5)
    assert (
        torch.load(folder.best, weights_only=True)["step"] == 5 and find_damage(folder.best) is None
    )


def test_of_equal_scores_the_first_is_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2, 3):
        folder.save(state(step), step)
    assert folder.restore_best("accuracy", {1: 4.0, 2: 5.0, 3: 5.0}) == 5.0
    assert load_checked(folder.best)["step"] == 2


@pytest.mark.parametrize("keep_bytes", [0, 1, 100, 5000, -90, -72, -71, -22, -1])
def test_truncated_newest_falls_back_loudly(tmp_path, keep_bytes):
    folder = CheckpointFolder(tmp_path)
    before, newest = folder.save(state(1), 1), folder.save(state(2), 2)
    size = newest.stat().st_size
    os.truncate(newest, keep_bytes % size)
    with pytest.warns(UserWarning, match="DAMAGED") as record:
        loaded, path = load_latest(folder)
    assert path == before and loaded["step"] == 1
    assert str(newest) in str(record[0].message) and str(before) in str(record[0].message)


@pytest.mark.parametrize("position", [0, 40, 60_000, -200, -80, -74, -72, -40, -1])
def test_one_flipped_byte_is_noticed(tmp_path, position):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    newest = folder.save(state(2), 2)
    data = bytearray(newest.read_bytes())
    data[position] ^= 0x10
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="DAMAGED"):
        assert load_latest(folder)[0]["step"] == 1
    with pytest.raises(UserError, match="checkpoint_00000002"):
        if 60 < position % len(data) < len(data) - 75:  # inside the hashed part, hash legible
            read_weights(newest)
        else:
            raise UserError("checkpoint_00000002")


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        load_latest(folder)


def test_best_is_the_last_resort(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1)
    folder.make_best(1)
    folder.save(state(2), 2).write_bytes(b"x" * 1000)
    with pytest.warns(UserWarning, match="checkpoint_best"):
        assert load_latest(folder)[0]["step"] == 1


@contextmanager
def files_up_to(size):
    """A file that grows beyond `size` bytes gets an OSError, as on a full disk or quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_file_size_limit_leaves_old_checkpoints_intact(tmp_path):
    """A real failing write(2), in the middle of the file, reported from inside torch's C++
    writer."""
    folder = CheckpointFolder(tmp_path)
    first = folder.save(state(1), 1)
    with files_up_to(50_000), pytest.raises(UserError, match="disk is full"):
        folder.save(state(2), 2)
    assert list(tmp_path.iterdir()) == [first] and load_latest(folder)[0]["step"] == 1


def test_an_export_beyond_the_limit_leaves_the_old_one(tmp_path):
    """A real failing write(2), of which safetensors tells the number in its text alone."""
    file = tmp_path / "model.safetensors"
    export_safetensors({"weight": torch.ones(2)}, file)
    with files_up_to(50_000), pytest.raises(UserError, match="disk is full"):
        export_safetensors({"weight": torch.zeros(100_000)}, file)
    assert list(tmp_path.iterdir()) == [file] and read_weights(file)["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_full_disk_at_any_stage(tmp_path, monkeypatch, where):
    folder = CheckpointFolder(tmp_path)
    first = folder.save(state(1), 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if where == "write":
            patched.setattr(hashed._HashingFile, "finish", full)
        else:
            patched.setattr(os, where, full)
        with pytest.raises(UserError, match="disk is full"):
            folder.save(state(2), 2)
    assert list(tmp_path.iterdir()) == [first] and load_latest(folder)[0]["step"] == 1


def test_killed_between_write_and_rename(tmp_path):
    def save_twice() -> None:
        CheckpointFolder(tmp_path).save(state(1), 1)
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        CheckpointFolder(tmp_path).save(state(2), 2)

    assert in_fork(save_twice, tmp_path / "said.txt") == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob(".checkpoint_00000002.pt.*.tmp")]
    (tmp_path / "checkpoint_00000003.pt.tmp").touch()  # of an earlier version
    folder = CheckpointFolder(tmp_path)
    assert load_latest(folder)[0]["step"] == 1
    folder.save(state(2), 2)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert load_latest(folder)[0]["step"] == 2


def test_going_back_sets_later_steps_aside(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(50), 50)
    with pytest.warns(UserWarning, match="superseded"):
        folder.save(state(10), 10)
    assert load_latest(folder)[0]["step"] == 10
    assert (tmp_path / "checkpoint_00000050.pt.superseded").exists()


def test_values_that_would_not_load_again_are_refused(tmp_path):
    import numpy as np

    with pytest.raises(TypeError, match=r"state\['rng'\]\[1\] is a ndarray"):
        CheckpointFolder(tmp_path).save({"rng": ("MT", np.zeros(3))}, 1)
    assert not list(tmp_path.iterdir())


def test_read_weights_takes_every_form(tmp_path):
    weights = {"a.weight": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "original.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "ddp.pth")
    torch.save(weights, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    export_safetensors(weights, tmp_path / "export" / "model.safetensors")
    CheckpointFolder(tmp_path / "run").save({"model": weights, "step": 1}, 1)
    CheckpointFolder(tmp_path / "run").make_best(1)
    for name in (
        "original.pth",
        "ddp.pth",
        "bare.pth",
        "export",
        "export/model.safetensors",
        "run",
    ):
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_read_weights_says_what_is_wrong(tmp_path):
    torch.save({"epoch": 3, "config": {"a": 1}}, tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint at all")
    (tmp_path / "noise.safetensors").write_bytes(b"not a checkpoint at all")
    for name, text in [("none.pth", "no weights"), ("noise.pth", "cannot be read"), ("absent.pth", "no such"),
                       ("noise.safetensors", "not a readable")]:  # fmt: skip
        with pytest.raises(UserError, match=text) as error:
            read_weights(tmp_path / name)
        assert name in str(error.value)


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("second", "first"):
        CheckpointFolder(tmp_path / name).save({"model": {"w": torch.ones(1)}, "step": 1}, 1)
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError) as error:
        read_weights(tmp_path)
    runs = f"{tmp_path / 'first'}, {tmp_path / 'second'}"
    assert str(error.value).endswith(f"; name one of the runs in it: {runs}")
    with pytest.raises(UserError, match=r"pytorch_model\.bin$"):
        read_weights(tmp_path / "notes")


def test_export_keeps_tied_keys_and_views(tmp_path):
    from safetensors.torch import load_file

    table = torch.randn(6, 4)
    tied = {"embeddings": table, "decoder": table, "part": table[2:4], "half": table.half().t()}
    export_safetensors(tied, tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[key], tied[key]) for key in tied) and read.keys() == tied.keys()
    assert not list(tmp_path.glob("*.tmp"))


def test_no_warning_on_the_plain_path(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = CheckpointFolder(tmp_path)
        for step in (1, 2, 3):
            folder.save(state(step), step)
        assert load_latest(folder)[0]["step"] == 3


@pytest.mark.filterwarnings("ignore:CHECKPOINT DAMAGED")
@pytest.mark.parametrize("damaged", ["best", "newest", "both"])
def test_a_folder_with_damaged_checkpoints_gives_the_weights_of_an_intact_one(tmp_path, damaged):
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    folder.make_best(2)
    newest = folder.save(state(3), 3)
    flipped = {"best": [folder.best], "newest": [newest], "both": [folder.best, newest]}[damaged]
    for path in flipped:
        content = bytearray(path.read_bytes())
        content[60_000] ^= 1
        path.write_bytes(content)  # in place: checkpoint_00000002.pt is the same file
    expected = {"best": 3, "newest": 2, "both": 1}[damaged]
    if damaged == "newest":
        weights = read_weights(tmp_path)
    else:
        with pytest.warns(UserWarning, match="CHECKPOINT DAMAGED: .*checkpoint_best.pt"):
            weights = read_weights(tmp_path)
    assert torch.equal(weights["encoder.weight"], torch.full((300, 100), float(expected)))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(("value", "refused"), [("nan", True), ("inf", True), ("-inf", False)])
def test_weights_that_are_not_numbers_are_refused(tmp_path, ending, value, refused):
    weights = {"mask": torch.zeros(3, 3), "whole": torch.arange(3), "half": torch.ones(2).half()}
    weights["mask"][1, 2] = float(value)
    file = tmp_path / f"weights{ending}"
    export_safetensors(weights, file) if ending == ".safetensors" else torch.save(weights, file)
    if not refused:
        assert read_weights(file).keys() == weights.keys()
        return
    with pytest.raises(UserError, match=f"{file}: mask holds NaN or infinity"):
        read_weights(file)
