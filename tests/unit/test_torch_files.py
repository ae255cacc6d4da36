"""Weights in several files: every reader takes all shards of an index, or says what is missing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from base.errors import UserError
from base.torch_files import load_weights_only
from models.weights.albef import load_bert_folder
from models.weights.llama import read_llama
from runtime.checkpoint import read_weights

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
@pytest.mark.parametrize("reader", ["checkpoint", "bert"])
def test_all_shards_are_read(tmp_path, safe, reader):
    sharded(tmp_path, STATE, safe)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    if reader == "bert":
        found, config = load_bert_folder(tmp_path)
        assert config == {"hidden_size": 8}
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
