"""CLIP, SigLIP and ALIGN of libraries on two processes, under DDP and FSDP2: losses and weights of
one process with the whole batch; a killed run ends as the one that was not."""

import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist

from base.distributed import World
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual, with_library_sizes
from models.layers.batchnorm import synchronise_batch_norm
from models.layers.library_towers import start_towers
from runtime.checkpoint import read_weights
from runtime.parallel import ParallelOptions, parallelize, whole_model
from tests.contract.test_parallel import FSDP2
from tests.helpers.clip_toys import with_total
from tests.helpers.crash_points import contents
from tests.helpers.main_runs import arguments, finish
from tests.helpers.processes import Run, spawn
from tests.helpers.runs import lines
from tests.helpers.tiny_hugging_face import align, clip, saved, siglip
from tests.helpers.tiny_open_clip import open_clip_siglip

PAIRS, STEPS = 8, 2
STRATEGIES = ["ddp", "fsdp"] if FSDP2 else ["ddp"]


def train(name: str, rank: int = 0, size: int = 1, strategy: str = "ddp") -> dict:
    """Losses of each update, and the weights after them."""
    network = build_dual(with_library_sizes(DualConfig(model=name)))
    start_towers(network, read_weights, [])
    network = synchronise_batch_norm(network)
    features = ParallelOptions(parallel=strategy)
    model = parallelize(network, World(rank, size, rank, torch.device("cpu")), features).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator, found = torch.Generator().manual_seed(2), {}
    for step in range(STEPS):
        image = torch.randn(PAIRS, 3, 32, 32, generator=generator)
        ids = torch.randint(4, 32, (PAIRS, 16), generator=generator)
        ids[:, -2] = 3  # the end of a text
        ids[: PAIRS // 2, -1] = 0  # padding
        batch = {"image": image, "text_ids": ids}
        own = {key: value.chunk(size)[rank] for key, value in batch.items()}
        loss = with_total(model(**own), network.config)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.after_update()
        found[f"loss {step}"] = mean(loss.detach(), size)
    return found | whole_model(model).state_dict()


def mean(value: torch.Tensor, size: int) -> torch.Tensor:
    if size > 1:
        dist.all_reduce(value)
    return value / size


def on_two(rank: int, expected: dict[str, dict]) -> None:
    for name, values in expected.items():
        for strategy in STRATEGIES:
            found = train(name, rank, 2, strategy)
            assert found.keys() == values.keys()
            for key, value in values.items():
                torch.testing.assert_close(
                    found[key],
                    value,
                    rtol=1e-4,
                    atol=1e-5,
                    msg=lambda m, key=key, said=(name, strategy): f"{said} {key}: {m}",
                )


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    names = [f"open_clip/local-dir:{open_clip_siglip(tmp_path / 'open_clip')}"]
    names += [f"hf/{saved(make, tmp_path / make.__name__)}" for make in (clip, siglip, align)]
    expected = {name: train(name) for name in names}
    start = build_dual(with_library_sizes(DualConfig(model=names[1]))).state_dict()
    moved = expected[names[1]]["network.visual_projection.weight"]
    assert not torch.equal(moved, start["network.visual_projection.weight"])
    spawn(on_two, 2, expected)


@pytest.mark.slow
def test_a_killed_run_ends_as_the_one_that_was_not(digitscenes, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "run"
    options = {"model": f"hf/{saved(clip, tmp_path / 'clip')}", "parallel": STRATEGIES[-1]}
    options |= {"image_size": 32, "context_length": 16, "epochs": "4 steps", "batch_size": 4}
    options |= {"save_every": "1 steps", "eval_every": "2 steps", "keep": 1}
    flags = arguments(digitscenes, folder, **options)
    finish(2, flags)
    expected, logged = contents(folder), lines(folder)
    shutil.rmtree(folder)
    run, deadline = Run("main.py", flags, 2), time.monotonic() + 240
    log = folder / "log.jsonl"
    while not log.is_file() or log.read_bytes().count(b"\n") < 3:  # until a validation
        assert run.poll() is None and time.monotonic() < deadline, run.said()[-3000:]
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    for rank in run.ranks:
        rank.join()
    assert "resuming" in finish(2, flags)
    assert lines(folder) == logged and contents(folder) == expected
