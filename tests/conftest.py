"""Shared by all tests: small data, and the table of golden comparisons at the end of a run."""

import functools
import gc
import itertools
import os
import sys
import time
from pathlib import Path

# as scripts/test.sh: sums of another number of threads differ in their last bits from those of the
# tests' own processes, which have one; torch reads it when it is imported, by the helpers below
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.bars import close_bars
from tests.helpers.golden import golden_root

# a machine with other work is slow, not wrong
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

TESTS = Path(__file__).parent
NUMBERS = itertools.count()  # of the tests' caches
# Files that take long, everyday or slow, the longest first. A process takes a whole file (scripts/
# test.sh), so that what its tests share is made once; beside a long one at the end others would idle.
LONG = (
    "script/test_compiled.py",
    "script/test_convert.py",
    "traces/test_traces.py",
    "contract/test_crash_points.py",
    "unit/test_plan.py",
    "traces/test_full_size.py",
    "script/test_main_script.py",
    "contract/test_damaged_checkpoints.py",
    "script/test_gpu_check.py",
    "script/test_photos.py",
    "fuzz/test_readers.py",
    "script/test_demo_page.py",
    "contract/test_bucket_run.py",
    "script/test_convert_others.py",
    "contract/test_resume.py",
    "contract/test_stall.py",
    "unit/test_libraries.py",
    "script/test_align_scripts.py",
    "script/test_recognition_script.py",
    "contract/test_stream.py",
    "loops/test_main_loop.py",
    "traces/test_graphs.py",
    "contract/test_sharded.py",
    "fuzz/test_attacks.py",
    "unit/test_bench_learning.py",
    "loops/test_finetune_loops.py",
    "unit/test_simla.py",
    "script/test_downstream_scripts.py",
    "script/test_pretrain_script.py",
    "contract/test_elastic.py",
    "contract/test_classification_processes.py",
    "unit/test_dvae.py",
    "unit/test_vit_facts.py",
    "unit/test_run.py",
    "unit/test_published.py",
    "unit/test_opening.py",
    "unit/test_tar.py",
    "script/test_classification_script.py",
    "contract/test_downstream_torchrun.py",
)


gc.disable()  # modules are no garbage: looking for it takes a fifth of the time that imports do


def pytest_collection_finish():
    """What was imported stays: the collector need not look through it again and again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Files that take long come first; tests of a file stay in its order."""
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_runtest_setup():
    """A CI machine may be slow, and ends what takes too long as failed: tests that have not begun at
    NOT_AFTER (seconds since 1970) are skipped, which the log says."""
    if time.time() > float(os.environ.get("NOT_AFTER", "inf")):
        pytest.skip("NOT RUN: CI's time is over")


def pytest_sessionstart():
    os.chdir(TESTS.parent)  # where the README starts every script
    golden_root()  # a wrong QUINTET_GOLDEN ends the run here


def pytest_terminal_summary(terminalreporter):
    report = sys.modules.get("tests.golden.report")  # no comparison, no import of PyTorch
    if report and report.RECORDS:
        terminalreporter.section("against the originals' numbers")
        for line in report.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """What fixtures of a module or of the session keep: never in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUINTET_CACHE", str(tmp_path_factory.getbasetemp() / "caches/shared"))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, shared_cache):
    """The folder that this test alone keeps its caches in; not there before something is kept."""
    folder = tmp_path_factory.getbasetemp() / f"caches/{next(NUMBERS)}"
    with pytest.MonkeyPatch.context() as patch:  # `monkeypatch.undo()` leaves it
        patch.setenv("QUINTET_CACHE", str(folder))
        yield folder


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's, in a folder of its own: the page of a run reads twenty runs that lie beside it."""
    folder = tmp_path / "test"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def no_bar_left():
    """A test starts without the progress bars of those before it."""
    close_bars()


@pytest.fixture
def eager_kernels(monkeypatch):
    """What torch.compile captures, decomposes and partitions runs on PyTorch's own kernels: the C++
    for the CPU, of which a GPU runs nothing, takes a minute of one core to compile."""
    import torch

    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


@pytest.fixture(scope="session")
def digitscenes(tmp_path_factory):
    """A folder of DigitScenes in all formats: 64 training, 24 validation and 24 test scenes of
    about 32 pixels."""
    from dataset.digitscenes.build import Request, build

    root = tmp_path_factory.mktemp("data") / "digitscenes"
    build(root, Request(train=64, val=24, test=24, size=32, seed=0), say=lambda *_: None)
    return root


@pytest.fixture(scope="session")
def image_tokenizer(tmp_path_factory):
    """A folder with a tiny random image tokenizer of 4 pixels per code side, as
    scripts/train_dvae.py exports it."""
    import torch

    from models.fusion.dvae import ImageTokenizer, TokenizerConfig
    from runtime.checkpoint import export_safetensors

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ImageTokenizer(
        TokenizerConfig(vocab_size=32, width=8, groups=3, blocks_per_group=1, decoder_width=8)
    )
    export_safetensors(tokenizer.state_dict(), folder / "model.safetensors")
    return folder
