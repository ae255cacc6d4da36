"""convert.py --push against a stand-in of the hub: what arrives, the model card, and refusals."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import get_session

from base.errors import UserError
from models.classification.classifier import ClassifierConfig, VisionClassifier
from scripts.weights import convert as convert_script
from scripts.weights import push as push_script
from scripts.weights.card import (
    TRAINED,
    CardFacts,
    check_repository,
    configuration,
    data_names,
    model_card,
)
from scripts.weights.own import movable
from scripts.weights.push import check_hub, push
from scripts.weights.source import Options, Source, Written, open_source
from tests.helpers.exported import run_example, save_run
from tests.helpers.main_runs import ROOT
from tests.helpers.stand_in_hub import TOKEN, stand_in_hub


def trained(folder):
    """A run of Classification.py with scores and a path of this machine."""
    torch.manual_seed(0)
    network = {"model": "vit-mu/8", "image_size": 32, "num_classes": 5}
    config = {"network": network, "train_data": "/home/me/secret/shards", "val_data": "digits"}
    save_run(folder, VisionClassifier(ClassifierConfig(**network)), config)
    (folder / "result").mkdir()
    scores = {
        "val": {"acc1": 91.234567, "whole": True},
        "classes": 5,
        "imagefolder:/home/me/x": {"acc1": 1},
    }
    (folder / "result/metrics.json").write_text(json.dumps(scores))
    return folder


def convert(source, out, address, token, *more, to="me/tiny") -> subprocess.CompletedProcess:
    words = [sys.executable, "scripts/weights/convert.py", source, "--to", "timm", "--output", out]
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    words += ["--push", to, *more]
    return subprocess.run(
        list(map(str, words)),
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_folder_arrives_as_it_is(tmp_path, monkeypatch):
    source, out = trained(tmp_path / "run"), tmp_path / "out"
    with stand_in_hub() as (address, hub):
        licences = ("--license", "apache-2.0", "--data-license", "CC BY 4.0", "--private")
        found = convert(source, out, address, TOKEN, *licences)
        assert found.returncode == 0, found.stderr
        assert f"{address}/me/tiny" in found.stdout
        refused = convert(source, tmp_path / "refused", address, "hf_wrong")
        hub.repositories["other/tiny"] = {}
        foreign = convert(source, tmp_path / "foreign", address, TOKEN, to="other/tiny")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert hub.repositories["me/tiny"] == files and hub.private["me/tiny"]
    assert {"README.md", "config.json", "model.safetensors"} == files.keys()
    assert any(call == "PUT" for call in hub.calls)  # the weights went by LFS
    card = files["README.md"].decode()
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "indices" in run_example(out, example, monkeypatch)
    for process in (refused, foreign):
        assert process.returncode == 2 and len(process.stderr.strip().splitlines()) == 1
        assert "refuses the token; log in with `hf auth login`" in process.stderr
    assert not (tmp_path / "refused").exists()  # nothing was converted
    assert "a token that may write to other" in foreign.stderr
    assert f"`hf upload other/tiny {tmp_path / 'foreign'}`" in foreign.stderr
    assert (tmp_path / "foreign/model.safetensors").is_file()
    assert hub.repositories["other/tiny"] == {}


def test_nothing_is_uploaded_but_this_export(tmp_path, monkeypatch, capsys):
    """Not the user's notes, nor what another layout says of its weights."""
    uploads = []

    def refuse(name):
        raise UserError(f"{name} is refused")

    monkeypatch.setattr(convert_script, "check_hub", refuse)
    monkeypatch.setattr(convert_script, "push", lambda *given: uploads.append(given) or "there")
    source, out = trained(tmp_path / "run"), tmp_path / "out"
    words = [str(source), "--to", "timm", "--output", str(source / "config.yaml")]
    assert convert_script.main(words) == 2
    assert "config.yaml is not a folder; name another --output" in capsys.readouterr().err
    words = [str(source), "--output", str(out), "--push", "me/tiny", "--to"]
    assert convert_script.main([*words, "safetensors"]) == 2 and not out.exists()
    assert "me/tiny is refused" in capsys.readouterr().err
    monkeypatch.setattr(convert_script, "check_hub", lambda *_: None)
    facts = ["--private", "--name", "Tiny", "--license", "mit", "--data-license", "CC0"]
    for more in (facts, []):  # a second upload of the same
        assert convert_script.main([*words, "safetensors", *more]) == 0
        card = (out / "README.md").read_text()
        assert ("# Tiny\n" in card) == ("license: mit\n" in card) == bool(more)
        assert ("data: CC0." in card) == bool(more) == ("# tiny\n" not in card)
    assert uploads == [(out, "me/tiny", True), (out, "me/tiny", False)]
    (out / "notes").mkdir()
    (out / "notes/secret.txt").touch()
    assert convert_script.main([*words, "safetensors"]) == 2 and len(uploads) == 2
    assert "holds notes/secret.txt, which is not of this export" in capsys.readouterr().err
    (out / "notes/secret.txt").unlink()
    assert convert_script.main([*words, "timm"]) == 2 and len(uploads) == 2
    assert "holds config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["hf/{}", "open_clip/local-dir:{}", pytest.param("hf/me/on_the_hub", id="hub")]
)
def test_weights_that_need_a_folder_of_this_machine_are_not_pushed(name, tmp_path):
    name = name.format(tmp_path)
    about = {"config": {"network": {"model": name}}}
    source = Source(file=tmp_path / "x", weights={}, about=about, family="clip")
    assert movable(source, Options(), tmp_path)["network"]["model"] == name
    if name == "hf/me/on_the_hub":
        assert movable(source, Options(repository="me/x"), tmp_path)["network"]["model"] == name
        return
    with pytest.raises(UserError, match="is a folder of this machine"):
        movable(source, Options(repository="me/x"), tmp_path)


