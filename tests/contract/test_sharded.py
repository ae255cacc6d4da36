"""Sharded checkpoints of several processes: what FSDP and DDP wrote, any number of processes reads;
one that fails fails them all."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import ProcessExitedException

from base import distributed
from base.distributed import World
from base.errors import UserError
from runtime import saving
from runtime.checkpoint import CheckpointFolder, find_damage, load_checked, read_weights
from runtime.parallel import ParallelOptions, parallelize
from runtime.saving import Saver, copied_to_host
from runtime.sharded import Piece, is_sharded, merge_weights, outline, read_state, write_part
from scripts.weights import convert
from tests.contract.test_parallel import needs_fsdp2
from tests.helpers.processes import ROOT, spawn

# what two processes write, and who reads it: how wrapped, on how many processes
READERS = [
    pytest.param("fsdp", [("fsdp", 3)], marks=needs_fsdp2),
    pytest.param("fsdp", [("ddp", 2), ("fsdp", 2)], marks=[needs_fsdp2, pytest.mark.slow]),
    pytest.param("ddp", [("ddp", 2), ("fsdp", 2)], marks=[needs_fsdp2, pytest.mark.slow]),
]


class Net(nn.Module):
    """Rows that two or three processes share unevenly, a scalar, and a buffer."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.rand(()))
        self.register_buffer("queue", torch.rand(4, 7))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).square().mean() * self.scale


def network(rank: int, parallel: str, seed: int) -> tuple[World, nn.Module, torch.optim.Optimizer]:
    world = World(rank, distributed.world_size(), rank, torch.device("cpu"))
    model = parallelize(Net(seed), world, ParallelOptions(parallel=parallel))
    return world, model, torch.optim.AdamW(model.parameters(), lr=0.1)


