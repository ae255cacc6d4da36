"""The benchmark's own arithmetic, its page, its batch, and both sides' small parts; no model is
timed here."""

import sys
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from benchmarks import common as bench_common
from benchmarks import pretrain as bench_pretrain
from benchmarks import pretrain_peer as bench_peer

ROOT = Path(__file__).resolve().parents[2]


def runs(*rows):
    return [{"seconds": s, "cpu_seconds": c, "peak_bytes": b} for s, c, b in rows]


def test_ratios_are_medians_of_pairs():
    results = {
        "ours": runs((1.0, 2.0, 6), (10.0, 2.0, 6), (1.0, 1.0, 6)),
        "peer": runs((2.0, 6.0, 10), (20.0, 4.0, 12), (9.0, 2.0, 10)),
    }
    found = bench_pretrain.ratios(results)
    assert found["speed"] == 2.0  # pairs 2, 2, 9: a disturbed pair counts once
    assert found["cpu"] == 2.0
    assert found["memory"] == pytest.approx(0.6)


def test_sections_are_replaced_and_others_kept():
    page = bench_pretrain.with_section("# Benchmarks\n", "A, batch 4", "first")
    page = bench_pretrain.with_section(page, "A, batch 4, compiled", "second")
    page = bench_pretrain.with_section(page, "A, batch 4", r"third \1")
    assert (
        page == "# Benchmarks\n\n## A, batch 4\n\nthird \\1\n\n## A, batch 4, compiled\n\nsecond\n"
    )


def test_settings_that_differ_have_different_headings():
    plain = bench_pretrain.Config()
    others = [
        bench_pretrain.Config(**change)
        for change in (
            {"system": "albef"},
            {"batch": 8},
            {"precision": "bf16"},
            {"compile": True},
            {"activation_checkpointing": True},
            {"compat": "original"},
            {"peer": "x"},
            {"peer": "x", "peer_precision": "tf32"},
        )
    ]
    assert (
        len({bench_pretrain.heading(config, "cpu") for config in [plain, *others]})
        == len(others) + 1
    )


def test_command_line_names_no_place_on_disk():
    config = bench_pretrain.Config(
        peer="/home/me/SIMLA", peer_python="/opt/python", batch=8, compile=True
    )
    words = bench_pretrain.command_line(config)
    assert (
        words
        == "python -m benchmarks.pretrain --batch 8 --compile true --peer PATH --peer-python PATH"
    )


def test_batch_is_what_both_models_take():
    batch = bench_common.synthetic_batch(4)
    assert torch.equal(batch["patch_mask"].sum(1), torch.full((4,), 75))
    asked = batch["mlm_labels"] != -100
    assert torch.equal(batch["mlm_labels"][asked], batch["text_ids"][asked])
    assert (batch["mlm_ids"][asked] == bench_common.MASK).all()
    assert (asked <= batch["text_mask"]).all() and asked.any(1).all() and not asked[:, 0].any()
    assert batch["text_mask"][0].all() and (batch["text_ids"][~batch["text_mask"]] == 0).all()
    again = bench_common.synthetic_batch(4)
    assert all(torch.equal(value, again[name]) for name, value in batch.items())


def test_measure_leaves_out_the_warmup():
    calls = []
    result = bench_common.measure(lambda: calls.append(0), torch.device("cpu"), warmup=2, steps=3)
    assert len(calls) == 5 and result["seconds"] < 1
    assert result["peak_bytes"] > 50e6  # torch alone is larger


def test_what_cannot_be_measured_is_said_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match=r"models/model_pretrain.py"):
        bench_pretrain.main(bench_pretrain.Config(peer=str(tmp_path), system="albef"))
    with pytest.raises(UserError, match="--peer PATH"):
        bench_pretrain.main(bench_pretrain.Config(check=True))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model_pretrain.py").touch()
    with pytest.raises(UserError, match="divisor of 65536"):
        bench_pretrain.main(bench_pretrain.Config(peer=str(tmp_path), system="albef", batch=6))


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins registered for one test; what was imported before comes back."""
    with monkeypatch.context() as patch:
        saved = dict(sys.modules)
        for name in saved:
            if name.split(".")[0] in ("transformers", "timm"):
                patch.delitem(sys.modules, name)
        bench_peer.replace_libraries()
        yield
        for name in set(sys.modules) - set(saved):
            if name.split(".")[0] in ("transformers", "timm"):
                del sys.modules[name]


def test_stand_ins_do_what_the_libraries_do(stand_ins):
    from timm.models.vision_transformer import PatchEmbed
    from transformers.file_utils import ModelOutput, add_start_docstrings
    from transformers.modeling_utils import PreTrainedModel, apply_chunking_to_forward

    model = PreTrainedModel(None)
    model.weight = torch.nn.Parameter(torch.zeros(1))
    mask = model.invert_attention_mask(torch.tensor([[1, 0]]))
    assert mask.tolist() == [[[[0.0, torch.finfo(torch.float32).min]]]]
    assert PatchEmbed(img_size=32, patch_size=16, in_chans=3, embed_dim=8)(
        torch.zeros(2, 3, 32, 32)
    ).shape == (2, 4, 8)
    outputs = ModelOutput(loss=None, logits=1, attentions=2)
    assert (outputs[0], outputs[1], outputs.loss) == (1, 2, None)
    assert apply_chunking_to_forward(lambda x, y: x - y, 0, 1, 5, 3) == 2
    assert add_start_docstrings("text")(len) is len
