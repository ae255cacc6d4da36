"""Data sets of the Hugging Face hub by name, from a stand-in for what `datasets` fetches."""

import json

import pytest

from base.errors import UserError
from dataset.health.survey import open_list
from dataset.sources import hub
from dataset.sources.records import Records
from dataset.tasks.captions import caption_records
from dataset.tasks.classification import is_shards
from scripts.data import pack
from tests.helpers.images import of_colour

datasets = pytest.importorskip("datasets")


def encoded(level: int, kind: str = "PNG") -> bytes:
    return of_colour((level, level, level), kind=kind)


@pytest.fixture
def fetched(monkeypatch):
    """What was asked for; the hub has one data set with its images encoded."""
    calls = []

    def load_dataset(name, configuration=None, *, split):
        calls.append((name, configuration, split))
        if split != "train":
            raise ValueError(f'Unknown split "{split}".\nShould be one of [train].')
        rows = {
            "photo": [{"bytes": encoded(9), "path": None}, {"bytes": b"broken", "path": "b.jpg"}],
            "title": ["café", "two"],
            "synthetic": [["made", "up"], ["by", "a model"]],
            "label": [1, 0],
            "sound": [{"rate": 1}, {"rate": 2}],
        }
        kinds = {
            "photo": datasets.Image(),
            "title": datasets.Value("string"),
            "synthetic": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "sound": {"rate": datasets.Value("int64")},
        }
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "ask_hub", lambda name, kind: None)
    return calls


def test_a_data_set_is_fetched_once_and_read_as_a_table(fetched, cache, capsys):
    address = "hf://someone/pairs:train?image=photo&caption=title:1,synthetic:3"
    records = Records(address)
    first, second = records
    assert first["caption"] == ["café", "made", "up"] and first["caption_weights"] == [1, 1.5, 1.5]
    assert first["label"] == 1 and "sound" not in first
    assert "columns left out, no text, number or image: sound" in capsys.readouterr().out
    assert open(first["image"], "rb").read() == encoded(9) and first["image"].endswith(".png")
    assert second["image"].endswith(".bin")  # counted as a bad sample where it is read
    again = caption_records("yfcc15m", "hf:/someone/pairs?image=photo&caption=title", None)
    assert [record["caption"] for record in again] == ["café", "two"]
    assert fetched == [("someone/pairs", None, "train")]


def test_an_interrupted_copy_is_made_again(fetched, cache):
    Records("hf://someone/pairs?image=photo")
    (entries,) = cache.glob("hub-pairs-*/entries.jsonl")
    entries.unlink()
    assert len(Records("hf://someone/pairs?image=photo&caption=title")) == 2
    assert fetched == [("someone/pairs", None, "train")] * 2


def test_an_image_left_half_written_is_written_again(tmp_path):
    image = {"bytes": encoded(9), "path": None}
    path = hub.image_file(image, tmp_path, "photo", 0)
    with open(path, "r+b") as file:
        file.truncate(8)
    assert hub.image_file(image, tmp_path, "photo", 0) == path
    assert open(path, "rb").read() == encoded(9)


def test_the_other_tools_take_it_too(fetched, tmp_path):
    address = "hf://someone/pairs/small?image=photo&caption=title"
    assert not is_shards(address) and len(open_list(address)) == 2
    assert fetched == [("someone/pairs", "small", "train")]
    config = pack.Config(data=address, target=tmp_path / "shards", workers=1)
    pack.main(config)
    assert json.loads((tmp_path / "shards/00000_stats.json").read_text())["failed"] == 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://someone/pairs:tset", r"hf://someone/pairs:tset: not fetched \(Unknown split .tset"),
        ("hf://a/b/c/d", r"expected hf://USER/NAME"),
        ("hf://a b/c", r"expected hf://USER/NAME"),
        ("hf://someone/pairs?image=photo&caption=titel", r"no column titel; did you mean title"),
    ],
)
def test_mistakes_are_one_sentence(fetched, address, message):
    with pytest.raises(UserError, match=message) as raised:
        Records(address)
    assert "\n" not in str(raised.value)


def test_without_a_network_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    def refuse(self, name, **_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(UserError, match=r"hf://a/b:train: not fetched .*check name, split and net"):
        Records("hf://a/b")


def test_versions_that_run_code_of_data_sets_are_refused(monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UserError, match=r"datasets 3.6.0 runs code of data sets"):
        Records("hf://a/b")