def whole(model, optimizer) -> dict:
    """Weights and optimizer state, gathered on rank 0."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = dcp.get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments.get("state")}


def save(rank: int, parallel: str, folder: str, step: int = 1, sharded: bool = True) -> None:
    """Two updates, a checkpoint; and another update before any of it is written."""
    world, model, optimizer = network(rank, parallel, seed=step)
    checkpoints = CheckpointFolder(folder)
    saver = Saver(checkpoints, world, sharded=sharded, in_background=True, fresh=True)
    updated, together = threading.Event(), saving.together

    def write_after_the_update(*args) -> None:
        updated.wait()
        together(*args)

    saving.together = write_after_the_update
    update(model, optimizer, rank)
    update(model, optimizer, rank)
    expected = copied_to_host(whole(model, optimizer))
    about = {"step": step, "config": {"lr": 0.1}}
    saver.save(model, optimizer, about, {"rank": rank}, step)
    update(model, optimizer, rank)
    updated.set()
    saver.wait()
    if rank == 0:
        torch.save(expected, f"{folder}/expected.pt")


def update(model, optimizer, rank: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(10.0).reshape(2, 5) + rank).backward()
    optimizer.step()


def load(rank: int, parallel: str, folder: str) -> None:
    """The checkpoint in another network, compared with what was saved."""
    from torch.distributed.checkpoint import state_dict as dcp

    world, model, optimizer = network(rank, parallel, seed=9)
    path = CheckpointFolder(folder).newest_valid()
    saved = load_checked(path)
    assert saved["step"] == 1 and [own["rank"] for own in saved["per_rank"]] == [0, 1]
    state = read_state(path, saved, model, world.rank)
    options = dcp.StateDictOptions(broadcast_from_rank0=False)
    dcp.set_model_state_dict(model, state["model"], options=options)
    dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    found = whole(model, optimizer)
    if rank == 0:
        assert_equal(found, torch.load(f"{folder}/expected.pt"))


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[name], value)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("parallel", "readers"), READERS)
def test_any_number_of_processes_reads_what_two_wrote(parallel, readers, tmp_path):
    spawn(save, 2, parallel, str(tmp_path))
    path = tmp_path / "checkpoint_00000001"
    assert is_sharded(path) and find_damage(path) is None
    assert sorted(file.name for file in path.iterdir()) == [
        "index.pt",
        "rank_00000.pt",
        "rank_00001.pt",
    ]
    sizes = [(path / f"rank_0000{rank}.pt").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.5 * min(sizes)  # each wrote its part
    expected = torch.load(tmp_path / "expected.pt")
    assert_equal(read_weights(path), expected["model"])
    assert_equal(read_weights(tmp_path), expected["model"])
    merged = tmp_path / "merged.safetensors"
    assert convert.main(["merge", str(path), str(merged)]) == 0
    assert_equal(load_file(merged), expected["model"])
    load(0, "ddp", str(tmp_path))  # this one process
    for other, processes in readers:
        spawn(load, processes, other, str(tmp_path))


def test_one_file_is_written_beside_the_training_too(tmp_path):
    spawn(save, 2, "ddp", str(tmp_path), 1, False)
    path = tmp_path / "checkpoint_00000001.pt"
    assert find_damage(path) is None
    found, expected = load_checked(path), torch.load(tmp_path / "expected.pt")
    assert_equal(found["model"], expected["model"])
    assert_equal(found["optimizer"]["state"], expected["optimizer"])
    assert [own["rank"] for own in found["per_rank"]] == [0, 1]


DISK = "the disk is full"


def fail(rank: int, folder: str, where: str) -> None:
    """The second checkpoint fails on rank 1, or when rank 0 commits it."""
    world, model, optimizer = network(rank, "ddp", seed=0)
    saver = Saver(CheckpointFolder(folder), world, sharded=True, in_background=True, fresh=True)
    saver.save(model, optimizer, {"step": 1}, {}, 1)
    saver.wait()
    name = {"part": "rank_00001.pt", "index": "index.pt", "rename": "checkpoint_00000002"}[where]

    def replace(source, target, original=os.replace):
        if Path(target).name == name and "00000002" in str(target):
            raise OSError(28, DISK)
        original(source, target)

    os.replace = replace
    saver.save(model, optimizer, {"step": 2}, {}, 2)
    with pytest.raises(UserError, match=r"disk is full.*start the same command again") as error:
        saver.wait()
    assert "\n" not in str(error.value)
    assert saver.failure == str(error.value)  # the log point of every process sees it
    with pytest.raises(UserError, match="disk is full"):  # and no process saves again
        saver.save(model, optimizer, {"step": 3}, {}, 3)


@pytest.mark.parametrize(
    "where", ["part", *(pytest.param(name, marks=pytest.mark.slow) for name in ("index", "rename"))]
)
def test_what_fails_on_one_process_fails_all_and_the_checkpoint_before_serves(where, tmp_path):
    spawn(fail, 2, str(tmp_path), where)
    assert CheckpointFolder(tmp_path).newest_valid() == tmp_path / "checkpoint_00000001"
    CheckpointFolder(tmp_path).clear_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000001"]


def die(rank: int, folder: str, who: int, name: str) -> None:
    """Process `who` is gone when it is about to give a file of the second checkpoint its name."""
    world, model, optimizer = network(rank, "ddp", seed=0)
    saver = Saver(CheckpointFolder(folder), world, sharded=True, in_background=True, fresh=True)
    saver.save(model, optimizer, {"step": 1}, {}, 1)
    saver.wait()

    def replace(source, target, original=os.replace):
        if rank == who and Path(target).name == name and "00000002" in str(target):
            os._exit(7)
        original(source, target)

    os.replace = replace
    saver.save(model, optimizer, {"step": 2}, {}, 2)
    saver.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "name"),
    [(0, "rank_00000.pt"), (1, "rank_00001.pt"), (0, "index.pt"), (0, "checkpoint_00000002")],
)
def test_the_checkpoint_before_serves_where_a_process_dies_while_it_writes(who, name, tmp_path):
    with pytest.raises(ProcessExitedException, match="exit code 7"):
        spawn(die, 2, str(tmp_path), who, name)
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.newest_valid() == tmp_path / "checkpoint_00000001"
    assert checkpoints.unfinished(2).is_dir()
    checkpoints.clear_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000001"]


def test_a_folder_that_not_all_nodes_see_is_one_sentence(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    part = write_part(checkpoints.unfinished(1), 0, {}, {}, "")
    with pytest.raises(UserError, match=r"rank_00001\.pt, which another node wrote, is not here"):
        checkpoints.commit({"model": {}, "step": 1}, [part, part], 1)
    assert checkpoints.newest_valid() is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def take_from_step_1(path: Path) -> None:
    path.write_bytes((path.parents[1] / "checkpoint_00000001" / path.name).read_bytes())


DAMAGES = {
    "a part is missing": ("rank_00001.pt", Path.unlink, "rank_00001.pt is missing"),
    "a part was cut": ("rank_00000.pt", cut, "rank_00000.pt: no hash at its end"),
    "a bit of a part": ("rank_00001.pt", flip, "rank_00001.pt: its content does not match"),
    "a part of another step": ("rank_00001.pt", take_from_step_1, "is of another checkpoint"),
    "the index is missing": ("index.pt", Path.unlink, "index.pt is missing"),
    "a bit of the index": ("index.pt", flip, "index.pt: its content does not match"),
    "the index of another step": ("index.pt", take_from_step_1, "rank_00000.pt is of another"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "run"
    spawn(save, 2, "ddp", str(folder), 1)
    spawn(save, 2, "ddp", str(folder), 2)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_serves(case, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    name, damage, message = DAMAGES[case]
    newest = tmp_path / "run/checkpoint_00000002"
    damage(newest / name)
    with pytest.warns(UserWarning, match=f"CHECKPOINT DAMAGED: .*{message}.* Going back to"):
        found = CheckpointFolder(tmp_path / "run").newest_valid()
    assert found == tmp_path / "run/checkpoint_00000001"
    with pytest.raises(UserError, match=rf"checkpoint_00000002.*({message}|no such|a folder)"):
        read_weights(newest)


def test_merged_tensors_begin_where_their_type_may(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.rand(5).bfloat16()}
    tensors |= {"c": torch.arange(2), "d": torch.rand(3)}
    checkpoints, file = CheckpointFolder(tmp_path), tmp_path / "merged.safetensors"
    pieces = {("model", n): Piece((0,), t) for n, t in tensors.items()}
    written = write_part(checkpoints.unfinished(1), 0, pieces, {}, "")
    path = checkpoints.commit({"model": outline(tensors), "step": 1}, [written], 1)
    assert merge_weights(path, file) == 4
    assert_equal(load_file(file), tensors)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    for name, value in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % value.itemsize == 0, name


def test_weights_that_are_not_numbers_are_not_merged(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.tensor([0.0, float("nan")])}
    pieces = {("model", n): Piece((0,), t) for n, t in tensors.items()}
    checkpoints, file = CheckpointFolder(tmp_path), tmp_path / "merged.safetensors"
    written = write_part(checkpoints.unfinished(1), 0, pieces, {}, "")
    path = checkpoints.commit({"model": outline(tensors), "step": 1}, [written], 1)
    for merged in (lambda: merge_weights(path, file), lambda: read_weights(path)):
        with pytest.raises(UserError, match=r"checkpoint_00000001: b holds NaN or infinity"):
            merged()
    assert not file.exists()


MERGE = """
import sys, threading, time
from pathlib import Path
from scripts.weights import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

from runtime import checkpoint, sharded
before, peak, ended = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, anonymous())
threading.Thread(target=watch).start()
status = convert.main(["merge", *sys.argv[1:]])
ended.set()
print(peak - before)
sys.exit(status)
"""


@pytest.mark.slow
def test_merging_takes_the_memory_of_one_tensor(tmp_path):
    tensors = {
        f"layer.{number}.weight": torch.rand(4, 1 << 18) for number in range(24)
    }  # 4 MB each
    checkpoints = CheckpointFolder(tmp_path)
    halves = []
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        pieces = {("model", n): Piece((2 * rank, 0), t[rows]) for n, t in tensors.items()}
        halves.append(write_part(checkpoints.unfinished(1), rank, pieces, {}, ""))
    path = checkpoints.commit({"model": outline(tensors), "step": 1}, halves, 1)
    command = [sys.executable, "-c", MERGE, str(path), str(tmp_path / "merged.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # KB; the weights are 96 MB; 29 to 49 were seen, of libraries first used here too
    assert int(done.stdout.splitlines()[-1]) < 72 << 10
    assert_equal(load_file(tmp_path / "merged.safetensors"), tensors)
