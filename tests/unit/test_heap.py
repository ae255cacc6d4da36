"""Training on the CPU keeps the memory that its steps free."""

import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

# page faults of ten blocks of 40 MiB, each freed before the next, in a process of its own: the
# setting is the whole process's
SCRIPT = """
import resource, sys
import torch
from runtime.heap import keep_freed_memory

kept = keep_freed_memory(torch.device(sys.argv[1]))
for _ in range(10):  # until the heap has room
    torch.ones(10 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10 * 2**20)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 40 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def kept_and_faults(device: str, **variables: str) -> tuple[bool, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, device]
    env = {**clean, **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_blocks_freed_in_a_step_are_used_again_without_page_faults():
    kept, faults = kept_and_faults("cpu")
    assert kept
    assert faults < PAGES / 20


def test_neither_a_gpu_nor_a_users_setting_is_changed():
    kept, _ = kept_and_faults("cuda")
    assert not kept
    kept, _ = kept_and_faults("cpu", MALLOC_MMAP_THRESHOLD_="4194304")
    assert not kept