def test_the_tokenizer_of_a_run_goes_before_that_of_its_llama(tmp_path):
    for name, content in (("llama/tokenizer.model", "llama's"), ("own.model", "own")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for given, written in ((None, "tokenizer.model"), (f"{tmp_path}/own.model", "own.model")):
        config = {"llama": f"{tmp_path}/llama", "tokenizer": given}
        source = Source(file=tmp_path / "x", weights={}, about={"config": config}, family="nxtp")
        out = tmp_path / f"out_{written}"
        movable(source, Options(), out)
        assert [file.name for file in (out / "tokenizer").iterdir()] == [written]


@pytest.mark.slow
def test_a_hub_that_is_not_there(tmp_path):
    found = convert(trained(tmp_path / "run"), tmp_path / "out", "http://127.0.0.1:9", TOKEN)
    assert found.returncode == 2 and "cannot be reached" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_hub_that_goes_silent_is_given_up(tmp_path, monkeypatch):
    client = get_session()  # of all tests
    monkeypatch.setattr(client, "timeout", client.timeout)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setenv("QUINTET_REMOTE_SILENCE", "0.3")
        with pytest.raises(UserError, match=r"cannot be reached .*then `hf upload me/new"):
            push(tmp_path, "me/new", private=True)


class Answer(Exception):
    """What the hub's client raises of an HTTP status."""

    def __init__(self, status):
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    "error, said",
    [
        (Answer(401), "refuses the token; log in"),
        (Answer(403), "set HF_TOKEN to a token that may write to me"),
        (UnicodeEncodeError("ascii", "ü", 0, 1, "x"), "refuses the token"),
        (Answer(500), "does not take it"),
        (ValueError("no such name"), "does not take it (no such name)"),
        (OSError("no route"), "cannot be reached (no route)"),
    ],
)
def test_what_the_hub_answers_is_told_apart(error, said, tmp_path, monkeypatch):
    def raise_it(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "model_info", raise_it)
    monkeypatch.setattr(HfApi, "create_repo", raise_it)
    for call in (lambda: check_hub("me/x"), lambda: push(tmp_path, "me/x", private=False)):
        with pytest.raises(UserError, match=rf"^--push me/x: .*{re.escape(said)}"):
            call()


def test_a_repository_is_made_where_it_is_not_there(tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(push_script, "limit_silence", lambda: None)
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **given: calls.update({name: given}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **given: calls.update(sent=given))
    assert push(tmp_path, "me/x", private=True).endswith("/me/x")
    assert calls["me/x"] == {"private": True, "exist_ok": True}
    assert (calls["sent"]["repo_id"], calls["sent"]["folder_path"]) == ("me/x", tmp_path)


@pytest.mark.parametrize("status", [404, 401])
def test_a_new_repository_is_told_from_a_token_that_is_refused(status, monkeypatch):
    def raise_it(_, name, timeout):
        assert timeout == push_script.SECONDS
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(HfApi, "model_info", raise_it)
    with pytest.raises(UserError, match="refuses") if status == 401 else nullcontext():
        check_hub("me/new")


def test_the_card_says_what_is_known_and_what_is_not(tmp_path):
    import ruamel.yaml

    source = open_source(trained(tmp_path / "run"))
    written = Written("timm", "image-classification", "print(1)")
    card = model_card(source, written, CardFacts(name="tiny", license="mit"))
    _, front, body = card.split("---\n", 2)
    assert ruamel.yaml.YAML(typ="safe").load(front) == {
        "license": "mit",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["quintet", "vit"],
    }
    assert (
        "- Trained on: shards (train_data).\n- Validated or tested on: digits (val_data)." in body
    )
    alone = {"dataset": "wds", "metadata": "yfcc15m.pkl", "shards": ["cc3m"]}  # a default, not read
    assert data_names(alone, TRAINED) == "wds (dataset), cc3m (shards)"
    assert "- Licence of the data: unknown." in body
    assert "| val acc1 | 91.23 |" in body and "vit-mu/8: " in body
    assert data_names({"train_data": ["a", "b"]}, TRAINED) == "a (train_data), b (train_data)"
    assert "Of the checkpoint" not in card and "| imagefolder:x acc1 | 1 |" in card
    metrics = source.file.parent / "result/metrics.json"
    metrics.write_text(
        metrics.read_text().replace("{", '{"checkpoint": "out/checkpoint_best.pt", ', 1)
    )
    later = model_card(source, written, CardFacts(name="tiny"))
    assert "Of the checkpoint checkpoint_best.pt:\n\n| figure" in later
    assert "whole" not in card, "no figure"
    assert configuration({}) == ["None is recorded beside the weights."]
    assert "secret" not in card and "/home/me" not in card
    assert re.search(r"commit ([0-9a-f]{40}|unknown)\.", body)


def test_names_of_repositories():
    assert check_repository("me/clip") == "me/clip"
    for name in ("clip", "a/b/c", "/x", "me/", "me/a b", "me/a--b", "mé/a", "me/" + "a" * 97):
        with pytest.raises(UserError, match="write USER/NAME"):
            check_repository(name)
