"""A run that is killed, signalled or damaged ends with the very weights and losses of the run that
was not."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from runtime.checkpoint import find_damage, load_checked
from runtime.sharded import read_state
from tests.contract.test_parallel import needs_fsdp2
from tests.helpers.pretraining import ROOT, arguments, finish, start
from tests.helpers.processes import Run, alive, run_script
from tests.helpers.runs import lines

STEPS = "8 steps"


def weights(folder, step=8):
    path = folder / f"checkpoint_{step:08d}"
    if not path.is_dir():
        return torch.load(f"{path}.pt", weights_only=True)
    assert find_damage(path) is None
    index = load_checked(path)
    return read_state(path, index, torch.nn.Module(), rank=0)


def assert_same_run(folder, straight, step=8):
    assert lines(folder) == lines(straight)
    ours, theirs = weights(folder, step), weights(straight, step)
    for part in ("model", "optimizer"):
        for name, value in flat(ours[part]).items():
            assert torch.equal(value, flat(theirs[part])[name]), name


def flat(tree, prefix=""):
    """Tensors of nested dicts by path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else []
    return {
        path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()
    }


def wait_for_step(process, folder, step):
    """Until log.jsonl has the line of `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "log.jsonl").exists() and len(losses_so_far(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(
        f"step {step} was not reached:\n{process.communicate(timeout=20)[0][-3000:]}"
    )


def losses_so_far(folder):
    return [line for line in (folder / "log.jsonl").read_text().split("\n") if line.endswith("}")]


CASES = {
    "json, 2 processes": (2, False),
    "shards, 1 process": (1, True),
}
# written beside the training, so that the kill may come in the middle of it
SHARDED = {"sharded, 2 processes": (2, False, "ddp"), "sharded, fsdp": (2, False, "fsdp")}
SLOW = [
    pytest.param(
        case, marks=[pytest.mark.slow, needs_fsdp2] if "fsdp" in case else pytest.mark.slow
    )
    for case in SHARDED
]


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_sigkill_at_any_step_then_the_same_command_gives_the_same_run(
    case, digitscenes, image_tokenizer, tmp_path
):
    processes, shards, *parallel = {**CASES, **SHARDED}[case]
    changes = {"workers": 2, "save_every": "1 steps", "max_steps": 8}
    if parallel:
        changes.update(parallel=parallel[0], checkpoint_format="sharded")
    changes["scheduler.epochs"] = STEPS
    if shards:
        changes |= {
            "train_file": "[]",
            "shards": [digitscenes / "wds/train/00000.tar"],
            "shuffle_buffer": 20,
        }
    flags = [
        arguments(digitscenes, image_tokenizer, tmp_path / name, **changes)
        for name in ("straight", "killed")
    ]
    finish(processes, flags[0])
    # trainers of a launcher end by themselves, which test_trainers_end_when_torchrun_is_killed has
    process = start(processes, flags[1]) if parallel else Run("Pretrain.py", flags[1], processes)
    wait_for_step(process, tmp_path / "killed", 3)
    process.send_signal(signal.SIGKILL)
    process.wait()  # loader workers end by themselves
    finish(processes, flags[1])
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    if case == "json, 2 processes":  # a finished run has nothing left to do
        before = weights(tmp_path / "killed")["model"]
        assert "nothing left to train" in finish(processes, flags[1])
        after = weights(tmp_path / "killed")["model"]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (tmp_path / "killed" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_checkpoint_before_serves_where_a_node_dies_while_one_is_written(
    digitscenes, image_tokenizer, tmp_path
):
    changes = {"save_every": "1 steps", "scheduler.epochs": "3 steps", "workers": 0}
    changes |= {"checkpoint_format": "sharded", "async_save": "true"}

    def flags(name):
        return arguments(digitscenes, image_tokenizer, tmp_path / name, **changes)

    finish(2, flags("straight"))
    said = run_script("tests/helpers/dying_trainer.py", ["2", *flags("killed")], 2, expect=-9)
    assert "Traceback" not in said
    folder = tmp_path / "killed"
    assert [path.name for path in folder.glob("checkpoint_*")] == ["checkpoint_00000001"]
    assert [path.name for path in folder.glob(".checkpoint_*")] == [".checkpoint_00000002.writing"]
    assert f"resuming {folder} at step 1" in finish(2, flags("killed"))
    assert_same_run(folder, tmp_path / "straight", step=3)


@needs_fsdp2
@pytest.mark.slow
def test_two_copies_of_two_processes_stop_and_resume(digitscenes, image_tokenizer, tmp_path):
    """HSDP: four processes, groups of two; to the bit on four again, and on two another group of
    two continues."""
    changes = {"save_every": "2 steps", "scheduler.epochs": "4 steps", "workers": 0, "keep": 3}
    changes |= {"parallel": "fsdp", "shard_group": 2, "checkpoint_format": "sharded"}

    def flags(name, **more):
        return arguments(digitscenes, image_tokenizer, tmp_path / name, **changes, **more)

    finish(4, flags("straight"))
    finish(4, flags("stopped", max_steps=2))
    shutil.copytree(tmp_path / "stopped", tmp_path / "fewer", symlinks=True)
    finish(4, flags("stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "straight", step=4)
    said = finish(2, flags("fewer"))
    assert "resumed on 2 processes (was 4)" in said
    expected = lines(tmp_path / "straight")
    found = [line for line in lines(tmp_path / "fewer") if "processes" not in line]
    assert found[:2] == expected[:2] and len(found) == len(expected) == 4
    assert found[2:] != expected[2:]  # of other batches
    resumed = load_checked(tmp_path / "fewer/checkpoint_00000004")
    assert len(resumed["per_rank"]) == 2 and resumed["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_for_a_requeue(number, digitscenes, image_tokenizer, tmp_path):
    changes = {"save_every": "100 steps", "scheduler.epochs": "100000 steps"}
    flags = arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes)
    process = start(1, flags)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "saved at step" in output
    saved = list((tmp_path / "run").glob("checkpoint_*.pt"))
    assert len(saved) == 1


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(
    digitscenes, image_tokenizer, tmp_path
):
    """A flipped bit, in every script's, is in test_damaged_checkpoints.py."""
    flags = arguments(digitscenes, image_tokenizer, tmp_path / "run", save_every="4 steps")
    finish(1, flags)
    shutil.copytree(tmp_path / "run", tmp_path / "straight", symlinks=True)
    newest = tmp_path / "run" / "checkpoint_00000008.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    output = finish(1, flags)
    assert "checkpoint_00000008.pt" in output and "checkpoint_00000004.pt" in output
    assert_same_run(tmp_path / "run", tmp_path / "straight")


TRAINER = """
import os, time
from base import distributed
distributed.init("cpu")
os.write(1, f"{os.getpid()}\\n".encode())  # one write: two processes share the pipe
time.sleep(100)
"""


def test_trainers_end_when_torchrun_is_killed(tmp_path):
    """Left alone they would hold the folder, and the same command would be refused."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = subprocess.Popen(
        [*torchrun, "--nproc_per_node=2", f"--log-dir={tmp_path}", str(tmp_path / "trainer.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    trainers = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, trainers)):
        assert time.monotonic() < deadline, "trainers live on without their launcher"
        time.sleep(0.05)
