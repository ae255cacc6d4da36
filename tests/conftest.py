"""Shared by all tests: small data, and the table of golden comparisons at the end of a run."""

import pytest

from tests.helpers.bars import close_bars
from tests.helpers.golden import golden_root


def pytest_sessionstart():
    golden_root()  # a wrong QUINTET_GOLDEN ends the run here


def pytest_terminal_summary(terminalreporter):
    from tests.golden import report

    if report.RECORDS:
        terminalreporter.section("against the originals' numbers")
        for line in report.table():
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def no_bar_left():
    """A test starts without the progress bars of those before it."""
    close_bars()


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
