"""The pre-training benchmark's batch, its checks and the stand-ins; no model is timed here."""

import sys

import pytest
import torch

from base.errors import UserError
from benchmarks import inputs as synthetic
from benchmarks import pretrain as bench_pretrain
from benchmarks.peers import stand_ins as bench_peer
from runtime.config.cli import run_script


def test_batch_is_what_both_models_take():
    batch = synthetic.synthetic_batch(4)
    assert torch.equal(batch["patch_mask"].sum(1), torch.full((4,), 75))
    asked = batch["mlm_labels"] != -100
    assert torch.equal(batch["mlm_labels"][asked], batch["text_ids"][asked])
    assert (batch["mlm_ids"][asked] == synthetic.MASK).all()
    assert (asked <= batch["text_mask"]).all() and asked.any(1).all() and not asked[:, 0].any()
    assert batch["text_mask"][0].all() and (batch["text_ids"][~batch["text_mask"]] == 0).all()
    again = synthetic.synthetic_batch(4)
    assert all(torch.equal(value, again[name]) for name, value in batch.items())


def test_what_cannot_be_measured_is_said_before_anything_runs(tmp_path, capsys):
    with pytest.raises(UserError, match=r"models/model_pretrain.py"):
        bench_pretrain.main(bench_pretrain.Config(peer=str(tmp_path), system="albef"))
    with pytest.raises(SystemExit, match="2"):
        run_script(bench_pretrain.main, bench_pretrain.Config, argv=["--check", "true"])
    assert "--peer PATH" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model_pretrain.py").touch()
    with pytest.raises(UserError, match="divisor of 65536"):
        bench_pretrain.main(bench_pretrain.Config(peer=str(tmp_path), system="albef", batch=6))


def test_equal_weights_give_equal_losses(tmp_path, monkeypatch):
    """Both sides of --check, the peer's being our own network under the original's names."""
    from types import SimpleNamespace

    options = SimpleNamespace(
        **vars(bench_pretrain.Config(tiny=True, batch=2, device="cpu"))
        | {"exchange": str(tmp_path)}
    )
    model = bench_pretrain.Simla(bench_pretrain.model_config(options)).eval()
    synthetic.shake(model)
    codes = torch.randint(8192, (2, 256))
    torch.save({"model": model.state_dict(), "visual_codes": codes}, tmp_path / "peer.pt")
    first = bench_pretrain.our_losses(options)["losses"]
    assert set(first) == {"loss_mlm", "loss_ita", "loss_itm", "loss_mim", "loss_pseudo"}
    assert first == bench_pretrain.our_losses(options)["losses"]
    assert all(torch.tensor(value).isfinite() for value in first.values())


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins registered for one test; what was imported before comes back."""
    with monkeypatch.context() as patch:
        saved = dict(sys.modules)
        for name in saved:
            if name.split(".")[0] == "transformers":
                patch.delitem(sys.modules, name)
        bench_peer.replace_libraries()
        yield
        for name in set(sys.modules) - set(saved):
            if name.split(".")[0] == "transformers":
                del sys.modules[name]


def test_stand_ins_do_what_the_libraries_do(stand_ins):
    from transformers.file_utils import ModelOutput, add_start_docstrings
    from transformers.modeling_utils import PreTrainedModel, apply_chunking_to_forward

    model = PreTrainedModel(None)
    model.weight = torch.nn.Parameter(torch.zeros(1))
    mask = model.invert_attention_mask(torch.tensor([[1, 0]]))
    assert mask.tolist() == [[[[0.0, torch.finfo(torch.float32).min]]]]
    outputs = ModelOutput(loss=None, logits=1, attentions=2)
    assert (outputs[0], outputs[1], outputs.loss) == (1, 2, None)
    assert apply_chunking_to_forward(lambda x, y: x - y, 0, 1, 5, 3) == 2
    assert add_start_docstrings("text")(len) is len
