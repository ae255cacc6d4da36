"""Weights in several files: every reader takes all shards of an index, or says what is missing."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from base.errors import UserError
from base.text import POINTER
from base.torch_files import load_weights_only, read_tensors, unwrap_names
from models.weights.albef import load_bert_folder
from models.weights.llama import read_llama
from models.weights.loading import load_checkpoint
from runtime.checkpoint import read_weights, weights_file
from runtime.config.from_checkpoint import description_of

STATE = {name: torch.full((2,), float(number)) for number, name in enumerate("abcd")}


def sharded(folder: Path, state: dict, safe: bool = True) -> Path:
    """A Hugging Face folder with two shards."""
    names = list(state)
    suffix = "safetensors" if safe else "bin"
    stem = "model" if safe else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    parts = {files[0]: names[::2], files[1]: names[1::2]}
    for file, part in parts.items():
        tensors = {name: state[name].clone() for name in part}
        if safe:
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = folder / f"{stem}.{suffix}.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("reader", ["checkpoint", "file", "bert"])
def test_all_shards_are_read(tmp_path, safe, reader):
    sharded(tmp_path, STATE, safe)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    if reader == "bert":
        found, config = load_bert_folder(tmp_path)
        assert config == {"hidden_size": 8}
    elif reader == "file":  # as scripts do that ask what lies beside it
        file = weights_file(tmp_path)
        found = read_weights(file)
        assert description_of(file) == {"config.json": {"hidden_size": 8}}
    else:
        found = read_weights(tmp_path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


def test_a_missing_shard_is_named(tmp_path):
    index = sharded(tmp_path, STATE)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = r"index\.json: 1 of 2 shards are missing, e\.g\. model-00002-of-00002\.safetensors"
    for read in (read_weights, load_bert_folder):
        with pytest.raises(UserError, match=message):
            read(tmp_path)
    geometry = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    geometry.update(intermediate_size=8, rms_norm_eps=1e-6, vocab_size=8)
    (tmp_path / "config.json").write_text(json.dumps(geometry))
    with pytest.raises(UserError, match=message):
        read_llama(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"] = {"x": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no tensor x in model-00001"):
        read_weights(tmp_path)
    for hostile in ({"x": "../../etc/passwd"}, {"x": 1}, {}, []):
        index.write_text(json.dumps({"weight_map": hostile}))
        with pytest.raises(UserError, match=r"index\.json: (its shards|no weight_map)"):
            read_weights(tmp_path)


@pytest.mark.parametrize("named", [False, True])
def test_a_part_alone_is_not_taken_for_the_whole(tmp_path, named):
    sharded(tmp_path, STATE).unlink()
    path = tmp_path / "model-00001-of-00002.safetensors" if named else tmp_path
    with pytest.raises(UserError, match=r"one of 2 parts.*model\.safetensors\.index\.json"):
        read_weights(path)


def test_the_only_part_is_the_whole(tmp_path):
    save_file(STATE, tmp_path / "model-00001-of-00001.safetensors")
    assert read_weights(tmp_path).keys() == STATE.keys()


WHOLE = {name: torch.arange(2.0) + number for number, name in enumerate(("a.x", "b.0.module.y"))}


@pytest.mark.parametrize(
    "rename",
    [
        "module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
        "b.0.module.y -> b.0._checkpoint_wrapped_module.module.y",
        "b.0.module.y -> b.0._fsdp_wrapped_module._orig_mod.module.y",
    ],
)
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "model.safetensors.index.json"])
def test_names_of_wrapped_networks(rename, file, tmp_path):
    old, arrow, new = rename.partition(" -> ")
    state = {(k.replace(old, new) if arrow else rename.format(k)): v for k, v in WHOLE.items()}
    if file.endswith("json"):
        sharded(tmp_path, state)
    elif file.endswith("pth"):
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    found = read_weights(tmp_path / file)
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(found[name], value) for name, value in WHOLE.items())


@pytest.mark.parametrize(
    "key", ["teacher", "model_state_dict", "module", "model_ema", "state_dict_ema", "ema"]
)
def test_weights_under_the_names_of_other_trainers(key, tmp_path, capsys):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.BatchNorm1d(2))
    state = {**average.state_dict(), "module._extra_state": None}
    torch.save({"epoch": 1, key: state, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert "left out" not in capsys.readouterr().err
    assert found.keys() == torch.nn.BatchNorm1d(2).state_dict().keys()


@pytest.mark.parametrize(
    ("beside", "names"),
    [([], [*WHOLE]), (["loss.weight"], ["model.a.x", "model.b.0.module.y", "loss.weight"])],
)
def test_a_network_that_lightning_saved_has_its_own_names(beside, names, tmp_path):
    """Unless others lie beside it, such as a second network: which one is meant is not known."""
    state = {f"model.{name}": value for name, value in WHOLE.items()}
    state |= dict.fromkeys(beside, torch.ones(1))
    content = {"pytorch-lightning_version": "2.5.0", "state_dict": state, "hyper_parameters": {}}
    torch.save(content, tmp_path / "last.ckpt")
    assert list(read_weights(tmp_path / "last.ckpt")) == names
    torch.save(content["state_dict"], tmp_path / "w.pth")  # as LLaMA's files have it, too
    assert list(read_weights(tmp_path / "w.pth")) == [*state]


def test_names_that_two_weights_would_share_stay():
    assert list(unwrap_names({"a": torch.ones(1), "module.a": torch.zeros(1)})) == ["a", "module.a"]


@pytest.mark.parametrize("name", ["state_dict_ema", "ema"])
def test_an_average_beside_the_weights_is_said_to_be_left_out(name, tmp_path, capsys):
    average = {name: value + 1 for name, value in STATE.items()}
    content = {"state_dict": STATE, name: average}  # as timm saves both
    torch.save(content, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    read_weights(tmp_path / "w.pth")
    assert capsys.readouterr().err.count(f"{name}, their average, is left out") == 1
    assert torch.equal(found["b"], STATE["b"])


def test_what_a_file_without_weights_holds_is_said(tmp_path):
    torch.save({"net": STATE, **dict.fromkeys("abcdefghij", 3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="but entries net, a, b, c, d, e, f, g, h, i; save"):
        read_weights(tmp_path / "w.pth")


def test_tensors_by_number_are_no_weights(tmp_path):
    """As the state of an optimizer has them."""
    torch.save({0: torch.ones(2), "b": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path / "w.bin")
    assert list(read_tensors(tmp_path / "w.bin", lambda name: name.endswith("b"))) == ["b"]


@pytest.mark.parametrize("zipped", [True, False])
def test_ordinary_checkpoints(tmp_path, zipped):
    content = {"model": STATE, "epoch": 3, "half": torch.ones(3).half()[::2]}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    found = load_weights_only(tmp_path / "c.pt")
    assert found["epoch"] == 3 and torch.equal(found["half"], content["half"])
    assert all(torch.equal(found["model"][name], value) for name, value in STATE.items())


def test_uncommon_dtypes_and_layouts(tmp_path):
    content = {
        "complex": torch.ones(2, dtype=torch.complex64),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.ones(1).expand(1000),
    }
    torch.save(content, tmp_path / "c.pt")
    found = load_weights_only(tmp_path / "c.pt")
    assert found["float8"].dtype == torch.float8_e4m3fn and found["expanded"].shape == (1000,)
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "odd",
    [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")],
    ids=["sparse", "complex", "meta"],
)
@pytest.mark.parametrize("reader", [read_weights, read_tensors])
def test_weights_that_are_no_plain_numbers_are_named(odd, reader, tmp_path):
    torch.save({"a": torch.ones(2), "b": odd}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: b is no plain tensor"):
        reader(tmp_path / "w.pth")


def test_whole_numbers_are_no_weights():
    model = torch.nn.BatchNorm1d(2)
    state = model.state_dict() | {"weight": torch.ones(2, dtype=torch.int8)}
    with pytest.raises(UserError, match="1 of whole numbers, which are no weights: weight"):
        load_checkpoint(model, state)


@pytest.mark.parametrize("name", ["w.pth", "W.SAFETENSORS", "w"])
@pytest.mark.parametrize("reader", [read_weights, read_tensors])
def test_safetensors_under_another_name(name, reader, tmp_path):
    save_file(STATE, tmp_path / name)
    found = reader(tmp_path / name)
    assert all(torch.equal(found[key], value) for key, value in STATE.items())


def test_a_folder_with_one_file_of_transformers(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert set(read_weights(tmp_path)) == set(STATE)


@pytest.mark.parametrize(
    "name", ["epoch_latest.pt", "checkpoint_29.pth", "last.ckpt", "best.pth.tar"]
)
def test_files_of_other_trainers_in_a_folder_are_named(tmp_path, name):
    torch.save({"state_dict": STATE}, tmp_path / name)
    with pytest.raises(UserError, match=f"name one of its files: {re.escape(name)}$"):
        read_weights(tmp_path)
    assert read_weights(tmp_path / name).keys() == STATE.keys()


def test_a_folder_with_several_files_of_weights(tmp_path):
    for name in ("adapter.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"several files of weights \(adapter.safetensors, model.fp"
    ):
        weights_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert weights_file(tmp_path).name == "model.safetensors"
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "open_clip_pytorch_model.bin").touch()
    assert weights_file(hub).name == "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("reader", [read_weights, read_tensors])
def test_a_pointer_in_place_of_weights_is_named(name, reader, tmp_path):
    (tmp_path / name).write_bytes(POINTER + b"/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="a pointer of Git LFS"):
        reader(tmp_path / name)


def test_a_machine_without_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    def full(*_args, **_named):
        raise OSError("Cannot allocate memory (os error 12)")

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(MemoryError, match=r"a\.safetensors: Cannot allocate memory"):
        read_tensors(tmp_path / "a.safetensors")
