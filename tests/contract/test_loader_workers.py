"""Loader workers under each way to start processes: they load, and end with the process they load
for."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from dataset.loading.workers import worker_init
from tests.helpers.processes import fresh_processes

METHODS = ["fork", "forkserver"]  # the default on Linux before Python 3.14, and since


class ProcessIds(Dataset):
    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return os.getpid()


def load(method: str, batches: int, found: Path) -> None:
    """Take batches and write down the worker's process id."""
    multiprocessing.set_start_method(method, force=True)
    loader = DataLoader(ProcessIds(), batch_size=4, num_workers=1, worker_init_fn=worker_init)
    for number, batch in enumerate(loader, start=1):
        found.write_text(str(batch[0].item()))
        if number == batches:
            break


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_loads(method, tmp_path):
    process = fresh_processes().Process(target=load, args=(method, 20, tmp_path / "pid"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert int((tmp_path / "pid").read_text()) != process.pid


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_ends_after_a_kill_of_its_parent(method, tmp_path):
    process = fresh_processes().Process(target=load, args=(method, 10**9, tmp_path / "pid"))
    process.start()
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{worker}").exists())


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
