"""Pretrain.py on two processes: FSDP2 computes what DDP computes, and either's checkpoint is the
other's."""

import pytest

from tests.contract.test_parallel import needs_fsdp2
from tests.helpers.pretraining import arguments, finish
from tests.helpers.runs import lines


@needs_fsdp2
@pytest.mark.parametrize(
    "precision, within", [("fp32", 2e-4), pytest.param("bf16", 3e-2, marks=pytest.mark.slow)]
)
def test_fsdp_equals_ddp_and_its_checkpoint_goes_on_in_one_process(
    precision, within, digitscenes, image_tokenizer, tmp_path
):
    common = {"workers": 1, "log_every": 1, "scheduler.epochs": "4 steps", "precision": precision}
    for parallel in ("ddp", "fsdp"):
        flags = arguments(
            digitscenes, image_tokenizer, tmp_path / parallel, parallel=parallel, **common
        )
        said = finish(2, flags)
        assert "Warning" not in said, said  # ours, torch's or another library's
    for ddp, fsdp in zip(lines(tmp_path / "ddp"), lines(tmp_path / "fsdp"), strict=True):
        assert fsdp == pytest.approx(ddp, rel=within)
    changes = common | {"scheduler.epochs": "6 steps", "batch_size": 16, "resume": "yes"}
    with_one = arguments(digitscenes, image_tokenizer, tmp_path / "fsdp", **changes)
    output = finish(1, with_one)
    assert "resuming" in output and lines(tmp_path / "fsdp")[-1]["step"] == 6
