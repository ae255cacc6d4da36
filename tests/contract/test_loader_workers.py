"""Loader workers under each way to start processes: they load, and end with the process they load
for."""

import multiprocessing
import os
import signal
import time
from itertools import islice
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


def load(method: str, first: Path, second: Path) -> None:
    """Take batches of two workers, one after the other, and write down their process ids."""
    multiprocessing.set_start_method(method, force=True)
    for batches, found in ((20, first), (10**9, second)):
        loader = DataLoader(ProcessIds(), batch_size=4, num_workers=1, worker_init_fn=worker_init)
        for batch in islice(loader, batches):
            found.write_text(str(batch[0].item()))
        del loader


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_loads_and_ends_with_its_loader_or_a_kill_of_its_parent(method, tmp_path):
    """In one test: a server of processes imports PyTorch."""
    files = tmp_path / "first", tmp_path / "second"
    process = fresh_processes().Process(target=load, args=(method, *files))
    process.start()
    wait_until(lambda: files[1].exists() and files[1].read_text())
    first, second = (int(file.read_text()) for file in files)
    assert len({process.pid, first, second}) == 3
    assert not Path(f"/proc/{first}").exists()
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{second}").exists())


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
