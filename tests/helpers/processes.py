"""Run a function on several gloo processes."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(function, world_size: int, *args) -> None:
    """`function(rank, *args)` on `world_size` processes joined over gloo; raises where one of them
    raises."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(
            _worker, (world_size, os.path.join(folder, "store"), function, args), nprocs=world_size
        )


def _worker(rank: int, world_size: int, store: str, function, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()  # nobody hangs up while another still talks
    finally:
        dist.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads now and then abort the interpreter's own way out, on which nothing depends
