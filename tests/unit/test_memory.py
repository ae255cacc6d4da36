"""Networks that cannot fit are refused before they are built."""

import pytest
import torch
from torch import nn

from base import memory
from base.errors import UserError
from base.memory import check_fits, free_memory, parameter_count
from models.weights.build_nxtp import Networks


class Tokens:
    vocab_size, image = 32001, 32000


def test_counting_takes_no_memory_and_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert parameter_count(lambda: nn.Linear(10**6, 10**6)) == 10**12 + 10**6
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bound_is_what_is_free(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       4096 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory() == 4 << 20
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    assert free_memory() == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 4 << 20
    check_fits(1 << 20, "a network")
    with pytest.raises(UserError, match=r"a network: .* \(1 float32 copy\), but .* are free"):
        check_fits((1 << 20) + 1, "a network")
    with pytest.raises(UserError, match="4 float32 copies"):
        check_fits((1 << 18) + 1, "a network", copies=4)


def test_a_random_decoder_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 20 << 30)
    built = []
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: built.append(1))
    with pytest.raises(UserError, match=r"NXTP's network: 7\.\d+ billion parameters need .* GiB"):
        Networks().build(Tokens())
    assert not built


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"decoder": (4096, 100_000)}, "decoder: 100,000 blocks are more than 1000"),
        ({"vision": (0, 2, 3)}, r"vision \[0, 2, 3\]: sizes are whole numbers from 1"),
        ({"decoder": (10**9, 2)}, "sizes are whole numbers"),
        ({"decoder_layers": 0}, r"decoder_layers \[0\]"),
        ({"image_size": -3}, r"image_size \[-3\]"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        Networks(**sizes).check()


def test_patches_must_fill_the_image():
    small = Networks(vision=(64, 1, 14), decoder=(64, 1), image_size=30)
    with pytest.raises(UserError, match="image_size 30: no multiple of the patch size 14"):
        small.build(Tokens())
